"""`tsqp report FILE…`: prints tables, notes and ratios, and writes a page or a trace."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tsqp.bench.output import check_out
from tsqp.errors import UsageError
from tsqp.report.bench_tables import bench_notes, bench_ratios, bench_tables, numbers
from tsqp.report.log_tables import comparison, log_notes, log_tables
from tsqp.report.methods import LogReport, ratios
from tsqp.report.read import BenchFile, LogFile, read_file
from tsqp.report.trace import write_trace

Report = LogReport | BenchFile


def print_reports(
    paths: Sequence[Path],
    *,
    against: Path | None,
    html: Path | None,
    trace: Path | None,
    json_output: bool,
) -> None:
    """Print reports to stdout; with `json_output`, to stderr, and one JSON object to stdout.

    Raises:
        ReportError: a file cannot be read as a log or a result.
        UsageError: `html` or `trace` exists, or files of different kinds cannot be combined.
    """
    check_out(html, "--html")
    check_out(trace, "--trace")
    reports = [_open(path) for path in paths]
    other = None if against is None else _open(against)
    compared = [{} if other is None else _ratios(report, other) for report in reports]
    logs = [report for report in reports if isinstance(report, LogReport)]
    if (html or trace) and not logs:
        raise UsageError("--html and --trace need a call log; give a file that --rpc-log wrote.")
    console = Console(stderr=json_output, width=140, highlight=False, markup=False)
    for report, by in zip(reports, compared, strict=True):
        _print(console, report)
        if other is not None:
            console.print(comparison(by, _name(report), _name(other)))
    if html is not None:
        from tsqp.report.page import write_page  # matplotlib takes a second to import

        write_page(html, logs)
        console.print(f"Wrote {html}.")
    if trace is not None:
        write_trace(trace, logs)
        console.print(f"Wrote {trace}; open it at ui.perfetto.dev.")
    if json_output:
        found = [
            _as_json(report) | ({"ratios": by} if other is not None else {})
            for report, by in zip(reports, compared, strict=True)
        ]
        print(json.dumps({"reports": found}))


def _open(path: Path) -> Report:
    file = read_file(path)
    return LogReport.of(file) if isinstance(file, LogFile) else file


def _ratios(report: Report, other: Report) -> dict[str, float]:
    if isinstance(report, LogReport) and isinstance(other, LogReport):
        return ratios(report, other)
    if isinstance(report, BenchFile) and isinstance(other, BenchFile):
        return bench_ratios(report, other)
    raise UsageError(
        f"{_name(report)} and {_name(other)} are not of the same kind; compare two call logs or "
        "two results of a benchmark."
    )


def _print(console: Console, report: Report) -> None:
    if isinstance(report, LogReport):
        tables, notes = log_tables(report), log_notes(report)
    else:
        tables, notes = bench_tables(report), bench_notes(report)
    for table in tables:
        console.print(table)
    for note in notes:
        console.print(note)


def _name(report: Report) -> str:
    return report.log.name if isinstance(report, LogReport) else report.name


def _as_json(report: Report) -> dict[str, object]:
    if isinstance(report, LogReport):
        return report.as_json()
    return {"file": report.name, "kind": "benchmark", "figures": numbers(report.values)}
