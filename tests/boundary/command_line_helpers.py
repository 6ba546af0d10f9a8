"""The commands and their options, as the command line knows them."""

import typer.main

from tsqp.cli import app


def surface() -> dict[str, list[str]]:
    """Each command's arguments in capitals and options, sorted; "" is tsqp itself."""
    group = typer.main.get_command(app)
    commands = {"": group, **group.commands}  # type: ignore[attr-defined]
    return {name: _names(command.params) for name, command in commands.items()}


def _names(parameters: list[typer.CallbackParam]) -> list[str]:
    names = []
    for parameter in parameters:
        is_option = parameter.param_type_name == "option"
        names += parameter.opts if is_option else [parameter.name.upper()]
    return sorted(names)
