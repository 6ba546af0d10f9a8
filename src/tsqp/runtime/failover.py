"""Which workers a session is with: one alternative at a time, and another takes over after it.

In `pad` and `open` every worker is an alternative of its own, unless they hold shards of a model.
With shards, and in `shares`, there is one alternative, which is all of the workers. Shards in
`pad`, and workers from a file, are a `tsqp.runtime.replicas.Replicas`.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from tsqp.errors import IntegrityError, ProtocolError, TSQPError, WorkerError
from tsqp.runtime.worker_link import WorkerProcess
from tsqp.tee.call_log import CallLog
from tsqp.tee.crypto.pad_pool import PadPool
from tsqp.tee.offload.offload import Offload
from tsqp.wire.channel import Channel, Counters

log = logging.getLogger("tsqp")

# Connects to the workers of one alternative; returns the offload, and its pool of pads if there is
# one. Called again after a worker was lost, it begins new sessions with fresh pads, and reads no
# file. It holds the check vectors of these workers, and of no others [P6].
Begin = Callable[[], tuple[Offload, PadPool | None]]

WorkerState = Literal["in use", "standby", "lost", "quarantined"]
UNTRUSTED = (IntegrityError, ProtocolError)  # after these errors a worker is never asked again

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """Whether one worker is used.

    Attributes:
        endpoint: as given.
        state: "in use"; "standby": not needed yet; "lost": it could not be used when it was last
            tried, and may be tried again; "quarantined": it returned a wrong product or broke the
            protocol, and is never asked again.
        error: the class of the error that quarantined it; None in the other states.
    """

    endpoint: str
    state: WorkerState
    error: str | None


class Alternative:
    """The workers of one session: one worker, all shards of a model, or all workers of `shares`.

    Attributes:
        workers: none in mode `tee`.
        state: see `WorkerStatus`.
        error: what quarantined it, without its traceback.
        begin: begins a session; None before the model is loaded, and once it is quarantined.
    """

    def __init__(self, workers: Sequence[WorkerProcess]) -> None:
        self.workers = tuple(workers)
        self.state: WorkerState = "standby"
        self.error: TSQPError | None = None
        self.begin: Begin | None = None

    def start(self, *, look_first: bool = False) -> None:
        """Start local workers that do not run; see `WorkerProcess.start`."""
        for worker in self.workers:
            worker.start(look_first=look_first)

    def open(self) -> tuple[Offload, PadPool | None]:
        """Begin a session.

        Raises:
            WorkerError: a worker cannot be reached, serves something else, or broke the protocol.
        """
        assert self.begin is not None
        self.start()
        return self.begin()

    @property
    def statuses(self) -> list[WorkerStatus]:
        """One for each worker."""
        name = None if self.error is None else type(self.error).__name__
        return [WorkerStatus(worker.endpoint, self.state, name) for worker in self.workers]

    @property
    def channels(self) -> list[Channel]:
        """The present sessions."""
        return [worker.channel for worker in self.workers if worker.channel is not None]

    @property
    def rpc(self) -> Counters:
        """The traffic of the present sessions."""
        return Counters.total(channel.counters for channel in self.channels)

    @property
    def integrity_failures(self) -> int:
        """How many wrong products were detected."""
        return int(isinstance(self.error, IntegrityError))

    def record(self, call_log: CallLog, first: int) -> None:
        """Record the calls of the present sessions; `first` is the number of the first worker."""
        for number, worker in enumerate(self.workers, first):
            if worker.channel is not None:
                worker.channel.on_times = call_log.taker(number, worker.channel.transport)

    def end(self, error: TSQPError) -> None:
        """Remember why there is no session, and stop local workers. A quarantine never ends."""
        if self.state != "quarantined":
            name, text = ", ".join(worker.endpoint for worker in self.workers), str(error)
            if isinstance(error, UNTRUSTED):  # first of all, whatever interrupts the rest
                self.state = "quarantined"
                self.error = type(error)(*error.args)  # a traceback holds check vectors
                self.begin = None  # and with it the check vectors
                log.error("the worker at %s is quarantined: %s", name, text)
            elif self.state != "lost":
                self.state = "lost"
                log.warning("the worker at %s is lost: %s", name, text)
        self.close()

    def close(self) -> None:
        """End the session and stop local workers; safe to call twice."""
        for worker in self.workers:
            worker.close()


class Failover:
    """The alternatives of one model, and which of them is used.

    Attributes:
        alternatives: in the order given. At least one.
        current: the one that is used, or was used last.
    """

    def __init__(self, alternatives: Sequence[Alternative]) -> None:
        """The first alternative is used until it fails."""
        self.alternatives = tuple(alternatives)
        self.current = self.alternatives[0]

    @property
    def workers(self) -> list[WorkerProcess]:
        """All workers, in the order given."""
        return [worker for each in self.alternatives for worker in each.workers]

    @property
    def statuses(self) -> list[WorkerStatus]:
        """One for each worker, in the order given. Any thread may ask."""
        return [status for each in self.alternatives for status in each.statuses]

    @property
    def integrity_failures(self) -> int:
        """How often a wrong product was detected. Any thread may ask."""
        return sum(each.integrity_failures for each in self.alternatives)

    def record(self, call_log: CallLog) -> None:
        """Record the calls of the current sessions."""
        workers = self.workers
        first = workers.index(self.current.workers[0]) if self.current.workers else 0
        self.current.record(call_log, first)

    def end(self, error: TSQPError) -> None:
        """Tell that the session with the current alternative ended with this error."""
        self.current.end(error)

    def attempt(self, use: Callable[[Alternative], T]) -> T:
        """Try the current alternative and then the others, except those in quarantine.

        The first one for which `use` succeeds becomes the current one.

        Raises:
            WorkerError: none succeeded. While there is one that may be tried again, it is the error
                of such an alternative; after that, the error that quarantined the last one.
        """
        lost: WorkerError | None = None
        last = self.current.error
        for each in sorted(self.alternatives, key=lambda each: each is not self.current):
            if each.state == "quarantined":
                continue
            try:
                result = use(each)
            except WorkerError as error:
                each.end(error)
                if each.error is None:
                    lost = lost or error
                else:
                    last = each.error
            except BaseException:
                each.close()
                raise
            else:
                self._use(each)
                return result
        if lost is not None:
            raise lost
        assert last is not None
        raise type(last)(*last.args)  # the original stays without a traceback

    def _use(self, chosen: Alternative) -> None:
        if chosen is not self.current:
            old, new = (
                ", ".join(worker.endpoint for worker in each.workers)
                for each in (self.current, chosen)
            )
            log.warning("the worker at %s takes over from the worker at %s", new, old)
        self.current = chosen
        chosen.state = "in use"
