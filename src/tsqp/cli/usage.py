"""Usage errors that do not quote the user's input.

typer quotes what it could not parse. That may be a prompt, for example one without quotes, or one
after a misspelt option. So each message is rebuilt from what the program knows: the names of
commands and options, and the values that they take.
"""

from typing import Any

import typer

# typer brings its own click or uses the installed one, depending on its version.
WrongUsage: type[Exception] = typer.BadParameter.__bases__[0].__bases__[0]

_TYPES = {int: "an integer", float: "a number", bool: "true or false"}
_SOURCES = {
    "ENVIRONMENT": "; it comes from the environment",
    "DEFAULT_MAP": "; it comes from the settings file",
}


def describe(error: Exception) -> str:
    """The command's usage, where to find help, and one sentence after "error: ".

    Args:
        error: a `WrongUsage`.
    """
    context: Any = getattr(error, "ctx", None)
    lines = []
    if context is not None:
        lines = [context.get_usage(), f"Try '{context.command_path} --help' for help."]
    return "\n".join([*lines, f"error: {_sentence(error, context)}"])


def _sentence(error: Any, context: Any) -> str:
    parameter = getattr(error, "param", None)
    match type(error).__name__:
        case "NoSuchOption":
            return f"There is no such option{_suggest(error.possibilities)}."
        case "BadOptionUsage":  # only for an option that the command has
            has_value = error.message.endswith("does not take a value.")
            return f"{error.option_name} {'takes no' if has_value else 'needs a'} value."
        case "MissingParameter" if parameter is not None:
            return f"{_name(parameter)} is missing."
        case "BadParameter" if parameter is not None:
            return (
                f"{_name(parameter)} must be {_expected(parameter)}{_source(parameter, context)}."
            )
    if hasattr(getattr(context, "command", None), "commands"):
        commands = ", ".join(context.command.list_commands(context))
        return f"There is no such command; choose one of {commands}."
    return "The command takes fewer arguments; put quotes around an argument with spaces."


def _suggest(names: Any) -> str:
    return f"; did you mean {' or '.join(sorted(names))}" if names else ""


def _name(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper())
    return str(parameter.opts[0])


def _expected(parameter: Any) -> str:
    """The values that a parameter takes, as far as its type tells."""
    described = getattr(parameter, "type_descriptor", None)
    annotation = getattr(described, "annotation", None)
    [element] = getattr(annotation, "__args__", None) or [annotation]  # of list[int]
    kind = _TYPES.get(element, "a value of another kind")
    info = getattr(described, "parameter_info", None)
    limits = [
        f"{limit} or {which}"
        for limit, which in (
            (getattr(info, "min", None), "more"),
            (getattr(info, "max", None), "less"),
        )
        if limit is not None
    ]
    return ", ".join([kind, *limits])


def _source(parameter: Any, context: Any) -> str:
    source = None if context is None else context.get_parameter_source(parameter.name)
    return _SOURCES.get(getattr(source, "name", ""), "")
