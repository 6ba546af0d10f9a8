"""The plots of a report, as SVG elements for a page.

The colours are the palette of Okabe and Ito, which is safe for the colour-blind. Rows, hatches,
line styles and labels carry the same information without colour.
"""

import io
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from statistics import median_low
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tsqp.report.bottleneck import GROUPS, group_seconds
from tsqp.report.call_stages import stages
from tsqp.report.methods import LogReport
from tsqp.report.phases import PhaseName, call_parts_us
from tsqp.tee.call_lines import CallLine

Span = tuple[float, float]  # (begin, end)

STYLES = {  # colour and hatch of each of GROUPS
    "worker compute": ("#0072B2", ""),
    "link": ("#56B4E9", "..."),
    "serialisation": ("#000000", ""),
    "TEE pads": ("#F0E442", "\\\\"),
    "TEE masking": ("#CC79A7", "xx"),
    "TEE own work": ("#009E73", "--"),
}
LINES = (
    ("#0072B2", "-"),
    ("#D55E00", "--"),
    ("#009E73", "-."),
    ("#CC79A7", ":"),
    ("#000000", (0, (6, 1, 1, 1, 1, 1))),
)
GROUP_OF = {part: group for group, parts in GROUPS.items() for part in parts}
FINEST = 800  # maximum marks in one row of a time line; more could not be told apart
BINS = 48
WIDTH = 9.0  # inches
RC: dict[Any, Any] = {
    "font.size": 9.0,
    "svg.fonttype": "none",
    "hatch.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def breakdown(report: LogReport) -> str:
    """A plot of the share of each group in each phase."""
    return _draw("breakdown", 0.9 + 0.7 * len(report.phases), lambda ax: _breakdown(ax, report))


def time_line(calls: Sequence[CallLine], phase: PhaseName) -> str:
    """A plot of a typical step of a phase, from its first call to its last."""
    step = typical_step(calls, phase)
    return _draw(f"{phase}-step", 2.6, lambda ax: _time_line(ax, step))


def latencies(report: LogReport) -> str:
    """A plot of call latencies by method."""
    return _draw("latencies", 2.8, lambda ax: _latencies(ax, report))


def bytes_by_method(report: LogReport) -> str:
    """A plot of bytes in each direction by method."""
    height = 1.0 + 0.6 * len(report.methods)
    return _draw("bytes", height, lambda ax: _bytes(ax, report))


def typical_step(calls: Iterable[CallLine], phase: PhaseName) -> list[CallLine]:
    """The calls of the step of median length."""
    steps: dict[int, list[CallLine]] = {}
    for call in calls:
        if call.phase == phase:
            steps.setdefault(call.step, []).append(call)
    lengths = {number: _end(step) - _begin(step) for number, step in steps.items()}
    if not lengths:
        return []
    middle = median_low(lengths.values())
    return next(steps[number] for number, length in lengths.items() if length == middle)


def spans(step: Sequence[CallLine]) -> dict[str, list[Span]]:
    """When each of GROUPS was active, in microseconds since the first call.

    It is not known when during the wait the worker computed. Its time is drawn in the middle.
    """
    found: dict[str, list[Span]] = {group: [] for group in GROUPS}
    begin = _begin(step)
    for call in step:
        for part, first, last in stages(call, begin):
            if part in GROUP_OF:
                found[GROUP_OF[part]].append((first, last))
    busy = merged((span for group in found.values() for span in group), 0.0)
    found["TEE own work"] = [(one[1], other[0]) for one, other in pairwise(busy)]
    return found


def merged(spans: Iterable[Span], gap: float) -> list[Span]:
    """The spans in order; spans that are at most `gap` apart are merged."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1] + gap:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def _begin(step: Sequence[CallLine]) -> float:
    return min(call.time for call in step) * 1e6


def _end(step: Sequence[CallLine]) -> float:
    return max(call.time * 1e6 + sum(call_parts_us(call)) + call.away_us for call in step)


def _breakdown(ax: Axes, report: LogReport) -> None:
    names = [phase.phase for phase in report.phases]
    left = np.zeros(len(names))
    for group, (colour, hatch) in STYLES.items():
        shares = np.array([100 * group_seconds(p)[group] / p.wall_s for p in report.phases])
        bars = ax.barh(
            names, shares, left=left, color=colour, hatch=hatch, edgecolor="white", label=group
        )
        labels = [f"{share:.0f} %" if share >= 4 else "" for share in shares]
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
        ax.bar_label(bars, labels, label_type="center", bbox=box)
        left += shares
    ax.set_xlim(0, 100)
    ax.set_xlabel("share of the time, %")
    ax.invert_yaxis()
    ax.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)


def _time_line(ax: Axes, step: Sequence[CallLine]) -> None:
    found = spans(step)
    length = max(_end(step) - _begin(step), 0.1)
    for row, (group, (colour, _)) in enumerate(STYLES.items()):
        marks = merged(found[group], length / FINEST)
        bars = [(begin / 1e3, (end - begin) / 1e3) for begin, end in marks]
        ax.broken_barh(bars, (row - 0.4, 0.8), facecolors=colour, linewidth=0)
    ax.set_yticks(range(len(STYLES)), list(STYLES))
    ax.set_xlim(0, length / 1e3)
    ax.invert_yaxis()
    ax.grid(axis="x", linewidth=0.4)
    ax.set_xlabel("milliseconds from the first call of the step")


def _latencies(ax: Axes, report: LogReport) -> None:
    took = {
        method.name: [sum(call_parts_us(c)) for c in report.log.calls if c.method == method.name]
        for method in report.methods
        if method.name != "all"
    }
    every = [max(us, 0.1) for each in took.values() for us in each]
    low, high = min(every), max(every)
    edges = np.geomspace(low / 1.05, high * 1.05, BINS + 1)
    for number, (name, values) in enumerate(took.items()):
        colour, line = LINES[number % len(LINES)]
        counts, _ = np.histogram(np.maximum(values, 0.1), edges)
        label = f"{name}, median {np.median(values):,.0f} µs"
        ax.stairs(counts, edges, color=colour, linestyle=line, linewidth=1.5, label=label)
    ax.set_xscale("log")
    ax.set_xlabel("microseconds a call, waiting included")
    ax.set_ylabel("calls")
    ax.legend(frameon=False)


def _bytes(ax: Axes, report: LogReport) -> None:
    methods = report.methods
    places = np.arange(len(methods))
    ways = (
        (-0.2, "to the worker", "#E69F00", "//", [m.sent_bytes / 1e6 for m in methods]),
        (0.2, "back", "#56B4E9", "...", [m.received_bytes / 1e6 for m in methods]),
    )
    for shift, label, colour, hatch, values in ways:
        bars = ax.barh(
            places + shift, values, 0.38, color=colour, hatch=hatch, edgecolor="white", label=label
        )
        ax.bar_label(bars, [f"{value:,.2f} MB" for value in values], padding=3)
    ax.set_yticks(places, [method.name for method in methods])
    ax.invert_yaxis()
    ax.margins(x=0.15)
    ax.set_xlabel("megabytes of tensors")
    ax.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)


def _draw(name: str, height: float, plot: Callable[[Axes], None]) -> str:
    """Draw a plot as an SVG element."""
    with mpl.rc_context():
        mpl.rcdefaults()  # ignore a matplotlibrc in the working folder
        mpl.rcParams.update(RC | {"svg.hashsalt": name})
        figure = Figure((WIDTH, height), layout="constrained")
        plot(figure.subplots())
        out = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=nothing)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]  # drop the XML header, which only a separate file needs
    svg = re.sub(r' xmlns:xlink="[^"]*"', "", svg).replace("xlink:href=", "href=")
    return re.sub(r' (width|height)="[^"]*pt"', "", svg, count=2)
