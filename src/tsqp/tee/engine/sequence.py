"""One request's state, from the prompt to the answer.

Shape suffixes: R rows of logits; V vocabulary.
"""

import math
from collections.abc import Hashable, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tsqp.errors import TSQPError
from tsqp.nn.ops import ATTENTION_BLOCK
from tsqp.tee.engine.shared_prompt import SharedPrompt
from tsqp.tee.logprobs import rate
from tsqp.tee.sampler import Sampler
from tsqp.tee.sampling import Completion, FinishReason, SamplingParams, TokenLogprobs
from tsqp.tee.text.text_stream import TextStream


@dataclass(slots=True, eq=False)
class Sequence:
    """The state of one request in the engine."""

    id: int
    params: SamplingParams
    token_ids: list[int]  # the prompt, then what was generated
    prompt_tokens: int
    capacity: int  # tokens, prompt included, at which it ends
    ending_ids: Set[int]  # tokens after which it ends
    sampler: Sampler
    stream: TextStream | None
    kv_id: int  # under which the offload has its KV
    tenant: str = ""
    scope: Hashable = None  # whose sequences may reuse its KV; None if none may
    shared: SharedPrompt | None = None
    computed: int = 0  # tokens whose KV is in the cache
    cached_tokens: int = 0  # of the prompt, those whose KV was reused
    served: int = 0  # the last step that computed a part of its prompt, see `Scheduler`
    restarts: int = 0  # how often its worker was lost
    admitted_at: float | None = None  # when it first began to run, by time.monotonic
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=lambda: [None])

    @property
    def generated(self) -> int:
        """Number of tokens of the answer so far."""
        return len(self.token_ids) - self.prompt_tokens

    @property
    def remaining(self) -> int:
        """Known tokens that have yet to be computed."""
        return len(self.token_ids) - self.computed

    @property
    def in_prompt(self) -> bool:
        """Whether the next token to be computed is one of the prompt's."""
        return self.computed < self.prompt_tokens

    @property
    def decodes(self) -> bool:
        """Whether all that it computes next is the last token that was chosen."""
        return self.remaining == 1 and not self.in_prompt

    @property
    def must_wait(self) -> bool:
        """Whether another sequence is computing its prompt."""
        return self.shared is not None and self.shared.is_computed_by_another(self)

    @property
    def rates_prompt(self) -> bool:
        """Whether it needs the logits of the next tokens, to rate the prompt."""
        return self.in_prompt and self.params.prompt_logprobs is not None

    def rate_prompt(self, logits_RV: Tensor) -> None:
        """Take the logits of the next R tokens of the prompt."""
        count = self.params.prompt_logprobs
        assert count is not None
        first = self.computed + 1
        known = self.token_ids[first : min(first + len(logits_RV), self.prompt_tokens)]
        rows_RV = logits_RV[: len(known)]  # without the rows of the answer
        self.prompt_logprobs += rate(rows_RV, torch.tensor(known, dtype=torch.int64), count)

    def restart(self) -> None:
        """Compute everything again with new KV. The tokens chosen so far are kept."""
        self.kv_id, self.computed = self.id, 0
        self.prompt_logprobs = [None]
        if self.shared is not None:
            self.shared.leave(self)

    def choose(self, logits_V: Tensor) -> int:
        """Choose the next token."""
        token_id = self.sampler.sample(logits_V)
        if self.params.logprobs is not None:
            self.logprobs += rate(logits_V[None], torch.tensor([token_id]), self.params.logprobs)
        self.token_ids.append(token_id)
        return token_id

    def read(self) -> tuple[str, FinishReason | None]:
        """The text that the last token completed, and the finish reason if it ends the answer."""
        token_id, stream = self.token_ids[-1], self.stream
        if token_id in self.ending_ids:
            return "", "stop"
        text = ""
        if stream:
            text = stream.push(token_id, may_stop=self.generated > self.params.min_tokens)
            if stream.stopped:
                return text, "stop"
        if self.sampler.is_complete:
            return text, "stop"
        return text, "length" if len(self.token_ids) >= self.capacity else None

    def output(self, text: str, completion: Completion | None = None) -> "Output":
        """What the step added that chose the last token."""
        is_first = self.generated == 1 and self.params.prompt_logprobs is not None
        return Output(
            self.id,
            self.token_ids[-1],
            text,
            completion,
            logprobs=self.logprobs[-1] if self.logprobs else None,
            admitted_at=self.admitted_at,
            cached_tokens=self.cached_tokens,
            prompt_logprobs=tuple(self.prompt_logprobs) if is_first else None,
        )

    def complete(self, reason: FinishReason) -> tuple[str, Completion]:
        """The text that was still held back, and the complete answer."""
        text = self.stream.finish() if self.stream else ""
        params = self.params
        return text, Completion(
            text=self.stream.text if self.stream else "",
            token_ids=tuple(self.token_ids[self.prompt_tokens :]),
            prompt_tokens=self.prompt_tokens,
            finish_reason=reason,
            logprobs=None if params.logprobs is None else tuple(self.logprobs),
            prompt_logprobs=None if params.prompt_logprobs is None else tuple(self.prompt_logprobs),
        )


@dataclass(frozen=True, slots=True)
class Output:
    """The result of one step for one sequence.

    Attributes:
        sequence: its id.
        token_id: the token that was chosen; None if the sequence was ended before one.
        text: the new text, which may be empty.
        completion: the whole answer, if it has ended.
        error: why there will be no answer. The sequence has ended, and the other fields are empty.
        logprobs: of the token; None unless requested.
        admitted_at: when the sequence first began to run, by time.monotonic.
        cached_tokens: number of prompt tokens whose keys and values were reused. What an answer
            shares with others of the same request does not count.
        prompt_logprobs: of the prompt, with the first token; None unless requested.
    """

    sequence: int
    token_id: int | None = None
    text: str = ""
    completion: Completion | None = None
    error: TSQPError | None = None
    logprobs: TokenLogprobs | None = None
    admitted_at: float | None = None
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """`length` tokens of a sequence, from position `start` on."""

    sequence: Sequence
    start: int
    length: int

    @property
    def ends_known_tokens(self) -> bool:
        """Whether the token after this chunk is the next to be chosen."""
        return self.start + self.length == len(self.sequence.token_ids)

    @property
    def decodes(self) -> bool:
        """Whether it is the one token that was chosen last."""
        return self.length == 1 and self.start >= self.sequence.prompt_tokens

    def split(self, parts: int) -> list["Chunk"]:
        """Divide it into at most this many chunks; attention is computed in the same blocks."""
        step = ATTENTION_BLOCK * math.ceil(self.length / parts / ATTENTION_BLOCK)
        return [
            Chunk(self.sequence, self.start + first, min(step, self.length - first))
            for first in range(0, self.length, step)
        ]

    @property
    def wanted(self) -> range:
        """Which of its tokens need logits: all, the last one, or none."""
        sequence = self.sequence
        if sequence.params.prompt_logprobs is not None and self.start < sequence.prompt_tokens:
            return range(self.length)
        return range(self.length - self.ends_known_tokens, self.length)
