"""`tsqp cluster up`: starts workers, waits for them, and keeps the file of workers right."""

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tsqp.cluster.actor import Report
from tsqp.cluster.plan import Plan
from tsqp.cluster.ray_cluster import RayCluster, find, start
from tsqp.cluster.workers_file import records, replace
from tsqp.errors import ClusterError

POLL_S = 0.2
Say = Callable[[str], None]


def bring_up(plan: Plan, stop: threading.Event, say: Say) -> tuple[RayCluster, dict[str, str]]:
    """Start the workers, and wait until all of them serve.

    Returns:
        the cluster, and the endpoint of each worker, by name.

    Raises:
        UsageError: another cluster has this name.
        ClusterError: a worker could not start, or `stop` was set; nothing is left behind, unless
            the cluster ran before.
    """
    ran_before = len(find()) > 0
    cluster = start(plan)
    try:
        serving = -1
        while True:
            reports = cluster.reports()
            endpoints = _endpoints(reports)
            if len(endpoints) != serving:
                serving = len(endpoints)
                say(f"{serving} of {len(cluster)} workers serve")
            cluster.check(plan, reports)
            if len(endpoints) == len(cluster):
                return cluster, endpoints
            if not ran_before:
                _check_started(reports)
            if stop.wait(POLL_S):
                raise ClusterError("Interrupted before all workers served.")
    except ClusterError:
        if not ran_before:
            cluster.stop()
        raise


def watch(
    cluster: RayCluster,
    endpoints: Mapping[str, str],
    public_keys: Mapping[str, str],
    path: Path,
    stop: threading.Event,
    say: Say,
) -> None:
    """Keep the file of workers right until `stop` is set.

    A worker that is being started again keeps its line until its new endpoint is known: the file
    always names all workers, and a TEE passes over those that do not answer.

    Raises:
        ClusterError: the cluster was taken down.
        OSError: the file cannot be written.
    """
    known = dict(endpoints)
    replace(path, records(known, public_keys))
    lost: dict[str, float] = {}
    while not stop.wait(POLL_S):
        reports = cluster.reports()
        now = _endpoints(reports)
        for name in known.keys() - now.keys() - lost.keys():
            lost[name] = time.monotonic()
            say(f"{name} is being started again{_reason(reports[name])}")
        changed = {name: where for name, where in now.items() if known[name] != where}
        if changed:
            known |= changed
            replace(path, records(known, public_keys))
        for name in now.keys() & (lost.keys() | changed.keys()):
            since = lost.pop(name, None)
            after = "" if since is None else f" after {time.monotonic() - since:.1f} s"
            say(f"{name} serves again{after}")


def _endpoints(reports: Mapping[str, Report | None]) -> dict[str, str]:
    return {
        name: report.state.endpoint
        for name, report in reports.items()
        if report is not None and report.state.endpoint is not None
    }


def _reason(report: Report | None) -> str:
    return "" if report is None else f": {report.state.error}"


def _check_started(reports: Mapping[str, Report | None]) -> None:
    for name, report in reports.items():
        if report is not None and report.state.endpoint is None and report.state.error:
            raise ClusterError(f"{name} on {report.node}: {report.state.error}")
