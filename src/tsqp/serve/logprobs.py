"""Probabilities of tokens, in the two forms that OpenAI has for them."""

import codecs
from collections.abc import Iterable, Sequence

from tsqp.api.chat import ChatLogprobs, TokenLogprob, TopLogprob
from tsqp.api.completions import CompletionLogprobs
from tsqp.runtime.async_llm import AsyncLLM
from tsqp.tee.sampling import TokenLogprobs

LEAST = -9999.0  # JSON has no minus infinity


def chat_logprobs(llm: AsyncLLM, tokens: Iterable[TokenLogprobs]) -> ChatLogprobs:
    """The form of chats."""

    def named(token_id: int, logprob: float) -> TopLogprob:
        name = _bytes(llm, token_id)
        return TopLogprob(
            token=name.decode("utf-8", "replace"),
            logprob=max(logprob, LEAST),
            bytes=list(name),
        )

    return ChatLogprobs(
        content=[
            TokenLogprob(
                **named(each.token_id, each.logprob).model_dump(),
                top_logprobs=[named(top.token_id, top.logprob) for top in each.top],
            )
            for each in tokens
        ]
    )


def completion_logprobs(
    llm: AsyncLLM,
    token_ids: Sequence[int],
    tokens: Sequence[TokenLogprobs | None],
    offsets: "TextOffsets",
) -> CompletionLogprobs:
    """The form of completions.

    Args:
        token_ids, tokens: of the text; None for a token without a probability.
        offsets: of the answer to which the tokens belong.
    """
    return CompletionLogprobs(
        tokens=[name_of(llm, token_id) for token_id in token_ids],
        token_logprobs=[None if each is None else max(each.logprob, LEAST) for each in tokens],
        top_logprobs=[None if each is None else _best(llm, each) for each in tokens],
        text_offset=[offsets.add(token_id) for token_id in token_ids],
    )


def name_of(llm: AsyncLLM, token_id: int) -> str:
    """A token as text; as in OpenAI's API, `bytes:\\xe2\\x82` if it is a part of a character."""
    found = _bytes(llm, token_id)
    try:
        return found.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)


class TextOffsets:
    """Where the tokens of one text begin in it, in characters."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0

    def add(self, token_id: int) -> int:
        """The place of the next token."""
        at = self._length
        self._length += len(self._characters.decode(self._llm.text_bytes(token_id)))
        return at


def _best(llm: AsyncLLM, token: TokenLogprobs) -> dict[str, float]:
    """The likeliest tokens and the chosen one; of two with one name, the likelier."""
    found: dict[str, float] = {}
    for token_id, logprob in [
        *((top.token_id, top.logprob) for top in token.top),
        (token.token_id, token.logprob),
    ]:
        found.setdefault(name_of(llm, token_id), max(logprob, LEAST))
    return found


def _bytes(llm: AsyncLLM, token_id: int) -> bytes:
    return llm.token_bytes(token_id) or f"token_id:{token_id}".encode()
