"""Call logs as a trace in Chrome's Trace Event Format, which ui.perfetto.dev opens."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tsqp.report.call_stages import AWAY, stages
from tsqp.report.methods import LogReport
from tsqp.report.report_file import write_new_file
from tsqp.tee.call_lines import CallLine
from tsqp.wire.codec import printable

TEE = 1  # thread id of the TEE; workers have the next ids
# For the TEE, both parts are waiting.
WAITS = ("link", "worker compute")


def write_trace(path: Path, reports: Sequence[LogReport]) -> None:
    """Write a trace to a new file.

    Raises:
        UsageError: the file exists, or cannot be written.
    """
    events = [event for n, report in enumerate(reports, 1) for event in trace_events(report, n)]
    write_new_file(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def trace_events(report: LogReport, process: int) -> Iterator[dict[str, Any]]:
    """The events of one log: one process with a thread for the TEE and for each worker.

    Times are microseconds since the first call. It is not known when during the wait a worker
    computed. Its time is placed in the middle.
    """
    calls = report.log.calls
    yield _name("process_name", process, 0, printable(report.log.name))
    yield _name("thread_name", process, TEE, "TEE")
    for endpoint in sorted({call.endpoint for call in calls}):
        yield _name("thread_name", process, TEE + 1 + endpoint, f"worker {endpoint}")
    begin_us = 1e6 * min((call.time for call in calls), default=0.0)
    for call in calls:
        yield from _call_events(call, begin_us, process)


def _call_events(call: CallLine, begin_us: float, process: int) -> Iterator[dict[str, Any]]:
    arguments = {
        name: getattr(call, name)  # `name` comes only from this list
        for name in ("step", "phase", "layer", "group", "rows", "sent_bytes", "received_bytes")
    }
    waits = [stage for stage in stages(call, begin_us) if stage[0] in WAITS]
    for part, begin, end in stages(call, begin_us):
        if part == AWAY or part in WAITS:
            continue
        yield _span(part, begin, end, process, TEE, call.method, arguments)
    if waits:
        yield _span("wait", waits[0][1], waits[-1][2], process, TEE, call.method, arguments)
    for part, begin, end in waits:
        if part == "worker compute":
            worker = TEE + 1 + call.endpoint
            yield _span(call.method, begin, end, process, worker, call.method, arguments)


def _span(
    name: str,
    begin: float,
    end: float,
    process: int,
    thread: int,
    category: str,
    arguments: dict[str, Any],
) -> dict[str, Any]:
    return {
        "name": name,
        "cat": category,
        "ph": "X",
        "ts": round(begin, 1),
        "dur": round(end - begin, 1),
        "pid": process,
        "tid": thread,
        "args": arguments,
    }


def _name(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
