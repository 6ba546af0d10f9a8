"""Reads prompts from options, standard input and files."""

import codecs
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from tsqp.errors import PromptError, UsageError, printable_path

if TYPE_CHECKING:
    from tsqp import LLM

Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Prompts:
    """Either texts and conversations, or token ids."""

    texts: Sequence[str | Messages] = ()
    ids: Sequence[list[int]] = ()

    def are_conversations(self, chat: bool) -> bool:
        """Whether the chat template is applied to all of them."""
        return not self.ids and (chat or not any(isinstance(each, str) for each in self.texts))

    def encode(self, llm: "LLM", chat: bool, split_special: bool = False) -> list[list[int]]:
        """The token ids of each prompt. With `chat`, each text is the first message of a chat."""
        texts = (llm.tokenize(each, chat=chat, split_special=split_special) for each in self.texts)
        return [*self.ids, *texts]


def read_prompts(
    texts: list[str] | None, ids_file: Path | None, file: Path | None, chat: bool
) -> Prompts:
    """The prompts given by --prompt, --prompt-ids or --prompts."""
    if sum(map(bool, (texts, ids_file, file))) != 1:
        raise UsageError("Give either --prompt or --prompt-ids or --prompts.")
    if texts:
        return Prompts(texts=[_read_stdin() if text == "-" else text for text in texts])
    if file is not None:
        return Prompts(texts=read_texts(file))
    if chat:
        raise UsageError(
            "--chat works only with --prompt and --prompts; token ids are used as they are."
        )
    assert ids_file is not None
    return Prompts(ids=read_ids(ids_file))


def _read_stdin() -> str:
    with suppress(UnicodeDecodeError):  # holds the prompt, so it must not become a cause
        return sys.stdin.read()
    raise PromptError("Standard input is not valid UTF-8; convert the prompt first.")


def read_ids(path: Path) -> list[list[int]]:
    """The prompts in a JSON file: one list of token ids, or a list of them."""
    try:
        ids = msgspec.json.decode(path.read_bytes(), type=list[int | list[int]])
    except (OSError, msgspec.DecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise PromptError(f"Cannot read token ids from {printable_path(path)}: {reason}.") from exc
    several = [each for each in ids if isinstance(each, list)]
    if several and len(several) < len(ids):
        raise PromptError(f"{path} mixes token ids and lists of them; give one list, or lists.")
    return several or [[each for each in ids if isinstance(each, int)]]


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    prompt: str | None = None
    messages: list[dict[str, Any]] = []


def read_texts(path: Path) -> list[str | Messages]:
    """The prompts of a .txt file, one a line, or of a .jsonl file, one object a line.

    An object is {"prompt": "..."} or {"messages": [{"role": "...", "content": "..."}, ...]}; for
    messages, see `check_messages`. Empty lines are ignored.

    Raises:
        PromptError: the file cannot be read or has no prompts, or a line is wrong. The message
            gives the number of the line.
    """
    if path.suffix not in (".txt", ".jsonl"):
        name = printable_path(path, "--prompts")
        raise PromptError(f"{name} must be a .txt file with one prompt a line, or a .jsonl file.")
    decode: Callable[[bytes], str | Messages] = bytes.decode
    if path.suffix == ".jsonl":
        decode = _from_json
    prompts: list[str | Messages] = []
    for number, line in _lines(path):
        reason = ""
        try:
            prompts.append(decode(line))
        except UnicodeDecodeError:
            reason = "this is not valid UTF-8"
        except msgspec.DecodeError as exc:
            reason = _reason(exc)
        except RecursionError:
            reason = "this is nested too deep"
        except PromptError as exc:
            reason = str(exc).removesuffix(".")
        if reason:  # raised outside the except block: a cause would hold the line
            raise PromptError(f"{path}, line {number}: {reason}.")
    if not prompts:
        raise PromptError(f"{path} holds no prompts; write one a line.")
    return prompts


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        content = path.read_bytes()
    except OSError as exc:
        raise PromptError(
            f"Cannot read prompts from {printable_path(path)}: {exc.strerror}."
        ) from exc
    lines = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    return ((n, line.removesuffix(b"\r")) for n, line in enumerate(lines, 1) if line.strip())


def _reason(error: msgspec.DecodeError) -> str:
    """The fault, without quoting the prompt."""
    if "unknown field" in str(error):
        return 'an object has either "prompt" or "messages", and no other key'
    return str(error)


def _from_json(line: bytes) -> str | Messages:
    decoded = msgspec.json.decode(line, type=_Line)
    if (decoded.prompt is None) == (not decoded.messages):
        raise msgspec.DecodeError('an object needs either a "prompt" or "messages"')
    if decoded.prompt is not None:
        return decoded.prompt
    from tsqp.tee.text.chat_messages import check_messages  # its imports take a while

    return check_messages(decoded.messages)
