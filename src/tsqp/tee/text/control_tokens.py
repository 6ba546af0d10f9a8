"""Prevents text in messages from becoming control tokens.

A chat template marks messages with control tokens such as `<|im_start|>`. Someone who writes the
same characters in a message makes the same tokens, and can pretend to be the system. With this
module, text becomes a control token only if the template wrote all of its characters.

Each control token of the template is replaced by a mark that nobody can guess. The text is then
encoded once, by a copy of the tokenizer that knows the marks but none of the control tokens. So the
rest of the text is split and encoded as usual, and text without control tokens gets the usual ids.
"""

import re
import secrets
from collections.abc import Callable, Iterable

import tokenizers
from tokenizers import AddedToken

from tsqp.errors import PromptError, TokenizerError
from tsqp.tee.text.origin import TEMPLATE, Text
from tsqp.tee.text.vocabulary import Vocabulary, rust_errors

FAILED = "The model's tokenizer failed on this text; pass token ids instead."
_WRITTEN = re.compile(f"{TEMPLATE}+")


class ControlTokens:
    """The control tokens of one model.

    These are its special tokens, and other added tokens that stand in the chat template, such as
    `<tool_call>`: what `sanitize_control_tokens` of transformers takes for control tokens.

    Args:
        vocabulary: the model's.
        template_texts: the texts that stand in the chat template.

    Raises:
        TokenizerError: the tokenizer cannot be copied.
    """

    def __init__(self, vocabulary: Vocabulary, template_texts: Iterable[str]) -> None:
        written = "\0".join(template_texts)
        added = vocabulary.backend.get_added_tokens_decoder()
        self._ids = {
            token.content: token_id
            for token_id, token in added.items()
            if token.content
            and (token.special or (token.content in written and not token.content.isspace()))
        }
        self._prepare: Callable[[str], str] = vocabulary.prepare
        unknown = (
            vocabulary.special_tokens.get("unk_token"),
            getattr(vocabulary.backend.model, "unk_token", None),
        )
        self._unknown_ids = {vocabulary.backend.token_to_id(each) for each in unknown if each}
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        # A tokenizer may take the spaces beside a token with it, so its mark has to do so, too.
        sides = {(token.lstrip, token.rstrip) for token in added.values()}
        marks = {side: f"<{secrets.token_hex(16)}>" for side in sides}
        self._marks = {token.content: marks[token.lstrip, token.rstrip] for token in added.values()}
        with rust_errors(FAILED):
            self._backend = _copy_without(vocabulary.backend, self._ids)
            for (lstrip, rstrip), mark in marks.items():
                token = AddedToken(mark, lstrip=lstrip, rstrip=rstrip, normalized=False)
                self._backend.add_tokens([token])
            self._mark_ids = {self._backend.token_to_id(mark) for mark in marks.values()}
        if self._mark_ids & {*added, *vocabulary.backend.get_vocab().values()}:
            raise TokenizerError("The ids of the model's tokenizer leave no room for others.")

    def encode(self, text: Text) -> list[int]:
        """The ids of a text that a chat template wrote.

        Raises:
            PromptError: the tokenizer makes a control token even of plain text.
            TokenizerError: the tokenizer fails on this text.
        """
        marked: list[str] = []
        control_ids: list[int] = []
        position = 0
        for run in _WRITTEN.finditer(text.origin):
            for found in self._pattern.finditer(text, run.start(), run.end()):
                marked += (text[position : found.start()], self._marks[found.group()])
                control_ids.append(self._ids[found.group()])
                position = found.end()
        marked.append(text[position:])
        begins = marked[0] == "" and self._pattern.match(text)
        with rust_errors(FAILED):
            ids = self._backend.encode(
                self._prepared("".join(marked), begins[0] if begins else ""),
                add_special_tokens=False,
            ).ids
        if set(ids) & (set(self._ids.values()) - self._unknown_ids):
            raise PromptError(
                "The model's tokenizer makes a control token of plain text in this conversation:"
                " change the text, or leave --split-special out."
            )
        left = iter(control_ids)
        ids = [next(left) if token_id in self._mark_ids else token_id for token_id in ids]
        assert next(left, None) is None
        return ids

    def _prepared(self, marked: str, first: str) -> str:
        """Apply to a text with marks what is applied to a text before it is encoded.

        Args:
            first: the control token that the text begins with, or nothing. Some get no space in
                front, which `prepare` cannot know of their marks.
        """
        text = self._prepare(marked)
        return text.removeprefix(" ") if first and self._prepare(first)[0] != " " else text


def _copy_without(backend: tokenizers.Tokenizer, tokens: Iterable[str]) -> tokenizers.Tokenizer:
    """A copy of a tokenizer that does not look for these added tokens in a text."""
    copy = tokenizers.Tokenizer.from_str(backend.to_str())
    copy.add_special_tokens([AddedToken(token, special=True) for token in tokens])
    copy.encode_special_tokens = True
    return copy
