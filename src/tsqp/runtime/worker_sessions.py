"""The present sessions of an `LLM` with its workers, which new ones replace after a loss."""

from collections.abc import Iterable, Sequence
from time import process_time

from tsqp.runtime.build import Begin
from tsqp.runtime.worker_link import WorkerProcess
from tsqp.tee.call_log import CallLog
from tsqp.tee.offload.offload import Offload
from tsqp.wire.channel import Channel


class WorkerSessions:
    """Begins sessions with all workers of an `LLM`.

    Attributes:
        offload: the offload of the present sessions.
        pads: its pool of pads, if it has one.
    """

    def __init__(self, workers: Sequence[WorkerProcess], begin: Begin) -> None:
        self._workers = workers
        self._call_log: CallLog | None = None
        self._background_cpu_s = 0.0  # of the pools of earlier sessions
        self.offload, self.pads = begin()

    @property
    def channels(self) -> list[Channel]:
        return [worker.channel for worker in self._workers if worker.channel is not None]

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
        for number, channel in enumerate(self.channels):
            channel.on_times = call_log.taker(number, channel.transport)

    def renew(self, begin: Begin) -> Offload:
        """Replace all sessions after one was lost. Local workers are started again.

        Raises:
            TSQPError: a worker cannot be reached, or serves something else now.
        """
        for worker in self._workers:
            worker.restart()
        earlier = self.pads
        self.offload, self.pads = begin()
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
