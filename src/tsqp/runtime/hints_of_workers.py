"""`--hints worker`: loads lattice masks with hints that a worker makes [P10]."""

import logging
from collections.abc import Callable
from functools import partial

from tsqp.checkpoint.quantize import IntegerWeights
from tsqp.errors import HintsError, IntegrityError
from tsqp.model.linear_group import LinearGroup
from tsqp.runtime.failover import Alternative, Failover
from tsqp.runtime.worker_link import WorkerProcess
from tsqp.tee.crypto.freivalds import FailureLimit
from tsqp.tee.offload.lattice_load import LatticeLoad
from tsqp.tee.offload.worker_hints import ask_for_hints
from tsqp.wire.channel import Channel

log = logging.getLogger("tsqp")


def add_with_hints_of_workers(
    load: LatticeLoad,
    integers: dict[LinearGroup, IntegerWeights],
    failover: Failover,
    connect: Callable[[WorkerProcess], Channel],
    timeout: float,
    limit: FailureLimit,
    on_made: Callable[[int], None],
) -> None:
    """Add all groups; if a worker fails, another one makes the hints that are missing.

    Args:
        integers: emptied as hints are checked.
        connect: begins a session, which is used for the hints only.
        timeout: seconds that the worker may take for one call.
        limit: counts wrong hints.
        on_made: called for each group, with the bytes of its weights.

    Raises:
        WorkerError: see `Failover.attempt`; IntegrityError after wrong hints.
    """

    def use(alternative: Alternative) -> None:
        limit.check()
        [worker] = alternative.workers
        channel = connect(worker)
        log.info("waiting for the worker to make the hints of lattice masks")
        try:
            for group in list(integers):
                load.add(group, integers[group], partial(ask_for_hints, channel, timeout=timeout))
                on_made(integers.pop(group).nbytes)
        except HintsError as exc:
            limit.count()
            raise IntegrityError(
                f"The worker at {channel.endpoint} made wrong hints for {group}; no mask was made "
                "with them. Do not use this worker again."
            ) from exc
        finally:
            channel.close()

    failover.attempt(use)
