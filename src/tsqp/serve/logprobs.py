"""Probabilities of tokens, in the two forms that OpenAI has for them."""

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
    offset: int = 0,
) -> CompletionLogprobs:
    """The form of completions.

    Args:
        token_ids, tokens: of the text; None for a token without a probability.
        offset: characters before the text.
    """
    names = [name_of(llm, token_id) for token_id in token_ids]
    offsets = []
    for token_id in token_ids:
        offsets.append(offset)
        offset += characters_of(llm, token_id)
    return CompletionLogprobs(
        tokens=names,
        token_logprobs=[None if each is None else max(each.logprob, LEAST) for each in tokens],
        top_logprobs=[
            None
            if each is None
            else {name_of(llm, top.token_id): max(top.logprob, LEAST) for top in each.top}
            for each in tokens
        ],
        text_offset=offsets,
    )


def name_of(llm: AsyncLLM, token_id: int) -> str:
    """A token as text; as in OpenAI's API, `bytes:\\xe2\\x82` if it is a part of a character."""
    found = _bytes(llm, token_id)
    try:
        return found.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)


def characters_of(llm: AsyncLLM, token_id: int) -> int:
    """How many characters a token has in `text_offset`; one for a part of a character."""
    return len(_bytes(llm, token_id).decode("utf-8", "replace"))


def _bytes(llm: AsyncLLM, token_id: int) -> bytes:
    return llm.token_bytes(token_id) or f"token_id:{token_id}".encode()
