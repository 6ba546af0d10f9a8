"""Checks of a request before it is queued."""

from collections.abc import Mapping, Sequence

from tsqp.errors import PromptError, PromptTooLong
from tsqp.model.config import ModelConfig
from tsqp.tee.sampling import SamplingParams
from tsqp.tee.values import as_integer, as_integers, as_list, is_array, type_of

_FORMS = "Prompts must be a text, token ids, or a list of either"


def several_prompts(prompts: object) -> list[str | list[int]]:
    """The prompts that a caller gave: each a text, or token ids that are not checked yet.

    A plain sequence of token ids is one prompt, and so is a one-dimensional array or tensor. A
    two-dimensional one has a prompt in each row.

    Raises:
        PromptError: the value is neither a text, nor token ids, nor several of these.
    """
    if isinstance(prompts, str):
        return [str(prompts)]
    items = as_list(prompts)
    if items is None:
        raise PromptError(f"{_FORMS}, not {type_of(prompts)}{_advice(prompts)}.")
    if (is_array(prompts) and prompts.ndim == 1 and not items) or (  # type: ignore[attr-defined]
        items and as_integer(items[0]) is not None
    ):
        return [_token_ids(items, "the prompt")]
    return [_one(item, f"prompt {number}") for number, item in enumerate(items, 1)]


def one_prompt(prompt: object) -> str | list[int]:
    """The single prompt that a caller gave.

    Raises:
        PromptError: the value is neither a text nor token ids.
    """
    return _one(prompt, "the prompt")


def _one(prompt: object, name: str) -> str | list[int]:
    if isinstance(prompt, str):
        return str(prompt)
    items = as_list(prompt)
    if items is None:
        raise PromptError(f"{_FORMS}, and {name} is {type_of(prompt)}{_advice(prompt)}.")
    return _token_ids(items, name)


def _token_ids(items: Sequence[object], name: str) -> list[int]:
    token_ids = as_integers(items)
    if token_ids is None:
        place, item = next((n, i) for n, i in enumerate(items, 1) if as_integer(i) is None)
        raise PromptError(
            f"Token ids must be integers, and number {place} of {name} is {type_of(item)}; give "
            "each prompt as one text, or as one list of token ids."
        )
    return token_ids


def _advice(value: object) -> str:
    if isinstance(value, Mapping) and "input_ids" in value:
        return '; give its "input_ids"'
    if isinstance(value, Mapping) and "role" in value:
        return "; a conversation is for `chat`"
    return ""


def one_params(params: object) -> SamplingParams:
    """The sampling parameters that a caller gave; None stands for the defaults.

    Raises:
        PromptError: the value is not a `SamplingParams`.
    """
    if params is None:
        return SamplingParams()
    if not isinstance(params, SamplingParams):
        raise PromptError(
            "sampling_params must be one SamplingParams, which all prompts share, not "
            f"{type_of(params)}."
        )
    return params


def check_prompt(
    prompt_ids: Sequence[int],
    config: ModelConfig,
    answer: int = 1,
    kv_tokens: int | None = None,
) -> None:
    """Refuse a prompt that the model cannot continue.

    Args:
        answer: number of tokens that must fit into the context after the prompt.
        kv_tokens: number of tokens whose keys and values fit into memory; None for no limit.

    Raises:
        PromptError: the prompt is empty, or holds an id that the model does not have.
        PromptTooLong: the prompt and the answer do not fit into the context, or into memory.
    """
    if not prompt_ids:
        raise PromptError("The prompt is empty: give at least one token.")
    if len(prompt_ids) + answer > config.max_positions:
        raise PromptTooLong(len(prompt_ids), config.max_positions)
    if kv_tokens is not None and len(prompt_ids) + answer > kv_tokens:
        raise PromptTooLong(len(prompt_ids), kv_tokens, "the memory for keys and values holds")
    if any(type(token_id) is not int for token_id in prompt_ids):
        raise PromptError("A prompt of token ids may hold only integers.")
    if min(prompt_ids) < 0 or max(prompt_ids) >= config.vocab_size:
        raise PromptError(
            f"The prompt has a token id outside the model's vocabulary of {config.vocab_size}: "
            "encode it with this model's tokenizer."
        )


def check_params(params: SamplingParams, config: ModelConfig) -> None:
    """Check the parameters against the model's vocabulary.

    Raises:
        PromptError: the parameters refer to tokens that the model does not have.
    """
    for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
        if ids and max(ids) >= config.vocab_size:
            raise PromptError(
                f"{name} has a token id outside the model's vocabulary of {config.vocab_size}: "
                "take the ids of this model's tokenizer."
            )
    for name, count in (
        ("logprobs", params.logprobs),
        ("prompt_logprobs", params.prompt_logprobs),
    ):
        if count is not None and count > config.vocab_size:
            raise PromptError(
                f"{name} asks for {count} tokens of a vocabulary of {config.vocab_size}: ask for "
                "fewer."
            )
