"""What begins the sessions of `pad`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tsqp.model.linear_group import LinearGroup
from tsqp.runtime.check_sets import CheckSets
from tsqp.runtime.failover import Begin
from tsqp.runtime.replicas import Connect, Replicas, Serving
from tsqp.runtime.worker_link import WorkerProcess
from tsqp.tee.crypto.freivalds import FailureLimit, Trust
from tsqp.tee.crypto.pad_pool import PadPool
from tsqp.tee.crypto.row_pool import RowPool
from tsqp.tee.offload.masked import Group, LinearPart, PrivateOffload
from tsqp.tee.offload.offload import Offload
from tsqp.tee.offload.pad import PadLinear
from tsqp.tee.offload.shards import ShardsLinear

Set = Mapping[LinearGroup, Group[Any]]


@dataclass(frozen=True)
class PadSessions:
    """Makes sessions, each with pads of its own.

    Attributes:
        groups: those of the model.
        pool: makes an empty stock of pads.
        row_pool: makes the threads of a session.
        private: makes the offload around the linear part.
        watched: the same groups, of which one may be sampled.
        limit: of the process.
    """

    connect: Connect
    groups: Sequence[LinearGroup]
    pool: Callable[[], PadPool]
    row_pool: Callable[[], RowPool]
    private: Callable[[LinearPart], PrivateOffload]
    watched: Callable[[Set], Set]
    dtype: torch.dtype
    timeout: float
    limit: FailureLimit

    def one_at_a_time(self, workers: Sequence[WorkerProcess], sets: Sequence[Set]) -> list[Begin]:
        """Sessions with each worker, which has the check vectors of its set."""
        pairs = zip(workers, sets, strict=True)
        return [
            partial(self._begin, each, self.watched(groups), Trust(self.limit))
            for each, groups in pairs
        ]

    def together(self, replicas: Replicas, sets: CheckSets[Any]) -> list[Begin]:
        """Sessions with one or more workers of each shard."""
        return [partial(self._begin_all, replicas, sets)]

    def _begin(self, worker: WorkerProcess, groups: Set, trust: Trust) -> tuple[Offload, PadPool]:
        trust.check()
        channel, pool = self.connect(worker), self.pool()
        linear: PadLinear[Any] = PadLinear(
            channel, groups, pool, self.dtype, self.timeout, self.row_pool(), trust
        )
        return self.private(linear), pool

    def _begin_all(self, replicas: Replicas, sets: CheckSets[Any]) -> tuple[Offload, PadPool]:
        self.limit.check()
        pool = self.pool()
        linear: ShardsLinear[Any] = ShardsLinear(
            self.groups, replicas.count, pool, self.dtype, self.timeout, self.row_pool()
        )
        serving = Serving(self.connect, sets, self.watched, self.timeout, self.limit)
        try:
            replicas.serve(linear, serving)
        except BaseException:
            linear.close()
            raise
        return self.private(linear), pool
