"""A handle to one conversation."""

from collections.abc import Callable
from types import TracebackType
from typing import Self


class Conversation:
    """Identifies a conversation, whose answers reuse the keys and values of earlier answers.

    `LLM.conversation` makes one, and `LLM.chat` takes it. Conversations share nothing with each
    other: otherwise the time of an answer would reveal how much of two texts agrees. An LLM keeps
    the keys and values of one conversation at a time, the last one that it answered.
    """

    def __init__(self, forget: Callable[["Conversation"], None]) -> None:
        self._forget = forget

    def close(self) -> None:
        """Free the keys and values that are kept; safe to call twice."""
        self._forget(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
