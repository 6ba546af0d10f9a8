"""Checks new requests, and makes the state that the engine keeps of each."""

from collections.abc import Sequence as Many

from tsqp.errors import PromptError
from tsqp.model.config import ModelConfig
from tsqp.tee.engine.sequence import Sequence
from tsqp.tee.guided.guide import Guide, Guides
from tsqp.tee.request_checks import check_params, check_prompt
from tsqp.tee.sampler import Sampler
from tsqp.tee.sampling import SamplingParams
from tsqp.tee.text.text_stream import TextStream
from tsqp.tee.text.tokenizer import Tokenizer


class Intake:
    """Takes requests for one model; see `Engine` for the arguments."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer | None) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._guides = Guides(tokenizer, config)

    def compile(self, params: SamplingParams) -> Guide | None:
        """Compile the grammar of structured outputs; None if there is none.

        May be called from any thread.

        Raises:
            PromptError, UsageError: see `Engine.add`.
        """
        wanted = params.structured_outputs
        return None if wanted is None else self._guides.guide(wanted)

    def check_text(self, token_ids: Many[int]) -> None:
        """Refuse a text that cannot be scored.

        Raises:
            PromptError: see `Engine.score`.
        """
        if len(token_ids) < 2:
            raise PromptError("There is nothing to score: give at least two tokens.")
        check_prompt(token_ids, self._config, answer=0)

    def take(
        self,
        number: int,
        prompt_ids: Many[int],
        params: SamplingParams,
        kv_tokens: int | None,
    ) -> Sequence:
        """The state of a new request.

        Args:
            number: its id.
            kv_tokens: number of tokens whose keys and values fit into memory; None for no limit.

        Raises:
            PromptError, UsageError: see `Engine.add`.
        """
        config = self._config
        check_prompt(prompt_ids, config, kv_tokens=kv_tokens)
        check_params(params, config)
        ending_ids = {
            *(params.stop_token_ids or ()),
            *(() if params.ignore_eos else config.eos_token_ids),
        }
        context = config.max_positions
        longest = context if kv_tokens is None else min(context, kv_tokens)
        return Sequence(
            id=number,
            params=params,
            token_ids=list(prompt_ids),
            prompt_tokens=len(prompt_ids),
            capacity=min(len(prompt_ids) + params.max_tokens, longest),
            ending_ids=ending_ids,
            sampler=Sampler(params, prompt_ids, ending_ids, self.compile(params)),
            stream=self._stream(params, prompt_ids),
            kv_id=number,
        )

    def _stream(self, params: SamplingParams, prompt_ids: Many[int]) -> TextStream | None:
        if self._tokenizer is not None and self._tokenizer.exists:
            # A grammar is about the answer's own bytes.
            before = prompt_ids if params.structured_outputs is None else None
            skip = params.skip_special_tokens
            stops = params.stop_strings
            return TextStream(self._tokenizer, stops, before, skip_special_tokens=skip)
        if params.stop_strings:
            raise PromptError("Stop strings need a tokenizer, and this model has none.")
        return None
