"""The settings file: TOML whose keys are option names. Flags and variables override it."""

import re
import tomllib
from pathlib import Path

import typer
from typer.core import TyperGroup

from tsqp.errors import UsageError, printable_path


def read_settings(context: typer.Context, path: Path | None) -> Path | None:
    """Use the values of the settings file as the defaults of every command's options.

    Raises:
        UsageError: the file cannot be read, or sets an option that no command has.
    """
    if path is None:
        return None
    try:
        settings = tomllib.loads(path.read_text())
    except (OSError, ValueError) as exc:
        raise UsageError(
            f"Cannot read the settings file {printable_path(path)}: {_reason(exc)}."
        ) from None
    assert isinstance(context.command, TyperGroup)
    shared = {key: value for key, value in settings.items() if not isinstance(value, dict)}
    known: set[str] = set()
    defaults = {}
    for name, command in context.command.commands.items():
        options = {option.lstrip("-"): p for p in command.params for option in p.opts}
        own = settings[name] if isinstance(settings.get(name), dict) else {}
        for key in own.keys() - options.keys():
            raise UsageError(
                f"{path}: the file sets an unknown option{_named(key)} of {name}; see "
                f"`tsqp {name} --help`."
            )
        known |= options.keys()
        mine = {key: value for key, value in (shared | own).items() if key in options}
        defaults[name] = {
            options[key].name: [value]
            if options[key].multiple and not isinstance(value, list)
            else value
            for key, value in mine.items()
        }
    for key in shared.keys() - known:
        raise UsageError(
            f"{path}: the file sets an unknown option{_named(key)}; see `tsqp COMMAND --help`."
        )
    for key in settings.keys() - shared.keys() - defaults.keys():
        raise UsageError(
            f"{path}: the file has a table for an unknown command{_named(key)}; see `tsqp --help`."
        )
    context.default_map = defaults
    return path


def _named(key: str) -> str:
    """A key as shown in a message. It is left out if it may be a prompt, not a misspelt name."""
    return f" {key!r}" if re.fullmatch(r"[A-Za-z0-9_-]{1,32}", key) else ""


def _reason(error: OSError | ValueError) -> str:
    """The fault of a file, without quoting the file, because it may set a prompt."""
    if isinstance(error, OSError):
        return str(error.strerror)
    if isinstance(error, UnicodeDecodeError):
        return "it is not valid UTF-8"
    where = re.search(r"\((at [^()]*)\)$", str(error))
    return f"it is not valid TOML{f', {where[1]}' if where else ''}"
