"""Sampling parameters and completions."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, Self, TypeVar

from tsqp.errors import PromptError
from tsqp.tee.structured_outputs import StructuredOutputsParams
from tsqp.tee.values import as_bool, as_integer, as_key, as_list, as_number, type_of

T = TypeVar("T")

MAX_SEED = 2**64

FinishReason = Literal["stop", "length", "abort", "error"]
MAX_BIAS = 100.0


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters of a request, with vLLM's names and defaults.

    Numbers may be Python or numpy numbers, or arrays and tensors without dimensions. Sequences may
    be a list, a tuple, a range, or a one-dimensional array or tensor. The attributes always hold
    Python types: an integer, a float, a tuple, a dict. A bool or 16.0 is not an integer here.

    The logits of a token go through `logit_bias`, `repetition_penalty`, `frequency_penalty` and
    `presence_penalty`, then `structured_outputs`, then `temperature`, then `top_k`, `top_p` and
    `min_p`, as in transformers.

    Attributes:
        temperature: randomness of sampling. 0 picks the likeliest token; otherwise probabilities
            are softmax(logits / temperature).
        top_p: keep the fewest likeliest tokens whose probabilities add up to at least this.
        top_k: keep this many likeliest tokens, before `top_p`; 0 or -1 keeps all.
        max_tokens: maximum number of tokens to generate.
        stop: one or several strings that end the answer, or None. The answer does not contain them.
        seed: makes the answer reproducible; None draws a seed from the system.
        ignore_eos: continue after the model's end-of-sequence token.
        n: number of answers to each prompt. Answer i equals that of a request with `seed` + i. Each
            answer computes the prompt again.
        min_p: of the remaining tokens, keep those whose probability is at least this fraction of
            the likeliest token's.
        repetition_penalty: divides the positive logits of every token that appears in the prompt or
            the answer so far, and multiplies the negative ones; 1 is off.
        presence_penalty: subtracted from the logit of every token that appears in the answer so
            far; the prompt does not count. From -2 to 2.
        frequency_penalty: subtracted once for each time that a token appears in the answer so far.
        logit_bias: values from -100 to 100 to add to the logits of the given token ids. An id may
            be a string of digits, like the keys of JSON objects.
        logprobs: give the log-probability of each token of the answer, and of this many likeliest
            tokens; None for none. They describe the model's own distribution, before any of the
            above is applied, as in vLLM.
        prompt_logprobs: the same for each token of the prompt except the first.
        stop_token_ids: tokens that end the answer, besides the model's end-of-sequence token. Like
            that token, they appear in `token_ids` and not in `text`.
        min_tokens: minimum number of tokens before a stop token, the end-of-sequence token or a
            stop string may end the answer. An answer that no token may follow, because of
            `structured_outputs`, ends before.
        structured_outputs: the form that the answer must have. Tokens that do not fit it are never
            chosen, and the answer ends when it is complete.
        skip_special_tokens: leave special tokens out of the text. The token that ends the answer is
            never in the text.

    Raises:
        PromptError: a value is out of range or has the wrong type; the message does not show it.
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
    structured_outputs: StructuredOutputsParams | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for each in fields(self):
            own = _OWN.get(each.name)
            value = getattr(self, each.name)
            if own is not None and value is not each.default:
                object.__setattr__(self, each.name, own(each.name, value))
        _check(0 <= self.temperature < math.inf, "temperature must be a finite number, 0 or more.")
        _check(0 < self.top_p <= 1, "top_p must be above 0 and at most 1.")
        _check(self.top_k >= -1, "top_k must be how many tokens to keep, or 0 for all.")
        _check(0 <= self.min_p <= 1, "min_p must be a number from 0 to 1.")
        _check(
            self.seed is None or abs(self.seed) < MAX_SEED,
            "The seed must be an integer between -2^64 and 2^64, or None.",
        )
        self._check_lengths()
        self._check_penalties()

    def _check_lengths(self) -> None:
        _check(self.max_tokens >= 1, "max_tokens must be 1 or more.")
        _check(0 <= self.min_tokens <= self.max_tokens, "min_tokens must be from 0 to max_tokens.")
        _check(all(self.stop_strings), "Each stop string must have at least one character.")
        _check(
            all(token_id >= 0 for token_id in self.stop_token_ids or ()),
            "Each of the stop_token_ids must be 0 or more.",
        )
        _check(self.n >= 1, "n must be 1 or more.")
        _check(
            self.n == 1 or self.temperature > 0,
            "At temperature 0 all answers are the same: leave n at 1, or set a temperature.",
        )
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            _check(
                count is None or count >= 0,
                f"{name} must be how many tokens to give, 0 or more, or None.",
            )

    def _check_penalties(self) -> None:
        _check(
            0 < self.repetition_penalty < math.inf,
            "repetition_penalty must be a finite number above 0, and 1 for none.",
        )
        for name, penalty in (
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
        ):
            _check(-2 <= penalty <= 2, f"{name} must be a number from -2 to 2.")
        _check(
            all(
                token_id >= 0 and abs(bias) <= MAX_BIAS
                for token_id, bias in (self.logit_bias or {}).items()
            ),
            f"logit_bias must give token ids numbers from {-MAX_BIAS:.0f} to {MAX_BIAS:.0f}.",
        )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def of_answer(self, index: int) -> Self:
        """The parameters for one of the `n` answers."""
        seed = None if self.seed is None else self.seed + index
        return replace(self, n=1, seed=seed)


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token and the natural logarithm of its probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The probability of one token, and of the likeliest tokens in its place.

    Attributes:
        token_id: the token of the text.
        logprob: the natural logarithm of its probability.
        rank: its rank among all tokens by probability; 1 is the likeliest.
        top: the likeliest tokens in its place, the likeliest first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[Logprob, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """One complete answer.

    Attributes:
        text: the answer without the stop string, and without special tokens unless requested; empty
            without a tokenizer.
        token_ids: every generated token, including the end-of-sequence token.
        prompt_tokens: number of tokens in the prompt.
        finish_reason: "stop" (end of sequence, a stop token, or a stop string), "length", "abort"
            (the caller ended it), or "error".
        index: which of the `n` answers to its prompt, from 0.
        logprobs: one for each of the `token_ids`; None unless requested.
        prompt_logprobs: one for each token of the prompt, where the first is None; None unless
            requested.
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


