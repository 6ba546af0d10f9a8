"""Checks of a worker whose model is not known here: asks the worker what it serves."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from tsqp.doctor.check import NOT_SERVED, Check, Skipped, Wrong, run_check
from tsqp.errors import HandshakeError
from tsqp.runtime.links import Link, check_links
from tsqp.wire.client import check_reachable
from tsqp.wire.messages import PROTOCOL_VERSION, WeightsDtype
from tsqp.wire.query_worker import ask_what_is_served

MODES: tuple[tuple[str, WeightsDtype], ...] = (("pad", "int8"), ("open", "float32"))


@dataclass(frozen=True, slots=True)
class Unnamed:
    """A worker whose model is not known: its endpoint and its public key."""

    worker: str
    worker_key: str | None = None


def greeting_checks(target: Unnamed) -> Iterator[Check]:
    """Check whether the worker can be reached, its key, and what it serves to each mode."""
    links: list[Link] = []

    def reach() -> str:
        keys = [] if target.worker_key is None else [target.worker_key]
        links.extend(
            check_links("pad", [target.worker], keys, insecure=True, insecure_same_host=True)
        )
        [link] = links
        if link.endpoint.scheme not in ("ipc", "tcp"):
            raise Wrong(f"--worker {link.endpoint} starts a worker for a model; give MODEL too.")
        check_reachable(link.endpoint, link.key)
        return f"{link.endpoint}, {'encrypted' if link.key else 'not encrypted'}"

    yield (found := run_check("reach the worker", reach))
    if found.state != "ok":
        return
    states = []
    for mode, dtype in MODES:
        yield (found := run_check(f"{mode}: what is served", partial(_serves, links[0], dtype)))
        states.append(found.state)
    if set(states) == {"skipped"}:
        yield Check("modes", "bad", 0.0, "The worker serves no mode; do not trust it.")
    yield Check(
        "weights and products",
        "skipped",
        0.0,
        "Not checked: this needs the worker's model; add MODEL.",
    )


def _serves(link: Link, dtype: WeightsDtype) -> str:
    try:
        served = ask_what_is_served(link.endpoint, link.key, dtype)
    except HandshakeError as exc:
        if NOT_SERVED in str(exc):
            raise Skipped(exc) from exc
        raise
    part = "" if served.shard.is_whole else f", {served.shard}"
    return (
        f"it says {served.dtype} weights {served.digest}…{part}, in protocol version "
        f"{PROTOCOL_VERSION}"
    )
