"""What a request may ask for, and what it gets."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

from tsqp.errors import PromptError

MAX_SEED = 2**64

FinishReason = Literal["stop", "length", "abort", "error"]
MAX_BIAS = 100.0


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Names and defaults are vLLM's.

    The logits of a token go through `logit_bias`, `repetition_penalty`, `frequency_penalty` and
    `presence_penalty`, then `temperature`, then `top_k`, `top_p` and `min_p`, as in transformers.

    Attributes:
        temperature: 0 picks the likeliest token; above, probabilities are softmax(logits / it).
        top_p: keep the fewest likeliest tokens whose probabilities add up to at least this.
        top_k: keep this many likeliest tokens, before `top_p`; 0 or -1 keeps all.
        max_tokens: tokens to generate at most.
        stop: a string, or several, or None, that end the answer; they are not part of it.
        seed: makes the answer reproducible; None draws one from the system.
        ignore_eos: go on after the model's end-of-sequence token.
        n: answers to each prompt. Answer i draws what a request with `seed` + i would. Each
            computes the prompt for itself.
        min_p: of what is left, keep the tokens at least this times as likely as the likeliest.
        repetition_penalty: divides the positive logits of every token that is in the prompt or the
            answer so far, and multiplies the negative ones; 1 for none.
        presence_penalty: taken off the logit of every token that is in the answer so far; the
            prompt does not count. From -2 to 2.
        frequency_penalty: likewise, once for each time that it is there.
        logit_bias: what to add to the logit of some token ids, from -100 to 100.
        logprobs: for each token of the answer, give its log-probability and that of so many
            likeliest tokens; None for none. They are of the model's own distribution, before
            any of the above, as vLLM's.
        prompt_logprobs: the same for each token of the prompt but the first.
        stop_token_ids: tokens that end the answer, besides the model's end-of-sequence token; like
            that, they are among its `token_ids` and not in its `text`.
        min_tokens: tokens before which no stop token, end-of-sequence token or stop string ends
            the answer.

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
    n: int = 1
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop_token_ids: Sequence[int] | None = None
    min_tokens: int = 0

    def __post_init__(self) -> None:
        _check(
            _is_number(self.temperature) and 0 <= self.temperature < math.inf,
            "The temperature must be a finite number, 0 or more.",
        )
        _check(
            _is_number(self.top_p) and 0 < self.top_p <= 1,
            "top_p must be above 0 and at most 1.",
        )
        _check(
            _is_integer(self.top_k) and self.top_k >= -1,
            "top_k must be an integer: how many tokens to keep, or 0 for all.",
        )
        _check(
            _is_number(self.min_p) and 0 <= self.min_p <= 1,
            "min_p must be a number from 0 to 1.",
        )
        _check(
            self.seed is None or (_is_integer(self.seed) and abs(self.seed) < MAX_SEED),
            "The seed must be an integer between -2^64 and 2^64, or None.",
        )
        self._check_lengths()
        self._check_penalties()

    def _check_lengths(self) -> None:
        _check(
            _is_integer(self.max_tokens) and self.max_tokens >= 1,
            "max_tokens must be an integer, 1 or more.",
        )
        _check(
            _is_integer(self.min_tokens) and 0 <= self.min_tokens <= self.max_tokens,
            "min_tokens must be an integer from 0 to max_tokens.",
        )
        _check(
            isinstance(self.stop, Sequence | None)
            and all(isinstance(stop, str) and stop for stop in self.stop_strings),
            "Each stop string must be a string of at least one character.",
        )
        _check(
            self.stop_token_ids is None
            or (
                isinstance(self.stop_token_ids, Sequence)
                and all(map(_is_count, self.stop_token_ids))
            ),
            "Each of the stop_token_ids must be an integer, 0 or more.",
        )
        _check(_is_integer(self.n) and self.n >= 1, "n must be an integer, 1 or more.")
        _check(
            self.n == 1 or self.temperature > 0,
            "At temperature 0 all answers are the same: leave n at 1, or set a temperature.",
        )
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            _check(
                count is None or _is_count(count),
                f"{name} must be an integer, how many tokens to give, or None.",
            )

    def _check_penalties(self) -> None:
        _check(
            _is_number(self.repetition_penalty) and 0 < self.repetition_penalty < math.inf,
            "repetition_penalty must be a finite number above 0, and 1 for none.",
        )
        for name, penalty in (
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
        ):
            _check(
                _is_number(penalty) and -2 <= penalty <= 2, f"{name} must be a number from -2 to 2."
            )
        _check(
            self.logit_bias is None
            or (
                isinstance(self.logit_bias, Mapping)
                and all(
                    _is_count(token_id) and _is_number(bias) and abs(bias) <= MAX_BIAS
                    for token_id, bias in self.logit_bias.items()
                )
            ),
            f"logit_bias must give token ids numbers from {-MAX_BIAS:.0f} to {MAX_BIAS:.0f}.",
        )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def of_answer(self, index: int) -> Self:
        """For one of the `n` answers."""
        seed = None if self.seed is None else self.seed + index
        return replace(self, n=1, seed=seed)


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token and the natural logarithm of its probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely one token was, and what else was.

    Attributes:
        token_id: the token of the text.
        logprob: the natural logarithm of its probability.
        rank: how likely it was among all: 1 is the likeliest.
        top: the likeliest tokens in its place, the likeliest first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[Logprob, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """One whole answer.

    Attributes:
        text: without special tokens and without the stop string; empty if no tokenizer.
        token_ids: every generated token, the end-of-sequence token included.
        prompt_tokens: how many tokens the prompt had.
        finish_reason: "stop" (end of sequence, a stop token, or a stop string), "length", "abort"
            (the caller ended it), or "error".
        index: which of the `n` answers to its prompt, from 0.
        logprobs: of each of the token_ids; None unless asked for.
        prompt_logprobs: of each token of the prompt, None for the first; None unless asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason
    index: int = 0
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None


def _check(is_right: bool, sentence: str) -> None:
    if not is_right:
        raise PromptError(sentence)


def _is_number(value: object) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) <= sys.float_info.max
    return isinstance(value, float)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
