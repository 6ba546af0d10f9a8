"""Turns the options declared in `tsqp.runtime.options` into options of commands."""

import inspect
import math
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

from tsqp.cli.flags import is_from_command_line
from tsqp.errors import UsageError
from tsqp.runtime.options import Option, Options, command_options


def with_options(
    *names: str, unless: str = ""
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the named options of `Options` to a command; without names, all of them.

    A parameter of the command that has the name of an option receives its value. The remaining
    options arrive together in the parameter `options`, as an `Options`; `--help` lists them in its
    place. A command with `options` must also have a parameter `context`.

    Args:
        unless: an option of the command that takes the place of all of these. With it, `options` is
            None, and those that were typed are refused; variables and settings have no effect.
    """

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        offered = {
            name: each for name, each in command_options().items() if not names or name in names
        }
        own = inspect.signature(command).parameters
        hints = get_type_hints(command, include_extras=True)
        parameters = []
        for name, parameter in own.items():
            if name in offered:
                parameters.append(_parameter(name, *offered[name]))
            elif name == "options":
                parameters += [_parameter(n, *o) for n, o in offered.items() if n not in own]
            else:
                parameters.append(
                    parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hints[name])
                )

        def run(**given: Any) -> None:
            if unless and given[unless] is not None:
                for name, (option, _) in offered.items():
                    given.pop(option.flag or name)
                    _refuse_typed(given["context"], option.flag or name, unless)
                command(**given, options=None)
                return
            values = {
                name: _value(name, option, given.pop(option.flag or name))
                for name, (option, _) in offered.items()
            }
            mine = {name: values.pop(name) for name in own.keys() & offered.keys()}
            if "options" in own:
                mine["options"] = Options(**_drop_unused(given["context"], values))
            command(**mine, **given)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        return run

    return wrap


def _parameter(name: str, option: Option, default: Any) -> inspect.Parameter:
    is_switch = option.type is bool
    shown = typer.Option(
        *([f"--{(option.flag or name).replace('_', '-')}"] if is_switch else []),
        envvar=list(option.env) or None,
        help=option.help,
        min=option.least,
        metavar=option.metavar,
    )
    return inspect.Parameter(
        option.flag or name,
        inspect.Parameter.KEYWORD_ONLY,
        default=not default if option.flag else default,
        annotation=Annotated[option.type, shown],
    )


def _refuse_typed(context: typer.Context, name: str, unless: str) -> None:
    if is_from_command_line(context, name):
        raise UsageError(
            f"--{name.replace('_', '-')} is for a model in this process, not for --{unless}: leave "
            "one of them out."
        )


def _value(name: str, option: Option, given: Any) -> Any:
    """The value given to a command, in the units of `Options`."""
    if option.flag:
        return not given
    unit, size = option.unit
    if not unit or given is None:
        return given
    if not math.isfinite(given * size):
        flag = f"--{name.replace('_', '-')}"
        raise UsageError(f"{flag} is {given}; it must be a number of {unit}, 0 or more.")
    return int(given * size)


def _drop_unused(context: typer.Context, values: dict[str, Any]) -> dict[str, Any]:
    """Drop values from variables and settings that belong to other modes; keep typed ones."""
    for name in ("worker", "worker_key"):
        if values["privacy"] == "tee" and not is_from_command_line(context, name):
            values[name] = None
    if not is_from_command_line(context, "device") and "local" not in (values["worker"] or ()):
        values["device"] = "auto"
    return values
