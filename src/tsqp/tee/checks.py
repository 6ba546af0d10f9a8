"""What a model must know of a request before it is queued."""

from collections.abc import Iterable, Mapping, Sequence

from tsqp.errors import PromptError, PromptTooLong
from tsqp.model.config import ModelConfig
from tsqp.tee.sampling import SamplingParams


def several_prompts(prompts: object) -> list[str | list[int]]:
    """What a caller gave as prompts: each a text, or token ids that are not looked at yet.

    Raises:
        PromptError: it is neither a text, nor some of them, nor some lists of token ids.
    """
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Iterable) and not isinstance(prompts, Mapping | bytes):
        several = list(prompts)
        if all(isinstance(each, Sequence) and not isinstance(each, bytes) for each in several):
            return [each if isinstance(each, str) else list(each) for each in several]
    raise PromptError("Prompts must be a text, a list of texts, or a list of token id lists.")


def one_params(params: object) -> SamplingParams:
    """What a caller gave as sampling parameters; None for the defaults.

    Raises:
        PromptError: it is something else than one `SamplingParams`.
    """
    if params is None:
        return SamplingParams()
    if not isinstance(params, SamplingParams):
        raise PromptError("sampling_params must be one SamplingParams, which all prompts share.")
    return params


def check_prompt(prompt_ids: Sequence[int], config: ModelConfig, answer: int = 1) -> None:
    """Refuse a prompt that the model cannot go on with.

    Args:
        answer: tokens for which there must be room behind it.

    Raises:
        PromptError: it is empty, or holds an id that the model does not have.
        PromptTooLong: there is no room.
    """
    if not prompt_ids:
        raise PromptError("The prompt is empty: give at least one token.")
    if len(prompt_ids) + answer > config.max_positions:
        raise PromptTooLong(len(prompt_ids), config.max_positions)
    if any(type(token_id) is not int for token_id in prompt_ids):
        raise PromptError("A prompt of token ids holds something else than integers.")
    if min(prompt_ids) < 0 or max(prompt_ids) >= config.vocab_size:
        raise PromptError(
            f"The prompt has a token id outside the model's vocabulary of {config.vocab_size}: "
            "encode it with this model's tokenizer."
        )


def check_params(params: SamplingParams, config: ModelConfig) -> None:
    """Refuse parameters that speak of tokens that the model does not have.

    Raises:
        PromptError: they do.
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
