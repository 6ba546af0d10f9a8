"""A handle to one conversation."""

from collections.abc import Callable
from types import TracebackType
from typing import Self


class Conversation:
    """Answers of one conversation begin with the keys and values of those before.

    `LLM.conversation` makes one, and `LLM.chat` takes it. Nothing is shared between two
    conversations: otherwise the time of an answer would tell how far both texts agree. An LLM keeps
    the keys and values of one conversation at a time, the last that was answered.
    """

    def __init__(self, forget: Callable[["Conversation"], None]) -> None:
        self._forget = forget

    def close(self) -> None:
        """Free what is kept; safe to call twice."""
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
