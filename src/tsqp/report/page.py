"""A report as one HTML page, without scripts or external resources; suitable for printing."""

from collections.abc import Iterator, Sequence
from html import escape
from itertools import count
from pathlib import Path

from tsqp.report.bottleneck import group_seconds
from tsqp.report.log_tables import METHOD_COLUMNS, bottleneck_text, method_cells, title
from tsqp.report.methods import LogReport
from tsqp.report.plots import breakdown, bytes_by_method, latencies, time_line
from tsqp.report.report_file import write_new_file
from tsqp.wire.codec import printable

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #111; background: #fff;
       max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; margin: .5rem 0; }
th, td { text-align: right; padding: .15rem .7rem; border-bottom: 1px solid #ccc; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1rem 0; break-inside: avoid; } figcaption { color: #333; }
svg { width: 100%; height: auto; }
p.found { border-left: 4px solid #0072B2; padding-left: .8rem; }
@media print { body { margin: 0; max-width: none; font-size: 11px; } }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_page(path: Path, reports: Sequence[LogReport]) -> None:
    """Write the page to a new file.

    Raises:
        UsageError: the file exists, or cannot be written.
    """
    write_new_file(path, page(reports))


def page(reports: Sequence[LogReport]) -> str:
    """The whole HTML document."""
    numbers = count()
    body = "\n".join(part for report in reports for part in _section(report, numbers))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>TSQP report</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<h1>Where the time went</h1>\n{body}\n</body>\n</html>\n"
    )


def _section(report: LogReport, numbers: Iterator[int]) -> Iterator[str]:
    yield f"<h2>{_text(title(report))}</h2>"
    for note in report.log.notes:
        yield f"<p>{_text(note)}</p>"
    for found in report.bottlenecks:
        text = _text(bottleneck_text(found))
        yield f'<p class="found">{text}<br>{_text(found.arithmetic)}.</p>'
    if report.phases:
        caption = "What the wall time was spent on."
        yield _figure(breakdown(report), caption, next(numbers))
        yield _phases(report)
    for phase in report.phases:
        if any(call.phase == phase.phase for call in report.log.calls):
            yield _figure(
                time_line(report.log.calls, phase.phase),
                f"One {phase.phase} step, the one of median length. Where in a wait the worker "
                "computed is its own word, and drawn in the middle.",
                next(numbers),
            )
    if report.methods:
        yield _methods(report)
        yield _figure(latencies(report), "How long calls took.", next(numbers))
        yield _figure(bytes_by_method(report), "What crossed.", next(numbers))


def _figure(svg: str, caption: str, number: int) -> str:
    """A figure element. The ids in its SVG are made unique within the page."""
    unique = svg.replace(' id="', f' id="p{number}-').replace("url(#", f"url(#p{number}-")
    unique = unique.replace(' href="#', f' href="#p{number}-')
    unique = unique.replace("<svg ", f'<svg role="img" aria-label="{_text(caption)}" ', 1)
    return f"<figure>\n{unique}\n<figcaption>{_text(caption)}</figcaption>\n</figure>"


def _phases(report: LogReport) -> str:
    columns = [name for p in report.phases for name in (f"{p.phase}, s", "share")]
    groups = [group_seconds(phase) for phase in report.phases]
    rows = []
    for name in groups[0]:
        cells = [name]
        for phase, seconds in zip(report.phases, groups, strict=True):
            cells += [f"{seconds[name]:.3f}", f"{seconds[name] / phase.wall_s:.1%}"]
        rows.append(cells)
    return _table(["", *columns], rows)


def _methods(report: LogReport) -> str:
    return _table(METHOD_COLUMNS, [method_cells(method) for method in report.methods])


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(column)}</th>" for column in columns)
    lines = ("".join(f"<td>{_text(cell)}</td>" for cell in row) for row in rows)
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table>\n<tr>{head}</tr>\n{body}\n</table>"


def _text(text: str) -> str:
    return escape(printable(text))
