"""Statistics of calls by method: number, size and latency."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from tsqp.report.bench_tables import quotients
from tsqp.report.bottleneck import Bottleneck, bottleneck, group_seconds
from tsqp.report.phases import LEAST_S, PhaseTimes, call_parts_us, phases_of
from tsqp.report.read import LogFile
from tsqp.tee.call_lines import CallLine

QUANTILES = (0.5, 0.95, 0.99)


@dataclass(frozen=True, slots=True)
class Method:
    """Statistics of all calls of one method, or of all methods.

    Attributes:
        total_s: time of the TEE, including waiting.
        median_us, p95_us, p99_us: percentiles of the same time for one call.
    """

    name: str
    calls: int
    rows: int
    sent_bytes: int
    received_bytes: int
    total_s: float
    median_us: float
    p95_us: float
    p99_us: float

    @classmethod
    def of(cls, name: str, calls: Sequence[CallLine]) -> "Method":
        took_us = [sum(call_parts_us(call)) for call in calls]
        median_us, p95_us, p99_us = map(float, np.quantile(took_us, QUANTILES))
        return cls(
            name,
            len(calls),
            sum(call.rows for call in calls),
            sum(call.sent_bytes for call in calls),
            sum(call.received_bytes for call in calls),
            sum(took_us) / 1e6,
            median_us,
            p95_us,
            p99_us,
        )


@dataclass(frozen=True, slots=True)
class LogReport:
    """Everything that is reported about one log."""

    log: LogFile
    methods: list[Method]
    phases: list[PhaseTimes]
    bottlenecks: list[Bottleneck]

    @classmethod
    def of(cls, log: LogFile) -> "LogReport":
        calls: dict[str, list[CallLine]] = {}
        for call in log.calls:
            calls.setdefault(call.method, []).append(call)
        methods = [Method.of(name, of_method) for name, of_method in calls.items()]
        if len(methods) > 1:
            methods.append(Method.of("all", log.calls))
        phases = phases_of(log)
        return cls(log, methods, phases, [bottleneck(each, log.header) for each in phases])

    def as_json(self) -> dict[str, object]:
        """Ready for JSON."""
        header = self.log.header
        return {
            "file": self.log.name,
            "kind": "call log",
            "privacy": header.privacy,
            "field": header.field,
            "dtype": header.dtype,
            "model": header.model,
            "transport": header.transport,
            "machine": header.machine,
            "methods": [asdict(method) for method in self.methods],
            "phases": [
                asdict(each) | {"groups_s": group_seconds(each)} | throughput(each)
                for each in self.phases
            ],
            "bottlenecks": [asdict(each) for each in self.bottlenecks],
            "notes": list(self.log.notes),
        }


def throughput(phase: PhaseTimes) -> dict[str, float]:
    """Bytes per second in each direction, over the phase's wall time and over the link's time."""
    link_s = phase.seconds("send", "link", "receive")
    both = phase.bytes_sent + phase.bytes_received
    return {
        "sent_bytes_per_s": phase.bytes_sent / phase.wall_s,
        "received_bytes_per_s": phase.bytes_received / phase.wall_s,
        "link_bytes_per_s": both / link_s if link_s >= LEAST_S else 0.0,
    }


def ratios(report: LogReport, against: LogReport) -> dict[str, float]:
    """Seconds of one run divided by those of another, if both have them; above 1 is slower."""
    return quotients(_figures(report), _figures(against))


def _figures(report: LogReport) -> dict[str, float]:
    """The figures that two runs are compared by; per step if the numbers of steps may differ."""
    found = {}
    for phase in report.phases:
        each = max(phase.steps, 1)
        found[f"{phase.phase}, s a step"] = phase.wall_s / each
        if phase.tokens:
            found[f"{phase.phase}, s a token"] = phase.wall_s / phase.tokens
        for name, seconds in group_seconds(phase).items():
            found[f"{phase.phase}: {name}, s a step"] = seconds / each
    for method in report.methods:
        found[f"{method.name}: median, µs"] = method.median_us
        found[f"{method.name}: p99, µs"] = method.p99_us
    return found
