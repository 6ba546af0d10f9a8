"""Workers of `pad` that serve together: one or more for each shard, which come and go.

A thread connects to those that are not there, lets them answer a probe, and hands them over to the
engine's thread, which uses them. It also reads the file of workers again when it changes.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from tsqp.errors import HandshakeError, IntegrityError, TSQPError, UsageError, WorkerLost
from tsqp.model.shard import Shard
from tsqp.runtime.check_sets import CheckSets
from tsqp.runtime.failover import UNTRUSTED, Alternative, WorkerState, WorkerStatus
from tsqp.runtime.links import Link, check_links
from tsqp.runtime.options import Options
from tsqp.runtime.worker_link import WorkerProcess
from tsqp.runtime.workers_file import Entry, WorkersFile
from tsqp.tee.call_log import CallLog
from tsqp.tee.crypto.freivalds import FailureLimit, Trust
from tsqp.tee.offload.replica import Replica, probe
from tsqp.tee.offload.shards import ShardsLinear
from tsqp.wire.channel import Channel, Counters

log = logging.getLogger("tsqp")

POLL_S = 1.0  # between two looks at the file and at workers that are away
LONGEST_PAUSE_S = 10.0  # between two attempts to reach a worker; doubled each time
MORE_S = 1.0  # for which a session waits for further workers once each shard has one
JOIN_S = 12.0

Connect = Callable[[WorkerProcess], Channel]


@dataclass(eq=False)
class _Member:
    """One worker. The thread of an attempt writes to it, or the engine's while it has a session.

    Attributes:
        shard: from 0; None until it was reached.
        groups: with the check vectors that are used with this worker only.
        served: whether it ever had a session, or came after the start: then it is probed.
        busy: whether an attempt to reach it is being made.
        tried: the sessions for which it was tried.
    """

    process: WorkerProcess
    number: int
    trust: Trust
    state: WorkerState = "standby"
    error: TSQPError | None = None
    shard: int | None = None
    groups: Any = None
    served: bool = False
    busy: bool = False
    tried: object = None
    replica: Replica[Any] | None = None
    pause_s: float = POLL_S
    next_try: float = 0.0


@dataclass(frozen=True)
class Serving:
    """What sessions need that begin with the loaded model."""

    connect: Connect
    sets: CheckSets[Any]
    watched: Callable[[Any], Any]
    timeout: float
    limit: FailureLimit


@dataclass
class _Past:
    """What is left of workers and sessions that are gone."""

    rpc: list[Counters] = field(default_factory=list)
    lies: int = 0
    refused: dict[Link, TSQPError] = field(default_factory=dict)


class Replicas(Alternative):
    """All workers of a model in `pad`, which are used at the same time.

    Args:
        count: number of shards.
        process_of: makes the worker of a link that the file names later.
    """

    def __init__(
        self,
        workers: Sequence[WorkerProcess],
        count: int,
        options: Options,
        process_of: Callable[[Link], WorkerProcess],
    ) -> None:
        super().__init__(())
        self.count = count
        self._options = options
        self._process_of = process_of
        self._given = list(workers)
        self._members: list[_Member] = []
        self._numbers = 0
        self._past = _Past()
        self._serving: Serving | None = None
        self._linear: ShardsLinear[Any] | None = None
        self._call_log: CallLog | None = None
        self._changed = threading.Event()
        self._wake = threading.Event()
        self._closing = False
        self._attempts: list[threading.Thread] = []
        self._thread: threading.Thread | None = None
        path = options.workers_file
        self._file = None if path is None else WorkersFile(Path(path))

    @property
    def workers(self) -> tuple[WorkerProcess, ...]:
        members = self._members
        return tuple(each.process for each in members) if members else tuple(self._given)

    @workers.setter
    def workers(self, workers: Sequence[WorkerProcess]) -> None:
        pass  # they are the members

    @property
    def statuses(self) -> list[WorkerStatus]:
        return [
            WorkerStatus(
                each.process.endpoint,
                each.state,
                type(each.error).__name__ if each.state == "quarantined" else None,
            )
            for each in self._members
        ]

    @property
    def channels(self) -> list[Channel]:
        replicas = [each.replica for each in self._members]
        return [each.channel for each in replicas if each is not None]

    @property
    def rpc(self) -> Counters:
        """The traffic of all sessions until now."""
        now = [channel.counters for channel in self.channels]
        return Counters.total([*self._past.rpc, *now])

    @property
    def integrity_failures(self) -> int:
        return self._past.lies

    def record(self, call_log: CallLog, first: int) -> None:
        self._call_log = call_log
        for each in self._members:
            self._record(each, each.replica)

    def start(self, *, look_first: bool = False) -> None:
        """Nothing: workers are reached by `serve`."""

    def end(self, error: TSQPError) -> None:
        """Nothing: each worker has its own state."""
        self.state = "lost"

    def close(self) -> None:
        """End local workers that have no session."""

    def stop(self) -> None:
        """Reach no more workers, and stop local ones; safe to call twice."""
        self._closing = True
        self._wake.set()
        deadline = monotonic() + JOIN_S
        for thread in [self._thread, *self._attempts]:
            if thread is not None:
                thread.join(max(0.0, deadline - monotonic()))
        for worker in self.workers:
            worker.close()

    def serve(self, linear: ShardsLinear[Any], serving: Serving) -> None:
        """Begin sessions, and give them to `linear`, now and as long as it is open.

        Returns once each shard has a worker, and the others were tried for a moment.

        Raises:
            WorkerError: a shard has no worker.
        """
        serving.limit.check()
        self._serving = serving
        for worker in self._given[len(self._members) :]:
            self._add(worker)
        for member in self._members:
            member.next_try, member.pause_s = 0.0, POLL_S
        self._linear = linear
        self._wake.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="tsqp-workers", daemon=True)
            self._thread.start()
        began = monotonic()
        while not self._closing:
            self._changed.clear()
            members = self._members
            missing = self._missing(members)
            tried = all(each.tried is linear or each.state == "quarantined" for each in members)
            if tried and missing:
                self._linear = None
                raise self._why(members, missing)
            if not missing and (tried or monotonic() > began + MORE_S):
                return
            self._changed.wait(0.05)
        raise UsageError("The workers were closed.")

    def _missing(self, members: Sequence[_Member]) -> list[int]:
        found = {each.shard for each in members if each.replica is not None}
        return [shard for shard in range(self.count) if shard not in found]

    def _why(self, members: Sequence[_Member], missing: Sequence[int]) -> TSQPError:
        """The error that says why a shard has no worker."""
        mine = [each for each in members if each.shard is None or each.shard in missing]
        for each in mine:
            if each.state != "quarantined" and each.error is not None:
                return type(each.error)(*each.error.args)
        shard = Shard(missing[0] + 1, self.count)
        if self._file is not None:
            return WorkerLost(f"No worker holds {shard}; name one in the file of workers.")
        for each in mine:
            if each.error is not None:
                return type(each.error)(*each.error.args)
        held = ", ".join(
            f"{each.process.endpoint} holds shard {each.shard + 1}"
            for each in members
            if each.shard is not None
        )
        return HandshakeError(f"No worker holds {shard} ({held}); give one for each shard.")

    def _add(self, worker: WorkerProcess, *, later: bool = False) -> None:
        assert self._serving is not None
        member = _Member(worker, self._numbers, Trust(self._serving.limit), served=later)
        self._numbers += 1
        self._members = [*self._members, member]  # others iterate over it

    def _run(self) -> None:
        while not self._closing:
            self._wake.clear()
            try:
                self._read_again()
                for member in self._members:
                    self._try(member)
            except Exception as error:  # a fault of this file: the workers that are there serve
                log.error("an unexpected %s while workers were looked for", type(error).__name__)
            self._wake.wait(POLL_S)

    def _try(self, member: _Member) -> None:
        linear = self._linear
        away = member.replica is None and member.state != "quarantined" and not member.busy
        if linear is None or linear.is_closed or not away or monotonic() < member.next_try:
            return
        member.busy = True
        self._attempts = [each for each in self._attempts if each.is_alive()]
        thread = threading.Thread(
            target=self._attempt, args=(member, linear), name="tsqp-reach", daemon=True
        )
        self._attempts.append(thread)
        thread.start()

    def _attempt(self, member: _Member, linear: ShardsLinear[Any]) -> None:
        try:
            replica = self._begin(member, linear)
            self._record(member, replica)
            member.replica, member.state, member.error = replica, "in use", None
            if member.served:
                log.warning("the worker at %s is used from now on", member.process.endpoint)
            member.served, member.pause_s = True, POLL_S
            linear.adopt(replica)
            if self._closing or member not in self._members:
                replica.leaving = True
        except Exception as error:
            if not isinstance(error, TSQPError):  # a fault of this program
                log.error("an unexpected %s while a worker was reached", type(error).__name__)
                error = WorkerLost(f"The worker at {member.process.endpoint} was not reached.")
            self._ended(member, error)
            if member.process.channel is not None:
                member.process.channel.close()
        finally:
            member.tried, member.busy = linear, False
            self._changed.set()

    def _begin(self, member: _Member, linear: ShardsLinear[Any]) -> Replica[Any]:
        """Shake hands, and let the worker answer a probe if it was away."""
        serving = self._serving
        assert serving is not None
        member.trust.check()
        channel = serving.connect(member.process)
        shard = channel.welcome.shard - 1
        if member.groups is None or member.shard != shard:
            self._give_back(member)
            member.groups, member.shard = serving.sets.take(shard), shard
        # All shards get the same input, so the first one is watched.
        groups = member.groups if shard else serving.watched(member.groups)
        replica = Replica(
            shard, channel, groups, member.trust, lambda error: self._ended(member, error)
        )
        if member.served:
            held = Shard(shard + 1, self.count)
            try:
                probe(replica, held.rows_of, linear.pool, serving.timeout)
            except IntegrityError as error:
                member.trust.end(error)
                raise
        return replica

    def _ended(self, member: _Member, error: TSQPError | None) -> None:
        """The session with a worker ended, or none could be begun."""
        replica, member.replica = member.replica, None
        if replica is not None:
            self._past.rpc = [Counters.total([*self._past.rpc, replica.channel.counters])]
        name = member.process.endpoint
        if isinstance(error, UNTRUSTED):
            member.state = "quarantined"
            member.error = type(error)(*error.args)  # a traceback holds check vectors
            member.groups = None
            self._past.lies += isinstance(error, IntegrityError)
            self._past.refused[member.process.link] = member.error
            log.error("the worker at %s is quarantined: %s", name, str(error))
        elif error is None:
            member.state = "standby"
            if member not in self._members:
                self._give_back(member)
        else:
            if member.state != "lost":
                log.warning("the worker at %s is lost: %s", name, str(error))
            member.state, member.error = "lost", type(error)(*error.args)
            member.next_try = monotonic() + member.pause_s
            member.pause_s = min(2 * member.pause_s, LONGEST_PAUSE_S)
        self._changed.set()

    def _give_back(self, member: _Member) -> None:
        if member.groups is not None and member.shard is not None and self._serving is not None:
            self._serving.sets.give_back(member.shard, member.groups)
        member.groups = None

    def _record(self, member: _Member, replica: Replica[Any] | None) -> None:
        if self._call_log is not None and replica is not None:
            channel = replica.channel
            channel.on_times = self._call_log.taker(member.number, channel.transport)

    def _read_again(self) -> None:
        if self._file is None or (entries := self._file.changed()) is None:
            return
        try:
            links = links_of(entries, self._options)
        except UsageError as error:
            self._file.refuse(error)
            return
        here = {each.process.link: each for each in self._members}
        for link, member in here.items():
            if link not in links:
                log.info("the worker at %s leaves", member.process.endpoint)
                self._members = [each for each in self._members if each is not member]
                if member.replica is not None:
                    member.replica.leaving = True
                elif not member.busy:
                    self._give_back(member)
        for link in links:
            if link not in here:
                self._add(self._process_of(link), later=True)
                if (lie := self._past.refused.get(link)) is not None:
                    self._members[-1].state, self._members[-1].error = "quarantined", lie


def links_of(entries: Sequence[Entry], options: Options) -> tuple[Link, ...]:
    """The links to the workers of a file; raises UsageError if they do not suit the mode."""
    return check_links(
        options.privacy,
        [each.endpoint for each in entries],
        [each.key for each in entries],
        insecure=options.insecure,
        insecure_same_host=options.insecure_same_host,
    )
