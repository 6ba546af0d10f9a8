"""An answer's text as it grows, up to a stop string."""

from collections.abc import Sequence

from tsqp.tee.text.tokenizer import Tokenizer


class TextStream:
    """Turns tokens into text that is final.

    Text that may be the beginning of a stop string is held back until this is certain.

    Attributes:
        text: everything released so far.
        stopped: a stop string has appeared; no more text comes.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_strings: Sequence[str],
        prompt_ids: Sequence[int] | None = (),
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        self._detokenizer = tokenizer.detokenizer(
            prompt_ids, skip_special_tokens=skip_special_tokens
        )
        self._stop_strings = stop_strings
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """Take one token; return the text it releases.

        Args:
            may_stop: whether to look for a stop string in the text so far that is still held; if
                not, it is released.
        """
        self._held += self._detokenizer.push(token_id)
        return self._release(at_end=False) if may_stop else self._let_go(len(self._held))

    def finish(self) -> str:
        """Return the text that was held back, unless a stop string appeared."""
        self._held += self._detokenizer.flush()
        return self._release(at_end=True)

    def _release(self, at_end: bool) -> str:
        if self.stopped:
            self._held = ""
            return ""
        found = [at for stop in self._stop_strings if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            end = min(found)
        else:
            end = len(self._held) - (0 if at_end else self._possible_stop())
        return self._let_go(end)

    def _let_go(self, end: int) -> str:
        released, self._held = self._held[:end], self._held[end:]
        self.text += released
        return released

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        return max(
            (
                length
                for stop in self._stop_strings
                for length in range(1, min(len(stop), len(self._held) + 1))
                if self._held.endswith(stop[:length])
            ),
            default=0,
        )
