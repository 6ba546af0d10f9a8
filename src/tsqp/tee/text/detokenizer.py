"""Decodes tokens to text one at a time, always in complete characters.

The text of a sequence of tokens is that of the bytes they stand for. Bytes that belong to no
character become U+FFFD. A character of several tokens belongs to the last of them: if a prompt ends
inside a character, the answer's text begins with that character. So the prompt's text up to that
character, followed by the answer's text, is always the text of the whole sequence.

transformers decodes whole sequences, and replaces all bytes of a run of byte tokens if one of them
is invalid. This module, like SentencePiece, keeps the complete characters.
"""

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence

from tsqp.tee.text.decoding import Decoding

MAX_CHARACTER_BYTES = 4
_ESCAPED = re.compile("[\udc80-\udcff]")  # bytes that belong to no character, one each


class Detokenizer:
    """Turns an answer's tokens into text."""

    def __init__(
        self,
        decoding: Decoding,
        prompt_ids: Sequence[int] | None = (),
        names: Mapping[int, str] | None = None,
    ) -> None:
        """Begin after a prompt, whose own text is not returned.

        Args:
            names: texts for special tokens, by their id. Others give no text.
            prompt_ids: with None, the text is exactly that of the answer's own bytes. It completes
                no character of the prompt, and does not lose a space as the beginning of a text.
        """
        self._decoding = decoding
        self._first = prompt_ids is not None
        self._strip, self._strips = decoding.stripped
        if prompt_ids is None:
            self._strips = 0
        errors = "surrogateescape" if decoding.byte_by_byte else "replace"
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)
        self._names: Mapping[int, str] = {}
        for token_id in self._end(prompt_ids or ()):
            self.push(token_id)
        self._names = names or {}

    def push(self, token_id: int) -> str:
        """The text that this token completes; often empty.

        Raises:
            TokenizerError: the id is below zero, or has more than 32 bits.
        """
        found = self._decoding.bytes_of(token_id, first=self._first)
        if found is None and token_id in self._names:
            found = self._names[token_id].encode()
        if found is None:
            return ""
        self._first = False
        return self._text(self._utf8.decode(found))

    def flush(self) -> str:
        """The rest at the end: a character with missing bytes."""
        return self._text(self._utf8.decode(b"", final=True))

    def _end(self, prompt_ids: Sequence[int]) -> list[int]:
        """The last tokens of a prompt, as many as what follows can depend on.

        A character that the prompt begins has fewer than MAX_CHARACTER_BYTES bytes in it. What is
        stripped from the beginning of a text is settled by as many bytes as may be stripped, and
        one more.
        """
        wanted = MAX_CHARACTER_BYTES + self._strips * len(self._strip.encode())
        ids: list[int] = []
        for token_id in reversed(prompt_ids):
            ids.append(token_id)
            wanted -= len(self._decoding.bytes_of(token_id, first=False) or b"")
            if wanted <= 0:
                break
        return ids[::-1]

    def _text(self, text: str) -> str:
        while self._strips and text:
            if not text.startswith(self._strip):
                self._strips = 0
                break
            text = text[len(self._strip) :]
            self._strips -= 1
        return _ESCAPED.sub("\ufffd", text)


def decode(decoding: Decoding, token_ids: Iterable[int]) -> str:
    """The text of a whole sequence."""
    stream = Detokenizer(decoding)
    return "".join(stream.push(token_id) for token_id in token_ids) + stream.flush()
