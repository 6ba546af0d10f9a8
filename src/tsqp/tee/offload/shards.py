"""`--privacy pad` with shards: each of several untrusted workers multiplies some output features.

An input is masked once [P5], [P12], and all workers get the same bytes. So together they know no
more than one of them. Each answer is checked with vectors of its own [P6], [P7], [P13], before any
of its numbers is used, so that a wrong one names its worker. Shape suffixes: T tokens; D input and
F output features of a group; B bytes of a row.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic

import torch
from torch import Tensor

from tsqp.errors import IntegrityError, LatticeError
from tsqp.model.linear_group import LinearGroup
from tsqp.model.shard import all_shards
from tsqp.tee.crypto.freivalds import Trust
from tsqp.tee.crypto.pad_pool import PadPool
from tsqp.tee.crypto.pads import Pads
from tsqp.tee.crypto.row_pool import RowPool
from tsqp.tee.offload.masked import (
    Group,
    Groups,
    Kept,
    MaskedGroup,
    masked_rows_per_call,
    start_in_blocks,
)
from tsqp.tee.offload.offload import Linear, Pending
from tsqp.tee.placement import MASKED
from tsqp.wire.call_times import AWAY, PADS, end_stage
from tsqp.wire.channel import Channel, Slot
from tsqp.wire.messages import Product, place_of
from tsqp.wire.tensors import Spec


def cut_groups(
    groups: Mapping[LinearGroup, MaskedGroup], weights_FD: Mapping[LinearGroup, Tensor], count: int
) -> list[dict[LinearGroup, MaskedGroup]]:
    """The groups of each of `count` shards."""
    return [
        {key: each.of_rows(shard.rows_of(key), weights_FD[key]) for key, each in groups.items()}
        for shard in all_shards(count)
    ]


class ShardedGroup(Generic[Kept]):
    """One group of linear layers, cut into shards.

    Args:
        shards: in the order of their output features, with the bounds of the whole group.

    Attributes:
        features: F of all shards together.
        columns: which of them each shard has.
    """

    def __init__(self, shards: Sequence[Group[Kept]]) -> None:
        self.shards = tuple(shards)
        self.linear = shards[0].linear
        self.columns: list[slice] = []
        self.features = 0
        for shard in shards:
            self.columns.append(slice(self.features, self.features + shard.features))
            self.features += shard.features
        assert self.features == self.linear.features  # each number of the answer has its worker

    def mask(self, x_TD: Tensor, pads: Pads, row_pool: RowPool) -> tuple[Tensor, list[Kept]]:
        """c, in private memory, and what each shard keeps for these rows.

        Raises:
            NumericalError: x is not finite.
        """
        first, *others = self.shards
        c_TB = torch.empty(len(x_TD), first.field.residue_bytes * first.width, dtype=torch.uint8)
        kept = [first.mask(x_TD, pads.r_ND, c_TB, row_pool)]
        # Only the expected values differ. One mask hides one input, so only the first c is sent.
        unsent_TB = torch.empty_like(c_TB)
        kept += [each.mask(x_TD, pads.r_ND, unsent_TB, row_pool) for each in others]
        return c_TB, kept


@dataclass(frozen=True, slots=True)
class _Block(Generic[Kept]):
    """Rows that were sent to all shards, with everything that is needed to read their answers."""

    tickets: list[int]
    pads: Pads
    kept: list[Kept]


class ShardsLinear(Generic[Kept]):
    """Runs linear layers on n >= 2 workers at once, each with one shard of every group.

    Args:
        channels: to the worker of each shard, in their order.
        shards: the groups of each shard, in the same order.
        timeout: seconds that the workers may take for one call.
        trust: ended by a wrong answer, and shared with sessions that replace this one.
    """

    placement = MASKED

    def __init__(
        self,
        channels: Sequence[Channel],
        shards: Sequence[Mapping[LinearGroup, Group[Kept]]],
        pool: PadPool,
        dtype: torch.dtype,
        timeout: float,
        row_pool: RowPool,
        trust: Trust,
    ) -> None:
        assert len(channels) == len(shards) >= 2
        self._channels = tuple(channels)
        self._groups = Groups(
            {linear: ShardedGroup([each[linear] for each in shards]) for linear in shards[0]}
        )
        self._pool = pool
        self._dtype = dtype
        self._timeout = timeout
        self._row_pool = row_pool
        self._trust = trust

    def start(self, request: Linear) -> Pending:
        self._trust.check()
        return start_in_blocks(self, self._groups.of(request), request.x_TD, self._dtype)

    def close(self) -> None:
        self._groups.forget()
        self._pool.close()
        self._row_pool.close()
        for channel in self._channels:
            channel.close()

    def rows_per_call(self, group: ShardedGroup[Kept]) -> int:
        pairs = zip(self._channels, group.shards, strict=True)
        return min(masked_rows_per_call(channel, shard) for channel, shard in pairs)

    def send(self, group: ShardedGroup[Kept], x_TD: Tensor) -> _Block[Kept]:
        """[P4], [P5], [P12]: take fresh pads, mask once, and submit to all. Does not wait."""
        self._trust.check()
        slots: list[Slot] = []
        tickets: list[int] = []
        pads: Pads | None = None
        try:
            for channel, shard in zip(self._channels, group.shards, strict=True):
                slots.append(_reserve(channel, shard, len(x_TD)))
            pads = self._pool.take(group.linear, len(x_TD))
            end_stage(slots[0].times, PADS)
            c_TB, kept = group.mask(x_TD, pads, self._row_pool)
            for channel, slot in zip(self._channels, slots, strict=True):
                if slot is not slots[0]:
                    end_stage(slot.times, AWAY)  # masks count as time of the first call
                slot.inputs[0].copy_(c_TB)
                tickets.append(channel.submit(slot))
        except BaseException:
            if pads is not None:
                pads.wipe()
            self._cancel(tickets)
            for channel, slot in list(zip(self._channels, slots, strict=False))[len(tickets) :]:
                channel.discard(slot)
            raise
        return _Block(tickets, pads, kept)

    def receive(self, group: ShardedGroup[Kept], block: _Block[Kept], y_TF: Tensor) -> float:
        """Wait for each answer in turn, check it, and unmask it into its columns of y.

        The pads are wiped in any case.

        Returns:
            the seconds spent waiting.

        Raises:
            IntegrityError, LatticeError: a check failed; no worker is asked again.
        """
        deadline = time.monotonic() + self._timeout
        waited_s = 0.0
        try:
            for i, columns in enumerate(group.columns):
                began = time.monotonic()
                with self._channels[i].wait(block.tickets[i], deadline) as reply:
                    waited_s += time.monotonic() - began
                    y_TF[:, columns] = self._unmasked(group, i, block, reply.outputs[0])
        finally:
            block.pads.wipe()
        return waited_s

    def cancel(self, block: _Block[Kept]) -> None:
        block.pads.wipe()
        self._cancel(block.tickets)

    def _unmasked(
        self, group: ShardedGroup[Kept], i: int, block: _Block[Kept], z_TB: Tensor
    ) -> Tensor:
        """The product of one shard, float32, once its answer has passed the check."""
        self._trust.check()
        shard, worker = group.shards[i], f"The worker at {self._channels[i].endpoint}"
        u_TF = block.pads.products(group.columns[i])
        part_TF = torch.empty(len(z_TB), shard.features)
        try:
            shard.check_and_unmask(z_TB, u_TF, block.kept[i], part_TF, worker, self._row_pool)
        except (IntegrityError, LatticeError) as error:
            # These workers, their pads and check vectors are never used again [P7].
            self._trust.end(error)
            self.close()
            raise
        finally:
            u_TF.fill(0)  # it may be a copy
        return part_TF

    def _cancel(self, tickets: Sequence[int]) -> None:
        for channel, ticket in zip(self._channels, tickets, strict=False):
            channel.cancel(ticket)


def _reserve(channel: Channel, shard: Group[Kept], rows: int) -> Slot:
    each = shard.field.residue_bytes
    return channel.reserve(
        Product(*place_of(shard.linear), shard.field.name),
        [Spec((rows, each * shard.width), torch.uint8)],
        [Spec((rows, each * shard.features), torch.uint8)],
    )
