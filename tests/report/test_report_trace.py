"""The trace of `tsqp report --trace`: every stage once, in order, on the right thread."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from report_helpers import START, call, header, run, write

from tsqp.errors import UsageError
from tsqp.report.methods import LogReport
from tsqp.report.read import LogFile, read_file
from tsqp.report.trace import trace_events, write_trace


@pytest.fixture
def report(tmp_path: Path) -> LogReport:
    calls = [
        call(time=START + 1e-3 * n, step=1 + n // 2, endpoint=n % 2, away_us=7.0 * (n % 2))
        for n in range(4)
    ]
    log = read_file(write(tmp_path / "a\x1b[31mlog", [header(), *calls, run(compute=0.5)]))
    assert isinstance(log, LogFile)
    return LogReport.of(log)


def spans(report: LogReport, thread: int) -> list[dict[str, Any]]:
    return [e for e in trace_events(report, 1) if e["ph"] == "X" and e["tid"] == thread]


def test_the_stages_of_a_call_follow_one_another(report: LogReport) -> None:
    mine = [e for e in spans(report, 1) if e["ts"] < 900]
    order = sorted(mine, key=lambda e: e["ts"])
    assert [(e["name"], e["ts"], e["dur"]) for e in order] == [
        ("pads", 0.0, 5.0),
        ("mask", 5.0, 5.0),
        ("serialise", 10.0, 4.0),
        ("send", 14.0, 6.0),
        ("wait", 20.0, 60.0),
        ("receive", 80.0, 5.0),
        ("unmask", 85.0, 15.0),
    ]
    assert order[0]["args"]["rows"] == 1
    assert order[0]["args"]["group"] == "qkv"


def test_each_worker_has_a_thread_with_what_it_computed(report: LogReport) -> None:
    first, second = spans(report, 2), spans(report, 3)
    assert [(e["name"], round(e["ts"]), e["dur"]) for e in first] == [
        ("product", 30, 40.0),
        ("product", 2030, 40.0),
    ]
    assert [round(e["ts"]) for e in second] == [1037, 3037]
    names = {e["tid"]: e["args"]["name"] for e in trace_events(report, 1) if e["ph"] == "M"}
    assert names == {0: "a\ufffd[31mlog", 1: "TEE", 2: "worker 0", 3: "worker 1"}


def test_nothing_on_one_thread_overlaps(report: LogReport) -> None:
    for thread in (1, 2, 3):
        ordered = sorted(spans(report, thread), key=lambda e: e["ts"])
        for one, other in pairwise(ordered):
            assert one["ts"] + one["dur"] <= other["ts"] + 0.11, "times are rounded to 0.1 µs"


def test_the_file_is_new_and_json(report: LogReport, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    write_trace(path, [report, report])
    events = json.loads(path.read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {1, 2}
    with pytest.raises(UsageError, match="exists; name a new file"):
        write_trace(path, [report])
