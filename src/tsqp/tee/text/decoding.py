"""The bytes that each token stands for, so that text can be decoded token by token.

The `tokenizers` library decodes whole sequences only. For the decoders of language models a
sequence's text is the bytes of its tokens one after the other, so a token's own bytes are enough:
byte-level ("ByteLevel"), SentencePiece ("Replace", "ByteFallback", "Fuse", "Strip") and Metaspace.
Other decoders are refused by name.
"""

import json
import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import tokenizers

from tsqp.errors import TokenizerError
from tsqp.tee.text.vocabulary import rust_errors

MAX_ID = 2**32 - 1  # ids are 32-bit numbers in the library
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


@dataclass(slots=True)
class _Steps:
    """The changes that a decoder makes to each token, and to the beginning of the text."""

    byte_level: bool = False
    byte_fallback: bool = False
    joined_by: str = ""
    replaced: list[tuple[str, str]] = field(default_factory=list)
    dropped_from_first: str = ""  # a character that the first token loses wherever it stands
    stripped: tuple[str, int] = ("", 0)  # from the beginning of the text, at most this many


class Decoding:
    """The bytes of each token of a vocabulary.

    Attributes:
        byte_by_byte: each byte that belongs to no character becomes one U+FFFD, as in
            SentencePiece; if not, one for each longest beginning of a character, as in byte-level
            vocabularies.
        stripped: a character, and how many of it the beginning of a text loses.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Read the decoder's description.

        Raises:
            TokenizerError: one that cannot be applied token by token.
        """
        self._backend = backend
        self._steps = _steps(backend.decoder)
        added = backend.get_added_tokens_decoder()
        self._special = {token_id for token_id, token in added.items() if token.special}
        self._alphabet = _byte_alphabet() if self._steps.byte_level else {}
        self._known: dict[int, bytes | None] = {}
        self.byte_by_byte = self._steps.byte_fallback
        self.stripped = self._steps.stripped

    def bytes_of(self, token_id: int, *, first: bool) -> bytes | None:
        """The bytes that a token adds to a text; None for special tokens and unused ids.

        Args:
            first: no token before it has text of its own.

        Raises:
            TokenizerError: the id is below zero, or has more than 32 bits.
        """
        if first and (self._steps.dropped_from_first or self._steps.joined_by):
            return self._find(token_id, first=True)
        known = self._known.get(token_id)
        if known is None:
            known = self._find(token_id, first=False)
            if known is not None:  # ids that the vocabulary does not have would fill the memory
                self._known[token_id] = known
        return known

    def _find(self, token_id: int, *, first: bool) -> bytes | None:
        if not 0 <= token_id <= MAX_ID:
            raise TokenizerError("A token id is below zero or has more than 32 bits.")
        if token_id in self._special:
            return None
        with rust_errors("The tokenizer failed to look up a token."):
            token = self._backend.id_to_token(token_id)
        return None if token is None else self._bytes(token, first)

    def _bytes(self, token: str, first: bool) -> bytes:
        steps = self._steps
        if steps.byte_level:
            known = [self._alphabet.get(character) for character in token]
            numbers = [number for number in known if number is not None]
            return bytes(numbers) if len(numbers) == len(token) else token.encode()
        for old, new in steps.replaced:
            if first and old == steps.dropped_from_first:
                new = ""
            token = token.replace(old, new)
        if steps.byte_fallback and (found := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(found[1])
        return token.encode() if first else (steps.joined_by + token).encode()


def _steps(decoder: Any) -> _Steps:
    if decoder is None:
        return _Steps(joined_by=" ")
    with rust_errors("The tokenizer's decoder cannot be read."):
        described = json.loads(decoder.__getstate__())
    steps, fused = _Steps(), False
    listed = _flat(described)
    for step in listed:
        kind = step.get("type")
        if kind in ("ByteLevel", "Metaspace") and len(listed) > 1:
            raise _unsupported(f"{kind} among others")
        if kind == "ByteLevel":
            steps.byte_level = True
        elif kind == "Metaspace":
            steps.replaced.append((step["replacement"], " "))
            if step["prepend_scheme"] != "never":
                steps.dropped_from_first = step["replacement"]
        elif kind == "Replace" and not (steps.byte_fallback or fused):
            old = step["pattern"].get("String")
            if old is None:
                raise _unsupported("Replace with a regular expression")
            if old:  # an empty one matches nothing in the library
                steps.replaced.append((old, step["content"]))
        elif kind == "ByteFallback" and not fused:
            steps.byte_fallback = True
        elif kind == "Fuse":
            fused = True
        elif kind == "Strip" and fused and step["stop"] == 0 and not steps.stripped[1]:
            steps.stripped = step["content"], step["start"]
        else:
            raise _unsupported(str(kind))
    return steps


def _flat(described: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps of a sequence, however it is nested."""
    if described.get("type") != "Sequence":
        return [described]
    return [step for each in described["decoders"] for step in _flat(each)]


def _unsupported(kind: str) -> TokenizerError:
    return TokenizerError(
        f"The model's tokenizer has the decoder {kind[:80]!a}, which TSQP does not support: pass"
        " token ids with --prompt-ids."
    )


@cache
def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies (as in GPT-2).

    Printable bytes of Latin-1 stand for themselves, and the others, in order, for the characters
    from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + place): byte for place, byte in enumerate(others)
    }
