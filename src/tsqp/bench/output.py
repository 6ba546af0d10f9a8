"""Output of every benchmark: tables for people and one JSON line for programs."""

import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tsqp.bench.figures import Figure
from tsqp.errors import UsageError, printable_path
from tsqp.runtime.quiet import is_quiet


def check_out(out: Path | None, option: str = "--out") -> None:
    """Check that a result file can be written, before anything is measured.

    Args:
        option: the option that names the file, for the message.

    Raises:
        UsageError: the file exists, or its folder does not.
    """
    if out is not None and out.exists():
        raise UsageError(f"{out} exists; name a new file, or remove it.")
    if out is not None and not out.parent.is_dir():
        folder = printable_path(f"{out.parent}/", "of that name")
        raise UsageError(f"There is no folder {folder} for {option}; make it first.")


def print_result(
    result: dict[str, object], tables: Iterable[Table], notes: Iterable[str], out: Path | None
) -> None:
    """Print tables and notes to stderr and JSON to stdout, and write the JSON to `out`."""
    console = Console(stderr=True, width=140, highlight=False, quiet=is_quiet())
    for table in tables:
        console.print(table)
    for note in notes:
        console.print(note, markup=False)
    command = "tsqp " + shlex.join(sys.argv[1:])
    line = json.dumps({"command": command, **result})
    print(line, flush=True)  # before the file, so that an error there does not lose the figures
    if out is not None:
        out.write_text(line + "\n")


def new_table(title: str, *columns: str) -> Table:
    """An empty table whose first column holds row names."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def show(figure: Figure, digits: int, unit: float = 1.0) -> str:
    """Format as "median (minimum to maximum)", in units of `unit`."""
    values = (figure.median / unit, figure.least / unit, figure.most / unit)
    median, least, most = (f"{value:.{digits}f}" for value in values)
    return f"{median} ({least}–{most})"
