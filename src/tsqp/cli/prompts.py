"""Where prompts come from: options, standard input, files."""

import sys
from pathlib import Path

import msgspec

from tsqp.errors import PromptError, UsageError


def read_prompts(
    texts: list[str] | None, ids_file: Path | None, chat: bool
) -> list[str] | list[list[int]]:
    """What --prompt or --prompt-ids brought."""
    if bool(texts) == bool(ids_file):
        raise UsageError("Give either --prompt or --prompt-ids.")
    if texts:
        return [_read_stdin() if text == "-" else text for text in texts]
    if chat:
        raise UsageError("--chat goes with --prompt; ids are taken as they are.")
    assert ids_file is not None
    return read_ids(ids_file)


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as exc:
        raise PromptError("Standard input is not valid UTF-8; convert the prompt first.") from exc


def read_ids(path: Path) -> list[list[int]]:
    """The prompts in a JSON file: one list of token ids, or a list of them."""
    try:
        ids = msgspec.json.decode(path.read_bytes(), type=list[int | list[int]])
    except (OSError, msgspec.DecodeError) as exc:
        raise PromptError(f"Cannot read token ids from {path}: {exc}.") from exc
    several = [each for each in ids if isinstance(each, list)]
    if several and len(several) < len(ids):
        raise PromptError(f"{path} mixes token ids and lists of them; give one list, or lists.")
    return several or [[each for each in ids if isinstance(each, int)]]
