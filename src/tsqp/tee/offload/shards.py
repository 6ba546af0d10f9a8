"""`--privacy pad` with several workers: each multiplies all or some output features of a group.

An input is masked once [P5], [P12], and all shards get the same bytes. So together they know no
more than one of them. Each answer is checked with vectors of its worker [P6], [P7], [P13], before
any of its numbers is used, so that a wrong one names its worker. If a worker fails, the same rows
go to another one of its shard with fresh masks. Shape suffixes: T tokens; D input and F output
features of a group; B bytes of a row.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Generic

import torch
from torch import Tensor

from tsqp.errors import (
    IntegrityError,
    LatticeError,
    ProtocolError,
    RemoteError,
    TSQPError,
    WorkerError,
    WorkerLost,
)
from tsqp.model.linear_group import LinearGroup
from tsqp.model.shard import Shard, all_shards
from tsqp.tee.crypto.pad_pool import PadPool
from tsqp.tee.crypto.pads import Pads
from tsqp.tee.crypto.row_pool import RowPool
from tsqp.tee.offload.masked import (
    Groups,
    Kept,
    MaskedGroup,
    masked_rows_per_call,
    start_in_blocks,
)
from tsqp.tee.offload.offload import Linear, Pending
from tsqp.tee.offload.replica import Replica, least_loaded
from tsqp.tee.placement import MASKED
from tsqp.wire.call_times import AWAY, PADS, end_stage
from tsqp.wire.channel import Slot


def cut_groups(
    groups: Mapping[LinearGroup, MaskedGroup], weights_FD: Mapping[LinearGroup, Tensor], of: Shard
) -> dict[LinearGroup, MaskedGroup]:
    """The groups of one shard, with check vectors that are drawn now [P6]."""
    return {key: each.of_rows(of.rows_of(key), weights_FD[key]) for key, each in groups.items()}


class ShardedGroup:
    """One group of linear layers, cut into shards.

    Attributes:
        features: F of all shards together.
        columns: which of them each shard has.
    """

    def __init__(self, linear: LinearGroup, count: int) -> None:
        self.linear = linear
        self.features = linear.features
        self.columns = [shard.rows_of(linear) for shard in all_shards(count)]


@dataclass(slots=True)
class _Call(Generic[Kept]):
    """Rows that one worker got, with everything that is needed to read its answer."""

    replica: Replica[Kept]
    ticket: int
    pads: Pads
    kept: Kept


@dataclass(slots=True)
class _Block(Generic[Kept]):
    """Rows that were sent to all shards; None for one that got none, or has answered."""

    x_TD: Tensor
    calls: list[_Call[Kept] | None]


class ShardsLinear(Generic[Kept]):
    """Runs linear layers on n >= 1 shards at once, each held by one worker or by several.

    The engine's thread calls everything except `adopt`.

    Args:
        groups: those of the model.
        count: n.
        timeout: seconds that a worker may take for one call.
    """

    placement = MASKED

    def __init__(
        self,
        groups: Iterable[LinearGroup],
        count: int,
        pool: PadPool,
        dtype: torch.dtype,
        timeout: float,
        row_pool: RowPool,
    ) -> None:
        self.pool = pool
        self._groups = Groups({linear: ShardedGroup(linear, count) for linear in groups})
        self._replicas: list[list[Replica[Kept]]] = [[] for _ in range(count)]
        self._arrived: SimpleQueue[Replica[Kept]] = SimpleQueue()
        self._dtype = dtype
        self._timeout = timeout
        self._row_pool = row_pool
        self._calls = 0
        self._is_closed = False
        self._failure: TSQPError | None = None

    @property
    def is_closed(self) -> bool:
        """Whether no session can be used any more."""
        return self._is_closed

    def adopt(self, replica: Replica[Kept]) -> None:
        """Let a worker have calls from now on. Any thread may call this."""
        self._arrived.put(replica)
        if self._is_closed:
            self._refuse_arrived()

    def start(self, request: Linear) -> Pending:
        if self._failure is not None:
            raise type(self._failure)(*self._failure.args)
        return start_in_blocks(self, self._groups.of(request), request.x_TD, self._dtype)

    def close(self) -> None:
        self._is_closed = True
        self._groups.forget()
        self.pool.close()
        self._row_pool.close()
        self._refuse_arrived()
        for replicas in self._replicas:
            while replicas:
                self._end(replicas[0], None)

    def rows_per_call(self, group: ShardedGroup) -> int:
        self._admit()
        return min(
            (
                masked_rows_per_call(each.channel, each.groups[group.linear])
                for replicas in self._replicas
                for each in replicas
            ),
            default=1,
        )

    def send(self, group: ShardedGroup, x_TD: Tensor) -> _Block[Kept]:
        """[P4], [P5], [P12]: take fresh pads, mask once, and submit to all. Does not wait."""
        self._admit()
        block: _Block[Kept] = _Block(x_TD, [None] * len(self._replicas))
        try:
            self._send(group, block, range(len(self._replicas)))
        except BaseException:
            self.cancel(block)
            raise
        return block

    def receive(self, group: ShardedGroup, block: _Block[Kept], y_TF: Tensor) -> float:
        """Wait for each answer in turn, check it, and unmask it into its columns of y.

        A worker that fails is passed over, and another one of its shard gets the rows with fresh
        masks. Pads are wiped in any case.

        Returns:
            the seconds spent waiting.

        Raises:
            WorkerError: the last worker of a shard failed.
            LatticeError: a mask was wrong; no worker is asked again.
        """
        began = time.monotonic()
        checking_s = 0.0
        for i, columns in enumerate(group.columns):
            while (call := block.calls[i]) is not None:
                try:
                    with call.replica.channel.wait(
                        call.ticket, time.monotonic() + self._timeout
                    ) as reply:
                        arrived = time.monotonic()
                        y_TF[:, columns] = self._unmasked(group, call, columns, reply.outputs[0])
                        checking_s += time.monotonic() - arrived
                except WorkerError as error:
                    self._pass_over(call.replica, error)
                    self._forget(block, i)
                    self._send(group, block, [i])
                else:
                    self._forget(block, i)
        return time.monotonic() - began - checking_s

    def cancel(self, block: _Block[Kept]) -> None:
        for i, call in enumerate(block.calls):
            if call is not None:
                call.replica.channel.cancel(call.ticket)
                self._forget(block, i)

    def _send(self, group: ShardedGroup, block: _Block[Kept], places: Sequence[int]) -> None:
        """Send the rows of a block to these shards, all with the same fresh mask.

        A worker that is gone is noticed here or by `receive`. In both cases another one gets them
        with another mask.
        """
        missing = list(places)
        while missing:
            for i in self._submit(group, block, missing):
                missing.remove(i)

    def _submit(self, group: ShardedGroup, block: _Block[Kept], places: Sequence[int]) -> list[int]:
        """Try to send the rows of a block to one worker of each shard; returns which got them."""
        x_TD, pads = block.x_TD, None
        slots: list[tuple[int, Replica[Kept], Slot]] = []
        sent: list[int] = []
        try:
            for i in places:
                slots.append((i, *self._reserve(group, i, len(x_TD))))
            pads = self.pool.take(group.linear, len(x_TD))
            end_stage(slots[0][2].times, PADS)
            c_TB = slots[0][2].inputs[0]
            if len(slots) > 1:  # a worker may change its memory before the others get their copies
                c_TB = torch.empty_like(c_TB)
            first, *others = (replica.groups[group.linear] for _, replica, _ in slots)
            masked = first.mask_for(others, x_TD, pads.r_ND, c_TB, self._row_pool)
            for (i, replica, slot), kept in zip(list(slots), masked, strict=True):
                if i != places[0]:
                    end_stage(slot.times, AWAY)  # masks count as time of the first call
                if len(masked) > 1:
                    slot.inputs[0].copy_(c_TB)
                slots.pop(0)  # no matter what comes, it cannot be given back any more
                try:
                    ticket = replica.channel.submit(slot)
                except WorkerError as error:
                    self._pass_over(replica, error)
                    continue
                block.calls[i] = _Call(replica, ticket, pads, kept)
                self._calls += 1
                replica.open_calls, replica.last_call = replica.open_calls + 1, self._calls
                sent.append(i)
        finally:
            if pads is not None and not sent:
                pads.wipe()
            for _, replica, slot in slots:
                replica.channel.discard(slot)
        return sent

    def _reserve(self, group: ShardedGroup, i: int, rows: int) -> tuple[Replica[Kept], Slot]:
        while True:
            able = [each for each in self._replicas[i] if not each.leaving]
            able = [each for each in able if each.takes(group.linear, rows)]
            if not able:
                raise WorkerLost(f"No worker is left for {Shard(i + 1, len(self._replicas))}.")
            replica = least_loaded(able)
            try:
                replica.trust.check()
                return replica, replica.reserve(group.linear, rows)
            except WorkerError as error:
                self._pass_over(replica, error)

    def _unmasked(
        self, group: ShardedGroup, call: _Call[Kept], columns: slice, z_TB: Tensor
    ) -> Tensor:
        """The product of one shard, float32, once its answer has passed the check."""
        replica = call.replica
        replica.trust.check()
        shard = replica.groups[group.linear]
        u_TF = call.pads.products(columns)
        part_TF = torch.empty(len(z_TB), shard.features)
        try:
            shard.check_and_unmask(z_TB, u_TF, call.kept, part_TF, replica.name, self._row_pool)
        except (IntegrityError, LatticeError) as error:
            # This worker, the pads and its check vectors are never used again [P7].
            replica.trust.end(error)
            self.pool.discard()
            if isinstance(error, LatticeError):
                self._failure = type(error)(*error.args)
                self.close()
            raise
        finally:
            u_TF.fill(0)  # it may be a copy
        return part_TF

    def _pass_over(self, replica: Replica[Kept], error: WorkerError) -> None:
        """End the session with a worker that failed; raises the error if its shard has no other.

        A worker that only reported a failure keeps its session then.
        """
        replicas = self._replicas[replica.shard]
        others = [each for each in replicas if each is not replica and not each.leaving]
        if isinstance(error, RemoteError) and not others:
            raise error
        if replica in replicas:
            self._end(replica, error)
        if not others:
            if isinstance(error, IntegrityError | ProtocolError):
                self._failure = type(error)(*error.args)  # a traceback holds check vectors
            raise error

    def _end(self, replica: Replica[Kept], error: TSQPError | None) -> None:
        self._replicas[replica.shard].remove(replica)
        replica.on_end(error)
        replica.channel.close()

    def _forget(self, block: _Block[Kept], i: int) -> None:
        """A call has ended: its pads, and a worker that only had to end its calls."""
        call, block.calls[i] = block.calls[i], None
        assert call is not None
        if all(each is None or each.pads is not call.pads for each in block.calls):
            call.pads.wipe()
        replica = call.replica
        replica.open_calls -= 1
        if replica.leaving and not replica.open_calls and replica in self._replicas[replica.shard]:
            self._end(replica, None)

    def _admit(self) -> None:
        """Take the workers that have come, and let those go that are to leave."""
        with suppress(Empty):
            while True:
                replica = self._arrived.get_nowait()
                self._replicas[replica.shard].append(replica)
        for replicas in self._replicas:
            for replica in [each for each in replicas if each.leaving and not each.open_calls]:
                self._end(replica, None)

    def _refuse_arrived(self) -> None:
        with suppress(Empty):
            while True:
                replica = self._arrived.get_nowait()
                replica.on_end(None)
                replica.channel.close()
