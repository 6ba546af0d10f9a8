"""Texts and token ids, for programs with an event loop."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from tsqp.errors import UsageError
from tsqp.runtime.async_ends import Ends
from tsqp.runtime.fair_pool import FairPool
from tsqp.runtime.loaded_model import LoadedModel

T = TypeVar("T")

CLOSED_TEXT = "This AsyncLLM is closed; make a new one."


class AsyncText:
    """The part of an `AsyncLLM` that tokenizes, in threads in which tenants take turns."""

    _model: LoadedModel
    _text: FairPool
    _ends: Ends

    async def tokenize(
        self, text: str, *, add_special_tokens: bool = True, tenant: str = ""
    ) -> list[int]:
        """The token ids of a text. Tenants take turns.

        Raises:
            TokenizerError: the model has no tokenizer.
            PromptError: the text is not valid Unicode.
        """
        tokenizer = self._model.tokenizer
        return await self._in_text_thread(
            tenant, partial(tokenizer.encode, text, add_special_tokens=add_special_tokens)
        )

    async def tokenize_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        split_special: bool = False,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        tenant: str = "",
    ) -> list[int]:
        """The token ids of a conversation, put into the model's chat template. Tenants take turns.

        Args:
            messages: `[{"role": "user", "content": "..."}, ...]`, see `LLM.chat`.
            tools: what the model may call, as JSON schemas.
            split_special: treat control tokens in messages and tools as plain text.
            add_generation_prompt: whether the text ends where an answer begins.
            continue_final_message: let the model continue the last message; not with
                `add_generation_prompt`.
            template_kwargs: further values for the template, such as `enable_thinking`.

        Raises:
            TokenizerError: the model has no chat template, or the template fails.
            PromptError: it is not a conversation, or the template refuses it.
        """
        return await self._in_text_thread(
            tenant,
            partial(
                self._model.tokenizer.encode_chat,
                messages,
                tools=tools,
                split_special=split_special,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                template_kwargs=template_kwargs,
            ),
        )

    async def detokenize(self, token_ids: Sequence[int], *, tenant: str = "") -> str:
        """The text of some token ids, special ones left out. Tenants take turns.

        Raises:
            TokenizerError: the model has no tokenizer, or an id has more than 32 bits.
        """
        return await self._in_text_thread(tenant, partial(self._model.tokenizer.decode, token_ids))

    def text_bytes(self, token_id: int) -> bytes:
        """The bytes that one token adds to a text; none for a special or unknown token."""
        tokenizer = self._model.tokenizer
        return (tokenizer.bytes_of(token_id) or b"") if tokenizer.exists else b""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; for a special token, its name.

        Empty if the vocabulary has no such token, or the model no tokenizer.
        """
        tokenizer = self._model.tokenizer
        return tokenizer.token_bytes(token_id) if tokenizer.exists else b""

    @property
    def has_tokenizer(self) -> bool:
        """Whether the model has a tokenizer that can be read."""
        return self._model.tokenizer.exists

    @property
    def special_ids(self) -> dict[str, int]:
        """The id of each special token, by its text; empty if the model has no tokenizer."""
        return self._model.tokenizer.special_ids if self.has_tokenizer else {}

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The model's chat template in Jinja, or several by name; None without one."""
        return self._model.tokenizer.chat_template_source if self.has_tokenizer else None

    async def _in_text_thread(self, tenant: str, work: Callable[[], T]) -> T:
        ends = self._ends

        def unless_closed() -> T:  # all that waits is asked at the end
            if ends.closed:
                raise UsageError(CLOSED_TEXT)
            return work()

        if ends.closed:
            raise UsageError(CLOSED_TEXT)
        return await asyncio.wrap_future(self._text.submit(tenant, unless_closed))
