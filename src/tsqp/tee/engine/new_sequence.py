"""Makes the state of a new request."""

from collections.abc import Sequence as Many

from tsqp.errors import PromptError
from tsqp.model.config import ModelConfig
from tsqp.tee.engine.sequence import Sequence
from tsqp.tee.guided.guide import Guide
from tsqp.tee.sampler import Sampler
from tsqp.tee.sampling import SamplingParams
from tsqp.tee.text.text_stream import TextStream
from tsqp.tee.text.tokenizer import Tokenizer


def new_sequence(
    number: int,
    prompt_ids: Many[int],
    params: SamplingParams,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    guide: Guide | None,
    max_model_len: int,
) -> Sequence:
    """The state of a request whose prompt and parameters have been checked.

    Args:
        number: its id.
        guide: which tokens the grammar of the answer allows.
        max_model_len: maximum number of tokens of prompt and answer together.

    Raises:
        PromptError: there are stop strings and no tokenizer.
    """
    ending_ids = {
        *(params.stop_token_ids or ()),
        *(() if params.ignore_eos else config.eos_token_ids),
    }
    stream = None
    if tokenizer is not None and tokenizer.exists:
        # A grammar is about the answer's own bytes.
        before = prompt_ids if params.structured_outputs is None else None
        skip = params.skip_special_tokens
        stream = TextStream(tokenizer, params.stop_strings, before, skip_special_tokens=skip)
    elif params.stop_strings:
        raise PromptError("Stop strings need a tokenizer, and this model has none.")
    return Sequence(
        id=number,
        params=params,
        token_ids=list(prompt_ids),
        prompt_tokens=len(prompt_ids),
        capacity=min(len(prompt_ids) + params.max_tokens, max_model_len),
        ending_ids=ending_ids,
        sampler=Sampler(params, prompt_ids, ending_ids, guide),
        stream=stream,
        kv_id=number,
    )
