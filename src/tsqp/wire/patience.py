"""Whether to poll before sleeping: as long as that is of use, and now and then otherwise."""


class Patience:
    """Remembers whether polling was of use. After each failure it is skipped for longer.

    It is never given up for good: what an answer takes also depends on who sleeps, and two sides
    that both sleep at once would wake each other for ever.

    Args:
        most_skipped: polling is skipped at most this many times before it is tried again.
    """

    __slots__ = ("_left", "_most_skipped", "_skipped")

    def __init__(self, most_skipped: int) -> None:
        self._most_skipped = most_skipped
        self._skipped = 0  # how many times it is skipped after the last failure
        self._left = 0

    def may_poll(self) -> bool:
        """Whether to poll this time; to be followed by `note`."""
        if self._left == 0:
            return True
        self._left -= 1
        return False

    def note(self, *, polled: bool, useful: bool) -> None:
        """Tell whether what was waited for came while it was, or could have been, polled for."""
        if useful:
            self._skipped = self._left = 0
        elif polled:
            self._skipped = self._left = min(2 * self._skipped + 1, self._most_skipped)