def _integer(name: str, value: object) -> int:
    return _own(as_integer(value), name, "an integer", value)


def _number(name: str, value: object) -> float:
    return _own(as_number(value), name, "a number", value)


def _bool(name: str, value: object) -> bool:
    return _own(as_bool(value), name, "True or False", value)


def _strings(name: str, value: object) -> str | tuple[str, ...]:
    if isinstance(value, str):
        return str(value)
    items = _own(as_list(value), name, "a string or a list of strings", value)
    for item in items:
        _own(item if isinstance(item, str) else None, f"Each {name}", "a string", item)
    return tuple(map(str, items))


def _integers(name: str, value: object) -> tuple[int, ...]:
    items = _own(as_list(value), name, "a list of integers", value)
    return tuple(_integer(f"Each of the {name}", item) for item in items)


def _bias(name: str, value: object) -> dict[int, float]:
    own: dict[int, float] = {}
    for key, bias in _own(
        value if isinstance(value, Mapping) else None,
        name,
        "a dict of token ids and numbers",
        value,
    ).items():
        token_id = _own(as_key(key), f"Each key of {name}", "a token id", key)
        _check(token_id not in own, f"{name} has a token id twice, as a number and as a string.")
        own[token_id] = _number(f"Each value of {name}", bias)
    return own


def _own(own: T | None, name: str, wanted: str, value: object) -> T:
    """Return `own`; if it is None, raise an error that does not show the value."""
    if own is None:
        raise PromptError(f"{name} must be {wanted}, not {type_of(value)}.")
    return own


def _structured_outputs(name: str, value: object) -> StructuredOutputsParams:
    own = value if isinstance(value, StructuredOutputsParams) else None
    return _own(own, name, "StructuredOutputsParams", value)


_OWN: dict[str, Callable[[str, object], object]] = {
    "temperature": _number,
    "top_p": _number,
    "top_k": _integer,
    "max_tokens": _integer,
    "stop": _strings,
    "seed": _integer,
    "ignore_eos": _bool,
    "n": _integer,
    "min_p": _number,
    "repetition_penalty": _number,
    "presence_penalty": _number,
    "frequency_penalty": _number,
    "logit_bias": _bias,
    "logprobs": _integer,
    "prompt_logprobs": _integer,
    "stop_token_ids": _integers,
    "min_tokens": _integer,
    "structured_outputs": _structured_outputs,
    "skip_special_tokens": _bool,
}
