"""The report of a call log, as tables and notes for a terminal."""

from collections.abc import Iterator, Mapping

from rich.table import Table

from tsqp.bench.output import new_table
from tsqp.report.bottleneck import GROUPS, Bottleneck, show_times
from tsqp.report.methods import LogReport, Method, throughput
from tsqp.report.phases import CALL_PARTS, TEE_PARTS, PhaseTimes
from tsqp.wire.codec import printable

MB = 1e6
METHOD_COLUMNS = (
    "", "calls", "rows", "MB sent", "MB received", "total, s", "median, µs", "p95, µs", "p99, µs",
)  # fmt: skip


def log_tables(report: LogReport) -> Iterator[Table]:
    """A table of methods, then a table of where the time of each phase went."""
    if report.methods:
        yield _methods(report)
    if report.phases:
        yield _parts(report)


def log_notes(report: LogReport) -> Iterator[str]:
    """The run, the bottlenecks, and what is wrong with the file."""
    yield title(report)
    yield from (printable(note) for note in report.log.notes)
    for phase in report.phases:
        rates = throughput(phase)
        yield (
            f"{phase.phase}: {phase.tokens:,} tokens in {phase.wall_s:.3f} s, "
            f"{phase.calls:,} calls; {rates['sent_bytes_per_s'] / MB:.1f} MB/s to the worker, "
            f"{rates['received_bytes_per_s'] / MB:.1f} MB/s back; "
            f"{rates['link_bytes_per_s'] / MB:.1f} MB/s while on the link."
        )
    for found in report.bottlenecks:
        yield f"{bottleneck_text(found)}\n  {found.arithmetic}."


def title(report: LogReport) -> str:
    """One line that describes the run."""
    h = report.log.header
    geometry = f"{h.geometry.layers} layers of {h.geometry.hidden}"
    cpu = printable(h.machine.get("cpu", "unknown machine"))
    words = (
        h.model,
        geometry,
        h.dtype,
        h.field,
        f"privacy {h.privacy}",
        f"transport {h.transport}",
    )
    return f"{printable(report.log.name)}: {', '.join(filter(None, words))}; {cpu}"


def comparison(ratios: Mapping[str, float], name: str, against: str) -> Table:
    """A table that compares two runs."""
    heading = f"{printable(name)} ÷ {printable(against)}"
    table = new_table(heading, "above 1 is slower", "ratio")
    for quantity, ratio in ratios.items():
        table.add_row(quantity, f"{ratio:.2f}")
    return table


def bottleneck_text(found: Bottleneck) -> str:
    """Describe a bottleneck and its remedy in sentences."""
    return (
        f"Bottleneck of {found.phase}: {found.name}, {found.share:.0%} of its time. "
        f"{found.advice} Estimate: {show_times(found.faster)} times as fast."
    )


def method_cells(method: Method) -> list[str]:
    """The row of one method, for METHOD_COLUMNS."""
    return [
        method.name,
        f"{method.calls:,}",
        f"{method.rows:,}",
        f"{method.sent_bytes / MB:.2f}",
        f"{method.received_bytes / MB:.2f}",
        f"{method.total_s:.3f}",
        f"{method.median_us:,.0f}",
        f"{method.p95_us:,.0f}",
        f"{method.p99_us:,.0f}",
    ]


def _methods(report: LogReport) -> Table:
    heading = "Calls by method; times of the TEE, waiting included"
    table = new_table(heading, *METHOD_COLUMNS)
    for method in report.methods:
        table.add_row(*method_cells(method))
    return table


def _parts(report: LogReport) -> Table:
    columns = [title for p in report.phases for title in (f"{p.phase}, s", "share")]
    table = new_table("Where the time went", "", *columns)
    group_of = {part: group for group, parts in GROUPS.items() for part in parts}
    for part in (*CALL_PARTS, *TEE_PARTS):
        if all(part not in phase.parts_s for phase in report.phases):
            continue
        name = part if group_of[part] == part else f"{part} ({group_of[part]})"
        table.add_row(name, *_cells(report.phases, part))
    table.add_section()
    walls = [cell for phase in report.phases for cell in (f"{phase.wall_s:.3f}", "100 %")]
    table.add_row("all", *walls)
    return table


def _cells(phases: list[PhaseTimes], part: str) -> list[str]:
    cells = []
    for phase in phases:
        seconds = phase.parts_s.get(part, 0.0)
        cells += [f"{seconds:.3f}", f"{100 * seconds / phase.wall_s:.1f} %"]
    return cells
