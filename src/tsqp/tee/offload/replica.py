"""A session with one of several workers that hold the same rows, and the choice among them."""

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import torch
from torch import Tensor

from tsqp.errors import TSQPError
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.crypto.freivalds import Trust
from tsqp.tee.crypto.pad_pool import PadPool
from tsqp.tee.crypto.row_pool import RowPool
from tsqp.tee.offload.masked import Group, Kept, masked_rows_per_call
from tsqp.wire.channel import Channel, Slot
from tsqp.wire.messages import Product, place_of
from tsqp.wire.tensors import Spec

OnEnd = Callable[[TSQPError | None], None]


@dataclass(eq=False, slots=True)
class Replica(Generic[Kept]):
    """A session with one worker of one shard.

    Attributes:
        shard: the place of its shard, from 0.
        channel: used by one thread at a time: the one that begins the session, then the engine's.
        groups: of its shard, with check vectors that are used with this worker only [P6].
        trust: ended by a wrong answer.
        on_end: called once, with the error that ended the session, or None if it was closed.
        open_calls: how many calls it has not answered yet.
        last_call: the number of its last call among those of all replicas.
        leaving: whether it gets no more calls. Any thread may set this.
    """

    shard: int
    channel: Channel
    groups: Mapping[LinearGroup, Group[Kept]]
    trust: Trust
    on_end: OnEnd
    open_calls: int = 0
    last_call: int = 0
    leaving: bool = False

    @property
    def name(self) -> str:
        """Names the worker at the beginning of a message."""
        return f"The worker at {self.channel.endpoint}"

    def takes(self, linear: LinearGroup, rows: int) -> bool:
        """Whether so many rows fit into one call."""
        return masked_rows_per_call(self.channel, self.groups[linear]) >= rows

    def reserve(self, linear: LinearGroup, rows: int) -> Slot:
        """Reserve a call; see `Channel.reserve`."""
        group = self.groups[linear]
        each = group.field.residue_bytes
        return self.channel.reserve(
            Product(*place_of(linear), group.field.name),
            [Spec((rows, each * group.width), torch.uint8)],
            [Spec((rows, each * group.features), torch.uint8)],
        )


def least_loaded(replicas: Sequence[Replica[Any]]) -> Replica[Any]:
    """The one with the fewest open calls; of several, the one that was asked longest ago.

    So blocks of a long prompt are computed side by side, and a replica that fails is noticed soon.
    """
    return min(replicas, key=lambda each: (each.open_calls, each.last_call))


def probe(
    replica: Replica[Any],
    columns_of: Callable[[LinearGroup], slice],
    pool: PadPool,
    timeout: float,
) -> None:
    """Let a worker multiply a random row of a random group, as in any other call, and check it.

    Args:
        columns_of: which output features of a group the worker has.
        pool: of which a fresh mask is taken.
        timeout: seconds that the worker may take.

    Raises:
        WorkerError: the worker is lost, or the answer is wrong.
        TSQPError: the pool is closed.
    """
    linear = secrets.choice(list(replica.groups))
    group, row_pool = replica.groups[linear], RowPool(1)
    row = bytearray(secrets.token_bytes(group.width))
    x_TD = torch.frombuffer(row, dtype=torch.uint8).float()[None] - 127.5
    y_TF: Tensor = torch.empty(1, group.features)
    slot = replica.reserve(linear, 1)
    pads = pool.take(linear, 1)
    try:
        kept = group.mask(x_TD, pads.r_ND, slot.inputs[0], row_pool)
        ticket = replica.channel.submit(slot)
        with replica.channel.wait(ticket, time.monotonic() + timeout) as reply:
            u_TF = pads.products(columns_of(linear))
            try:
                group.check_and_unmask(reply.outputs[0], u_TF, kept, y_TF, replica.name, row_pool)
            finally:
                u_TF.fill(0)  # it may be a copy
    finally:
        pads.wipe()
        row_pool.close()
