"""Tables for the result of any benchmark, and ratios between two results."""

from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Any, TypeGuard

from rich.table import Table

from tsqp.bench.output import new_table
from tsqp.report.read import BenchFile
from tsqp.wire.codec import printable

MAX_DEPTH = 4
MAX_COLUMNS = 12
MAX_ROWS = 200
MAX_NUMBER = 1e300
FIGURE = frozenset(("median", "least", "most"))


def bench_tables(file: BenchFile) -> Iterator[Table]:
    """One table for quantities with the same columns (usually modes), then one for each list."""
    by_columns: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for name, value in _quantities(file.values):
        columns = tuple(value)[:MAX_COLUMNS]
        by_columns.setdefault(columns, {})[name] = value
    for columns, rows in by_columns.items():
        table = new_table(_text(file.name), "median (least–most)", *map(_text, columns))
        for name, value in list(rows.items())[:MAX_ROWS]:
            table.add_row(_text(name), *(value.get(column, "") for column in columns))
        yield table
    for name, value in file.values.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            yield _list_table(name, value)


def bench_notes(file: BenchFile) -> Iterator[str]:
    """The command, the settings and the machine."""
    yield f"{printable(file.name)}: {_text(file.values['command'])}"
    plain = {k: v for k, v in file.values.items() if isinstance(v, str | int | float)}
    plain.pop("command", None)
    machine = file.values.get("machine")
    settings = plain | (machine if isinstance(machine, dict) else {})
    yield ", ".join(f"{_text(name)} {_text(value)}" for name, value in settings.items())


def numbers(values: Mapping[str, Any], prefix: str = "", depth: int = 0) -> dict[str, float]:
    """All numbers by path; a figure counts as its median."""
    found: dict[str, float] = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping) and set(value) == FIGURE:
            value = value["median"]
        if _is_number(value):
            found[path] = float(value)
        elif isinstance(value, Mapping) and depth < MAX_DEPTH:
            found |= numbers(value, f"{path}.", depth + 1)
    return found


def bench_ratios(file: BenchFile, against: BenchFile) -> dict[str, float]:
    """Numbers of this file divided by those of the other, if both have them."""
    return quotients(numbers(file.values), numbers(against.values))


def quotients(mine: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """Quotients for the names that both have, without those that overflow a float."""
    found = {name: value / other[name] for name, value in mine.items() if other.get(name)}
    return {name: quotient for name, quotient in found.items() if isfinite(quotient)}


def _quantities(values: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, str]]]:
    """The quantities whose values are a mapping of figures or numbers."""
    for name, value in values.items():
        if not isinstance(value, Mapping) or not value:
            continue
        cells = {str(key): _cell(each) for key, each in value.items()}
        if all(cells.values()):
            yield name, cells
            continue
        turned: dict[str, dict[str, str]] = {}
        for column, each in value.items():
            for inner, number in each.items() if isinstance(each, Mapping) else ():
                if cell := _cell(number):
                    turned.setdefault(f"{name}.{inner}", {})[str(column)] = cell
        yield from turned.items()


def _list_table(name: str, items: list[dict[str, Any]]) -> Table:
    columns = list(items[0])[:MAX_COLUMNS]
    table = new_table(_text(name), *map(_text, columns))
    for item in items[:MAX_ROWS]:
        table.add_row(*(_cell(item.get(column)) or _text(item.get(column)) for column in columns))
    return table


def _cell(value: object) -> str:
    """Format a figure or a number; empty for anything else."""
    if _is_number(value):
        return f"{value:,.4g}"
    if isinstance(value, Mapping) and set(value) == FIGURE:
        median, least, most = (_cell(value[key]) for key in ("median", "least", "most"))
        return f"{median} ({least}–{most})" if median and least and most else ""
    return ""


def _is_number(value: object) -> TypeGuard[int | float]:
    """Whether the value is a number that fits in a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < MAX_NUMBER


def _text(value: object) -> str:
    """Any value as printable text, shortened to one line."""
    text = "" if value is None else str(value)
    return printable(text[:100])
