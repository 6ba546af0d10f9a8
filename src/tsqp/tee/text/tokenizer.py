"""A model's tokenizer and chat template, from local files only."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

from tsqp.checkpoint import demo_model
from tsqp.checkpoint.encrypted_file import open_file
from tsqp.checkpoint.encrypted_folder import model_files
from tsqp.checkpoint.gguf_reader import GGUFHeader, read_header
from tsqp.checkpoint.model_files import ModelFiles
from tsqp.checkpoint.model_key import ModelKey
from tsqp.errors import CheckpointError, ModelError, TokenizerError
from tsqp.tee.text.chat_messages import (
    check_messages,
    check_template_kwargs,
    check_tools,
    check_unicode,
)
from tsqp.tee.text.chat_template import ChatTemplate
from tsqp.tee.text.control_tokens import ControlTokens
from tsqp.tee.text.decoding import Decoding
from tsqp.tee.text.detokenizer import Detokenizer, decode
from tsqp.tee.text.gguf_vocabulary import from_gguf
from tsqp.tee.text.hf_folder import from_folder
from tsqp.tee.text.vocabulary import Vocabulary, rust_errors


class Tokenizer:
    """A model's tokenizer and chat template.

    Never touches the network, and never runs code that comes with the model. Whatever needs the
    tokenizer raises TokenizerError if there is none, or none that can be read.

    Attributes:
        files: the files that were read from a model's folder, for a digest; None for other models.
        header_sha256: SHA-256 of a GGUF file's header, if it was read; None for other models.
    """

    def __init__(
        self,
        model: str,
        files: ModelFiles | None = None,
        header: GGUFHeader | None = None,
        key: ModelKey | None = None,
    ) -> None:
        """Read nothing yet: some runs need no text.

        Args:
            model: as for `open_checkpoint`.
            files: those of the model's folder, if something else reads them too.
            header: the header of the model's GGUF file, if it has been read.
            key: of an encrypted model.
        """
        self._model = model
        self._key = key
        self._header = header
        self.header_sha256 = None if header is None else header.sha256
        path = Path(model).expanduser()
        self.files = model_files(path, key) if files is None and path.is_dir() else files

    def use_header(self, header: GGUFHeader) -> None:
        """Take the header that the model's checkpoint has read from its GGUF file.

        Raises:
            CheckpointError: the file's header was read before, and has changed since.
        """
        if self.header_sha256 not in (None, header.sha256):
            raise CheckpointError(
                "The GGUF file has changed since its tokenizer was read: start again."
            )
        self.header_sha256 = header.sha256
        if "_vocabulary" not in self.__dict__:  # not needed any more once it is read
            self._header = header

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        if self._model.startswith("random:"):
            raise TokenizerError(
                f"{self._model} has random weights and no tokenizer: pass token ids with"
                " --prompt-ids."
            )
        try:
            if self.files is not None:
                return from_folder(self.files)
            if self._header is None:
                self.use_header(self._read_header())
            assert self._header is not None
            vocabulary = from_gguf(self._header)
        except TokenizerError:
            raise
        except ModelError as exc:
            raise TokenizerError(str(exc)) from exc
        self._header = None  # its lists of strings take as much memory as the vocabulary
        return vocabulary

    def _read_header(self) -> GGUFHeader:
        path = demo_model.locate() if self._model == "demo" else Path(self._model).expanduser()
        if path.suffix.lower() != ".gguf":
            raise TokenizerError(
                f"{path} has no tokenizer that can be read: give a model's folder or a .gguf"
                " file, or pass token ids with --prompt-ids."
            )
        with closing(open_file(path, self._key)) as file:
            return read_header(file)

    @cached_property
    def _decoding(self) -> Decoding:
        return Decoding(self._vocabulary.backend)

    @cached_property
    def exists(self) -> bool:
        """Whether the model has a tokenizer that can be read."""
        try:
            return self._decoding is not None
        except TokenizerError:
            return False

    def preload(self) -> None:
        """Read the tokenizer now. If there is none, the error comes when it is needed."""
        _ = self.exists

    @property
    def special_tokens(self) -> dict[str, str]:
        """The text of each token that has a name, such as "bos_token" and "eos_token"."""
        return dict(self._vocabulary.special_tokens)

    @property
    def chat_template_source(self) -> str | dict[str, str] | None:
        """The model's chat template in Jinja, or several by name; None if there is none."""
        return self._vocabulary.chat_template

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text.

        Args:
            add_special_tokens: whether to add the beginning and end tokens that the model asks for.

        Raises:
            PromptError: the text is not valid Unicode.
            TokenizerError: the tokenizer fails on this text.
        """
        check_unicode(text)
        vocabulary = self._vocabulary
        with rust_errors("The model's tokenizer failed on this text; pass token ids instead."):
            prepared = vocabulary.prepare(text)
            return vocabulary.backend.encode(prepared, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of some tokens, special ones left out.

        Raises:
            TokenizerError: an id is below zero, or has more than 32 bits.
        """
        return decode(self._decoding, token_ids)

    def bytes_of(self, token_id: int) -> bytes | None:
        """The bytes that a token adds to a text that has begun; None for special and unused ids.

        Raises:
            TokenizerError: the id is below zero, or has more than 32 bits.
        """
        return self._decoding.bytes_of(token_id, first=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for; for a special token, its name.

        Empty if the vocabulary has no such token.

        Raises:
            TokenizerError: the id is below zero, or has more than 32 bits.
        """
        found = self.bytes_of(token_id)
        if found is not None:
            return found
        return (self._vocabulary.backend.id_to_token(token_id) or "").encode()

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """The id of each special token, by its text. These tokens have no bytes in a text."""
        added = self._vocabulary.backend.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in added.items() if token.special}

    def detokenizer(
        self, prompt_ids: Sequence[int] | None = (), *, skip_special_tokens: bool = True
    ) -> Detokenizer:
        """A detokenizer for the tokens after a prompt; None: see `Detokenizer`."""
        names = None
        if not skip_special_tokens:
            names = {token_id: text for text, token_id in self.special_ids.items()}
        return Detokenizer(self._decoding, prompt_ids, names)

    def check_chat(self) -> None:
        """Read the tokenizer now, and check that it has a chat template.

        Raises:
            TokenizerError: there is none, or none that can be used.
        """
        _ = self._chat_template

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        split_special: bool = False,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The token ids of a conversation, put into the model's chat template.

        The text ends where the assistant's answer begins, unless the arguments say otherwise.

        Args:
            messages: see `check_messages`.
            tools: what the model may call, as JSON schemas.
            split_special: treat control tokens in messages and tools as plain text.
            add_generation_prompt, continue_final_message, template_kwargs: see
                `ChatTemplate.render`.

        Raises:
            TokenizerError: there is no template, or it cannot be used.
            PromptError: it is not a conversation, or the template refuses it.
        """
        text = self._chat_template.render(
            check_messages(messages),
            tools=check_tools(tools),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **check_template_kwargs(template_kwargs),
        )
        if split_special:
            return self._control_tokens.encode(text)
        return self.encode(text, add_special_tokens=False)

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        source = self.chat_template_source
        if not source:
            raise TokenizerError(
                "The model's tokenizer has no chat template: send a plain prompt instead."
            )
        return ChatTemplate(source, self.special_tokens)

    @cached_property
    def _control_tokens(self) -> ControlTokens:
        return ControlTokens(self._vocabulary, self._chat_template.texts)
