"""What a request may ask for, and what it gets."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tsqp.errors import PromptError

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Names and defaults are vLLM's.

    Attributes:
        temperature: 0 picks the likeliest token; above, probabilities are softmax(logits / it).
        top_p: keep the fewest likeliest tokens whose probabilities add up to at least this.
        top_k: keep this many likeliest tokens, before `top_p`; 0 or -1 keeps all.
        max_tokens: tokens to generate at most.
        stop: a string, or several, or None, that end the answer; they are not part of it.
        seed: makes the answer reproducible; None draws one from the system.
        ignore_eos: go on after the model's end-of-sequence token.

    Raises:
        PromptError: a value is impossible.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 16
    stop: str | Sequence[str] | None = None
    seed: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise PromptError("The temperature must be a finite number, 0 or more.")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise PromptError("top_p must be above 0 and at most 1.")
        if not _is_integer(self.top_k) or self.top_k < -1:
            raise PromptError("top_k must be an integer: how many tokens to keep, or 0 for all.")
        if not _is_integer(self.max_tokens) or self.max_tokens < 1:
            raise PromptError("max_tokens must be an integer, 1 or more.")
        if self.seed is not None and not _is_integer(self.seed):
            raise PromptError("The seed must be an integer or None.")
        if not all(isinstance(stop, str) and stop for stop in self.stop_strings):
            raise PromptError("Each stop string must be a string of at least one character.")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


@dataclass(frozen=True, slots=True)
class Completion:
    """One whole answer.

    Attributes:
        text: without special tokens and without the stop string; empty if no tokenizer.
        token_ids: every generated token, the end-of-sequence token included.
        prompt_tokens: how many tokens the prompt had.
        finish_reason: "stop" (end of sequence, or a stop string), "length", or "error".
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
