"""The settings file: TOML whose keys are option names, the defaults below flags and variables."""

import tomllib
from pathlib import Path

import typer
from typer.core import TyperGroup


def read_settings(context: typer.Context, path: Path | None) -> Path | None:
    """Make the settings file the defaults of every command's options."""
    if path is None:
        return None
    try:
        settings = tomllib.loads(path.read_text())
    except (OSError, ValueError) as exc:
        raise typer.BadParameter(f"cannot read the settings file {path}: {exc}") from exc
    assert isinstance(context.command, TyperGroup)
    shared = {key: value for key, value in settings.items() if not isinstance(value, dict)}
    known: set[str] = set()
    defaults = {}
    for name, command in context.command.commands.items():
        options = {option.lstrip("-"): p for p in command.params for option in p.opts}
        own = settings[name] if isinstance(settings.get(name), dict) else {}
        for key in own.keys() - options.keys():
            raise typer.BadParameter(f"{path}: {name} has no option {key!r}")
        known |= options.keys()
        mine = {key: value for key, value in (shared | own).items() if key in options}
        defaults[name] = {
            options[key].name: [value]
            if options[key].multiple and not isinstance(value, list)
            else value
            for key, value in mine.items()
        }
    for key in shared.keys() - known:
        raise typer.BadParameter(f"{path}: no command has an option {key!r}")
    for key in settings.keys() - shared.keys() - defaults.keys():
        raise typer.BadParameter(f"{path}: there is no command {key!r}")
    context.default_map = defaults
    return path
