"""The end of every benchmark: tables for people, then one JSON line for machines."""

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
    """Refuse, before anything is measured, a file that could not be written.

    Args:
        option: which names it.

    Raises:
        UsageError: it exists, or its folder does not.
    """
    if out is not None and out.exists():
        raise UsageError(f"{out} exists; name a new file, or remove it.")
    if out is not None and not out.parent.is_dir():
        folder = printable_path(f"{out.parent}/", "of that name")
        raise UsageError(f"There is no folder {folder} for {option}; make it first.")


def print_result(
    result: dict[str, object], tables: Iterable[Table], notes: Iterable[str], out: Path | None
) -> None:
    """Print tables and notes to standard error and the JSON to standard output; write `out`."""
    console = Console(stderr=True, width=140, highlight=False, quiet=is_quiet())
    for table in tables:
        console.print(table)
    for note in notes:
        console.print(note, markup=False)
    command = "tsqp " + shlex.join(sys.argv[1:])
    line = json.dumps({"command": command, **result})
    print(line, flush=True)  # first: should the file fail, the figures are not lost
    if out is not None:
        out.write_text(line + "\n")


def new_table(title: str, *columns: str) -> Table:
    """A table whose first column names the rows."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def show(figure: Figure, digits: int, unit: float = 1.0) -> str:
    """Median (least to most), in units of `unit`."""
    values = (figure.median / unit, figure.least / unit, figure.most / unit)
    median, least, most = (f"{value:.{digits}f}" for value in values)
    return f"{median} ({least}–{most})"
