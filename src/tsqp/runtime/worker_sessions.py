"""The present sessions of an `LLM` with its workers, which new ones replace after their end."""

from collections.abc import Iterable, Sequence
from time import process_time

from tsqp.errors import TSQPError
from tsqp.runtime.failover import Alternative, Begin, Failover
from tsqp.tee.call_log import CallLog
from tsqp.tee.offload.offload import Offload
from tsqp.wire.channel import Channel


class WorkerSessions:
    """Begins sessions with the workers of an `LLM`: with one alternative at a time.

    Attributes:
        offload: the offload of the present sessions.
        pads: its pool of pads, if it has one.
    """

    def __init__(self, failover: Failover, begins: Sequence[Begin]) -> None:
        """Begin the first session.

        Args:
            begins: one for each alternative.

        Raises:
            TSQPError: see `Failover.attempt`.
        """
        self._failover = failover
        self._call_log: CallLog | None = None
        self._background_cpu_s = 0.0  # of the pools of earlier sessions
        for alternative, begin in zip(failover.alternatives, begins, strict=True):
            if alternative.state != "quarantined":  # for its hints
                alternative.begin = begin
        self.offload, self.pads = failover.attempt(Alternative.open)

    @property
    def channels(self) -> list[Channel]:
        """Those of the alternative that is used."""
        return self._failover.current.channels

    @property
    def transport(self) -> str:
        """See `LLM.transport`."""
        return _each_once(channel.transport for channel in self.channels) or "none"

    @property
    def transport_reason(self) -> str:
        """See `LLM.transport_reason`."""
        return _each_once(channel.reason for channel in self.channels) or "no worker"

    def record(self, call_log: CallLog) -> None:
        """Record the calls of these sessions, and of those that replace them."""
        self._call_log = call_log
        self._failover.record(call_log)

    def end(self, error: TSQPError) -> None:
        """Tell with which error the present sessions ended."""
        self._failover.end(error)

    def renew(self) -> Offload:
        """Replace the sessions that ended. Local workers are started again.

        Raises:
            TSQPError: see `Failover.attempt`.
        """
        earlier = self.pads
        self.offload, self.pads = self._failover.attempt(Alternative.open)
        if earlier is not None:
            self._background_cpu_s += earlier.stats.background_cpu_s
        if self._call_log is not None:
            self.record(self._call_log)
        return self.offload

    def cpu_s(self) -> float:
        """Processor time of this process, without the time to make pads ahead."""
        now = process_time() if self.pads is None else self.pads.other_cpu_s()
        return now - self._background_cpu_s


def _each_once(words: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(words))
