"""The command line: parses, calls, prints.

Settings come from flags, then TSQP_* variables (or LLAMA_*, as in earlier versions), then the TOML
file of --config: see docs/settings.md.
"""

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tsqp.cli import system_errors, usage
from tsqp.cli.settings import read_settings
from tsqp.cli.streams import hide_native_messages, open_streams
from tsqp.errors import RemoteError, TSQPError, UsageError
from tsqp.runtime.hardening import harden_process
from tsqp.runtime.quiet import set_quiet
from tsqp.runtime.tracebacks import without_foreign_messages

# These commands hold prompts, answers, pads or keys. A worker holds nothing that needs this
# protection, unless it has the key of a model.
TRUSTED = (
    "audit", "bench", "bench-accuracy", "bench-attention", "bench-kernels", "bench-scaling",
    "bench-serve", "bench-transport", "bench-trusted-side", "chat", "demo", "digest", "doctor",
    "encrypt", "generate", "keys-fetch", "keys-serve", "proxy", "serve", "verify-receipt",
)  # fmt: skip

# The order in --help, as a newcomer meets the commands. Commands that are not listed come last.
ORDER = (
    "demo", "generate", "chat", "serve", "worker", "cluster-up", "cluster-status", "cluster-down",
    "verify", "collateral", "proxy", "keys-serve",
    "keys-fetch", "prepare", "digest", "encrypt", "keygen", "doctor", "audit", "bench", "report",
)  # fmt: skip


class _Commands(TyperGroup):
    """`tsqp bench kernels` runs the command bench-kernels; `tsqp bench MODEL` runs bench."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self.commands, key=lambda name: (*ORDER, name).index(name))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:  # typer has a click of its own
        joined = "-".join(args[:2])
        if joined in self.commands:
            args = [joined, *args[2:]]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="tsqp",
    cls=_Commands,
    help="Private LLM inference on a GPU that nobody has to trust.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _begin(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(
            envvar="TSQP_CONFIG",
            callback=read_settings,
            help="Read default values of options from this TOML file.",
        ),
    ] = None,
) -> None:
    if context.invoked_subcommand in TRUSTED:
        harden_process()  # before anything reads a prompt
        hide_native_messages()


def main() -> None:
    """Run the command line.

    The exit status is 0 for success, 1 for failure, 2 for wrong usage, 130 if interrupted, and 141
    if nobody reads the output.
    """
    open_streams()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    set_quiet(False)
    state: dict[str, bool] = {}
    try:
        try:
            status = app(obj=state, auto_envvar_prefix="TSQP", standalone_mode=False)
        finally:
            sys.stdout.flush()  # here, where a failure is still reported
    except usage.WrongUsage as exc:
        if type(exc).__name__ != "NoArgsIsHelpError":  # which has printed the help
            print(usage.describe(exc), file=sys.stderr)
        sys.exit(2)
    except typer.Abort:
        print(
            "error: Standard input ended before the command was complete. Run the command again.",
            file=sys.stderr,
        )
        sys.exit(1)
    except TSQPError as exc:
        if state.get("debug"):
            print(without_foreign_messages(exc), end="", file=sys.stderr)
            if isinstance(exc, RemoteError) and exc.remote_traceback:
                print(f"The worker's traceback:\n{exc.remote_traceback}", file=sys.stderr)
        print(f"error: {exc}", file=sys.stderr)
        sys.exit(2 if isinstance(exc, UsageError) else 1)
    except Exception as exc:
        if state.get("debug"):
            print(without_foreign_messages(exc), end="", file=sys.stderr)
        error = system_errors.describe(exc) or (
            f"Unexpected {type(exc).__name__}; run again with --debug, and report it."
        )
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    sys.exit(status or 0)
