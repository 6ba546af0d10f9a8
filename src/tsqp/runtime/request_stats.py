"""What can be counted of a request without its content."""

from dataclasses import dataclass
from typing import Protocol

from tsqp.tee.sampling import FinishReason


@dataclass(frozen=True, slots=True)
class RequestStats:
    """How one request went; nothing in it is content.

    Attributes:
        finish_reasons: of each of its answers; "abort" for those that the caller gave up, "error"
            for those that failed.
        prompt_tokens, completion_tokens, cached_tokens: see `Usage`.
        queue_s: seconds from its arrival until it ran; None if it never did.
        prefill_s: from then to its first token; None without a token.
        decode_s: from the first to the last token of all its answers.
        e2e_s: from its arrival to its end.
    """

    finish_reasons: tuple[FinishReason, ...]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    queue_s: float | None
    prefill_s: float | None
    decode_s: float | None
    e2e_s: float


class RequestObserver(Protocol):
    """Is told of the progress of requests, by the thread that computes."""

    def first_token(self, seconds: float) -> None:
        """A request has its first token, so long after its arrival."""

    def next_token(self, seconds: float) -> None:
        """An answer has a further token, so long after the last one."""

    def ended(self, stats: RequestStats) -> None:
        """A request that the engine took has ended, in whatever way."""
