"""The bytes of every token of a model, as llguidance needs them.

A grammar is about bytes. A token may come next if its bytes may, so they must be exactly those that
the detokenizer gives to the answer's text. Special tokens have no bytes: only a grammar that names
one of them allows it.
"""

from collections.abc import Collection
from functools import cached_property

from tsqp.errors import TSQPError
from tsqp.tee.text.tokenizer import Tokenizer

# Makes what follows the middle of a text: some tokenizers put a space in front of each text.
_BEFORE = "\x02"
_LONGEST = 32  # bytes of a token that is looked for


class TokenTable:
    """What `llguidance.LLTokenizer` reads of a tokenizer.

    Attributes:
        tokens: the bytes of each token id of the model; for special tokens, their name. Empty for
            ids that the tokenizer does not have, which are never chosen. One more stands for the
            end of the answer.
        special_token_ids: ids whose entry in `tokens` is a name.
        end_id: the id of that last one, which is the size of the model's vocabulary. No model
            chooses it: it is allowed wherever the answer may end.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Collection[int] = ()
    ) -> None:
        """Read every token of the model.

        Args:
            eos_token_ids: special tokens, even if the tokenizer has them as text.
        """
        self.is_tokenizer_wrapper = True  # what the library looks for
        names = {token_id: text for text, token_id in tokenizer.special_ids.items()}
        names |= {
            token_id: f"<[{token_id}]>" for token_id in eos_token_ids if token_id not in names
        }
        names = {token_id: text for token_id, text in names.items() if token_id < vocab_size}
        self._text = [
            b"" if token_id in names else tokenizer.bytes_of(token_id) or b""
            for token_id in range(vocab_size)
        ]
        self.end_id = vocab_size
        self.eos_token_id = self.end_id
        self.bos_token_id = None
        self.special_token_ids = [*sorted(names), self.end_id]
        self.tokens = [*self._text, b"<end of the answer>"]
        for token_id, text in names.items():
            self.tokens[token_id] = text.encode()
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        """The usual tokens of a text, where a grammar leaves no choice.

        They have exactly its bytes, whatever the tokenizer does to texts.
        """
        wanted = text.encode() if isinstance(text, str) else text
        plain = wanted.decode(errors="replace")
        try:
            for ids in (self._encode(plain), self._after(_BEFORE, plain)):
                if b"".join(map(self._bytes, ids)) == wanted:
                    return ids
        except TSQPError:
            pass
        return self._greedy(wanted)

    def _after(self, before: str, text: str) -> list[int]:
        """The tokens of a text that stands after another."""
        ids = self._encode(before + text)
        seen = b""
        for place, token_id in enumerate(ids):
            seen += self._bytes(token_id)
            if seen.endswith(before.encode()):
                return ids[place + 1 :]
        return []

    def _greedy(self, text: bytes) -> list[int]:
        """The longest tokens from left to right; nothing where there are none for a byte."""
        found = []
        place = 0
        while place < len(text):
            lengths = range(min(_LONGEST, len(text) - place), 0, -1)
            known = (self._ids.get(text[place : place + length]) for length in lengths)
            token_id = next((token_id for token_id in known if token_id is not None), None)
            if token_id is None:
                return []
            found.append(token_id)
            place += len(self._text[token_id])
        return found

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        return {text: token_id for token_id, text in enumerate(self._text) if text}

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _bytes(self, token_id: int) -> bytes:
        return self._text[token_id] if token_id < len(self._text) else b""
