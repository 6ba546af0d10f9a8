"""Text to token ids and back, through transformers, from local files only."""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from tsqp.errors import PromptError, TokenizerError
from tsqp.model import demo

CONTEXT_TOKENS = 6  # tokens of the prompt that the first ones of an answer are decoded after
MAX_WAITING = 32  # tokens without text after which no more is waited for: no character is as long
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
_REPLACEMENT = "\ufffd"  # what an incomplete character decodes to


class Tokenizer:
    """A model's tokenizer and chat template.

    Never touches the network and never runs code that comes with the model. Whatever needs the
    tokenizer raises TokenizerError if there is none, or none that can be read.
    """

    def __init__(self, model: str) -> None:
        """Read nothing yet: that takes seconds, and some runs need no text.

        Args:
            model: as for `open_checkpoint`.
        """
        self._model = model

    @cached_property
    def _tokenizer(self) -> Any:
        if self._model.startswith("random:"):
            raise TokenizerError(
                f"{self._model} has random weights and no tokenizer: pass token ids with"
                " --prompt-ids."
            )
        path = demo.locate() if self._model == "demo" else Path(self._model).expanduser()
        try:
            with _quiet():
                tokenizer = _read(path)
        except Exception as exc:  # transformers raises whatever its readers meet
            raise TokenizerError(
                f"{path} has no tokenizer that can be read: add its tokenizer files, or pass"
                " token ids with --prompt-ids."
            ) from exc
        tokenizer.model_max_length = 2**31  # the engine checks lengths; this one only warns
        return tokenizer

    @cached_property
    def exists(self) -> bool:
        """Whether the model has a tokenizer that can be read."""
        try:
            return self._tokenizer is not None
        except TokenizerError:
            return False

    def preload(self) -> None:
        """Read it now; if there is none, that shows when it is needed."""
        _ = self.exists

    def encode(self, text: str) -> list[int]:
        """Token ids as transformers gives them, with the beginning token where it adds one.

        Raises:
            PromptError: the text is not valid Unicode.
        """
        _check_unicode(text)
        return list(self._tokenizer(text)["input_ids"])

    def check_chat(self) -> None:
        """Read it now, and find a chat template.

        Raises:
            TokenizerError: there is none.
        """
        if not self._tokenizer.chat_template:
            raise TokenizerError(
                "The model's tokenizer has no chat template: send a plain prompt instead."
            )

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Messages of "role" and "content", put into the model's chat template.

        The template ends where the assistant's answer begins.

        Raises:
            TokenizerError: there is no template, or it refuses these messages.
            PromptError: a message is none, or its content is not valid Unicode.
        """
        for message in messages:
            if not isinstance(message, Mapping):
                raise PromptError('A conversation must be a list of {"role": ..., "content": ...}.')
            _check_unicode(message.get("content", ""))
        self.check_chat()
        try:
            ids = self._tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except Exception as exc:  # the template is a program of the model's author
            raise TokenizerError(
                "The model's chat template does not accept these messages: check their roles and"
                " order."
            ) from exc
        return list(ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of some tokens, special ones left out."""
        text: str = self._tokenizer.decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


class Detokenizer:
    """Text as it comes, one token at a time, only ever in whole characters."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # The last tokens that gave text, which the next ones are decoded after: whether a word
        # starts with a space depends on what is before it.
        self._context = list(prompt_ids[-CONTEXT_TOKENS:])
        self._waiting: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this token completes; often empty."""
        self._waiting.append(token_id)
        text = self._decode_waiting()
        incomplete = not text or text.endswith(_REPLACEMENT)
        if incomplete and len(self._waiting) < MAX_WAITING:
            return ""
        self._context, self._waiting = self._waiting, []
        return text

    def flush(self) -> str:
        """What is left at the end, incomplete characters included."""
        text = self._decode_waiting()
        self._context, self._waiting = self._waiting, []
        return text

    def _decode_waiting(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._waiting)[len(before) :]


def _check_unicode(text: object) -> None:
    if not isinstance(text, str):
        raise PromptError("The content of each message must be one text; join its parts first.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PromptError(
            "The prompt is not valid Unicode text: it holds half of a surrogate pair, or bytes "
            "that are not UTF-8; correct its encoding."
        ) from None


def _read(path: Path) -> Any:
    if path.suffix.lower() == ".gguf" and path.is_file():
        from transformers import PreTrainedTokenizerFast

        # AutoTokenizer would parse the whole file a second time for a config: four seconds.
        return PreTrainedTokenizerFast.from_pretrained(
            str(path.parent), gguf_file=path.name, local_files_only=True
        )
    # Without a folder transformers would take the name for one on its hub, and without files in it
    # makes an empty tokenizer of some families.
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise FileNotFoundError(path)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' remarks on its own files from the user's terminal."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
