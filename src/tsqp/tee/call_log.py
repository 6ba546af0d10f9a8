"""`--rpc-log FILE`: the timing of every call, and of the TEE's work between calls.

While the model runs, the times of a call are kept in memory. They are written as lines when a step
ends, or when there are many. Logging never makes a run fail: if the disk is full, it stops.
"""

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter_ns, time_ns
from typing import get_args

import msgspec

from tsqp.errors import UsageError, printable_path
from tsqp.tee.call_lines import CallLine, Header, Line, Phase, PhaseSummary, Stage, Summary
from tsqp.tee.stats import KINDS, Stats
from tsqp.wire.call_times import CallTimes, OnTimes

log = logging.getLogger("tsqp")

BUFFER_CALLS = 4096

STAGES: tuple[Stage, ...] = get_args(Stage)


@dataclass(slots=True)
class _Phase:
    """The totals of all steps of one phase."""

    steps: int = 0
    tokens: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    calls: int = 0
    kinds_s: list[float] = field(default_factory=lambda: [0.0] * len(KINDS))
    stages_ns: list[int] = field(default_factory=lambda: [0] * len(STAGES))

    def summary(self) -> PhaseSummary:
        return PhaseSummary(
            self.steps,
            self.tokens,
            self.wall_s,
            self.cpu_s,
            self.calls,
            dict(zip(KINDS, self.kinds_s, strict=True)),
            {name: ns / 1e9 for name, ns in zip(STAGES, self.stages_ns, strict=True)},
        )


class CallLog:
    """A new log file that only this user can read. Used by the engine's thread only."""

    def __init__(self, path: Path) -> None:
        """Make the file.

        Raises:
            UsageError: the file exists already, or cannot be made.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            self._file: int | None = os.open(path, flags, 0o600)
        except FileExistsError as exc:
            raise UsageError(f"{path} exists; name a new file for --rpc-log.") from exc
        except OSError as exc:
            raise UsageError(
                f"Cannot make {printable_path(path)} for --rpc-log: {exc.strerror}."
            ) from exc
        self._path = path
        self._size = 0
        self._unix_ns = time_ns() - perf_counter_ns()
        self._encoder = msgspec.json.Encoder()
        self._calls: list[tuple[int, str, CallTimes]] = []
        self._phases: dict[Phase, _Phase] = {name: _Phase() for name in get_args(Phase)}
        self._phase: Phase = "other"
        self._step = 0
        self._before: tuple[float, ...] = ()
        self._dropped = 0

    def begin(self, header: Header) -> None:
        """Write the first line."""
        self._write([header])

    def taker(self, endpoint: int, transport: str) -> OnTimes:
        """A function that receives the times of one worker's calls."""
        calls = self._calls

        def take(times: CallTimes) -> None:
            calls.append((endpoint, transport, times))
            if len(calls) >= BUFFER_CALLS:
                self._write_calls()

        return take

    def flush(self) -> None:
        """Write the calls since the last step, so that they do not count for the next step."""
        self._write_calls()

    def begin_step(self, phase: Phase, stats: Stats) -> None:
        """Begin a step: calls since the last `flush`, and later ones, belong to it."""
        self._step += 1
        self._phase = phase
        self._before = tuple(stats.time(kind).seconds for kind in KINDS)

    def end_step(self, stats: Stats, wall_s: float, cpu_s: float, tokens: int) -> None:
        """End a step, also one that failed, and write its calls.

        If the step failed before `begin_step`, this only writes the calls.

        Args:
            stats: the engine's, as at `begin_step`.
            tokens: number of tokens computed; 0 if the step failed.
        """
        if self._phase == "other":
            self._write_calls()
            return
        phase = self._phases[self._phase]
        phase.steps += 1
        phase.tokens += tokens
        phase.wall_s += wall_s
        phase.cpu_s += cpu_s
        for number, (kind, before) in enumerate(zip(KINDS, self._before, strict=True)):
            phase.kinds_s[number] += stats.time(kind).seconds - before
        self._write_calls()
        self._phase = "other"

    def close(self) -> None:
        """Write the remaining calls and the summary; safe to call twice.

        An empty file is removed, because it would block the next log of the same name.
        """
        if self._file is None:
            return
        self._write_calls()
        if self._size:
            prefill, decode, other = self._phases.values()
            calls = prefill.calls + decode.calls + other.calls
            self._write([Summary(prefill.summary(), decode.summary(), calls, self._dropped)])
        with suppress(OSError):
            os.close(self._file)
            if not self._size:
                self._path.unlink(missing_ok=True)
        self._file = None

    def _write_calls(self) -> None:
        if self._calls:
            self._write([self._line(*call) for call in self._calls])
            self._calls.clear()

    def _line(self, endpoint: int, transport: str, times: CallTimes) -> CallLine:
        """One call as a line, and added to its phase."""
        pads, mask, serialise, send, away, wait, receive, unmask = times.stages_ns
        # A worker may claim anything, so its claims are limited to what can be true.
        compute = min(times.compute_ns, wait)
        overlap = min(times.compute_ns - compute, away)
        phase = self._phases[self._phase]
        phase.calls += 1
        stages = (pads, mask, serialise, send, wait, compute, receive, unmask)
        phase.stages_ns = [a + b for a, b in zip(phase.stages_ns, stages, strict=True)]
        return CallLine(
            (self._unix_ns + times.began_ns) // 1000 / 1e6,
            self._step,
            self._phase,
            times.kind,  # type: ignore[arg-type]  # the tag of one of the messages
            times.layer,
            times.group,
            endpoint,
            transport,  # type: ignore[arg-type]  # one of the channels' own
            times.rows,
            times.sent_bytes,
            times.received_bytes,
            pads // 100 / 10,
            mask // 100 / 10,
            serialise // 100 / 10,
            send // 100 / 10,
            away // 100 / 10,
            wait // 100 / 10,
            compute // 100 / 10,
            overlap // 100 / 10,
            receive // 100 / 10,
            unmask // 100 / 10,
        )

    def _write(self, lines: Sequence[Line]) -> None:
        """Append whole lines, or none."""
        if self._file is None:
            return
        if self._dropped and isinstance(lines[0], CallLine):
            self._dropped += len(lines)  # room now would hide the gap
            return
        rest = self._encoder.encode_lines(lines)
        size = self._size + len(rest)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as exc:
            if not self._dropped:
                log.warning("the call log stops here (%s)", exc.strerror)
            self._dropped += len(lines)
            with suppress(OSError):
                os.ftruncate(self._file, self._size)
                os.lseek(self._file, self._size, os.SEEK_SET)
            return
        self._size = size
