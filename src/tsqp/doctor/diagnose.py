"""Runs all checks in order and prints each result at once."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial

from rich.console import Console
from rich.markup import escape

from tsqp.bench.hardware_limits import copy_bytes_per_s
from tsqp.bench.transports import ANSWER_BYTES, Ways
from tsqp.doctor.check import Check, Wrong, run_check
from tsqp.doctor.greeting_checks import Unnamed, greeting_checks
from tsqp.doctor.machine_checks import machine_checks
from tsqp.doctor.session_checks import Target, session_checks

CALLS = 200
MARKS = {"ok": "[green]✓[/]", "bad": "[red]✗[/]", "skipped": "[dim]–[/]"}


def examine(
    threads: int | None, targets: Sequence[Target | Unnamed], *, only_workers: bool = False
) -> Iterator[Check]:
    """Check the machine and its transports, unless `only_workers`, and each of the workers.

    If there are several workers, the names of their checks begin with the number of the worker.
    """
    if not only_workers:
        for name, check in machine_checks(threads):
            yield run_check(name, check)
        yield from transport_checks()
    for number, target in enumerate(targets, 1):
        of_worker = (
            session_checks(target) if isinstance(target, Target) else greeting_checks(target)
        )
        for found in of_worker:
            yield replace(found, name=f"{number}. {found.name}") if len(targets) > 1 else found


def transport_checks() -> Iterator[Check]:
    """One check for each transport to a local worker, compared with a plain memory copy."""
    rates: list[float] = []

    def copying() -> str:
        rates.append(copy_bytes_per_s(ANSWER_BYTES))
        return f"{rates[0] / 1e9:.1f} GB/s, {ANSWER_BYTES >> 20} MiB at a time"

    yield run_check("copying memory", copying)
    with ExitStack() as stack:
        ways = Ways()

        def start() -> str:
            stack.enter_context(ways)
            return "on an ipc and on a tcp endpoint"

        yield run_check("start workers", start)
        for socket, shared in ways:
            way = f"{socket} and shared memory" if shared else f"{socket} alone"
            yield run_check(way, partial(_measure, ways, socket, shared, rates))


def print_checks(checks: Iterable[Check], *, json_output: bool) -> bool:
    """Print each check as it ends; returns whether none failed."""
    console = Console(stderr=json_output, highlight=False, soft_wrap=True)
    done = []
    for check in checks:
        done.append(check)
        line = f"{MARKS[check.state]} {check.name:24}{check.seconds:6.2f} s  "
        console.print(line + escape(check.found))
        if check.traceback:
            console.print(check.traceback, markup=False)
    failed = sum(check.state == "bad" for check in done)
    verdict = f"{failed} of {len(done)} checks failed, marked ✗." if failed else "All is well."
    console.print(verdict)
    if json_output:
        print(json.dumps({"well": not failed, "checks": [asdict(check) for check in done]}))
    return not failed


def _measure(ways: Ways, socket: str, shared: bool, rates: Sequence[float]) -> str:
    found = ways.measure(socket, shared, CALLS)
    if shared and found.transport == "inline":
        raise Wrong(f"No memory can be shared with a worker on this machine: {found.reason}.")
    share = f", {found.bytes_per_s / rates[0]:.0%} of copying" if rates else ""
    return (
        f"{found.transport}: {found.median_us:.0f} µs there and back (99 of 100 within "
        f"{found.p99_us:.0f}), {found.bytes_per_s / 1e9:.2f} GB/s{share}"
    )
