"""`--privacy shares`: several workers that do not collude; each sees uniform residues.

[P8] makes new shares of every input and needs no pads; [P6] and [P7] check every row of the sum.
All workers except the last get their share as a seed. Shape suffixes: T tokens; D input and F
output features of a group; B bytes of a row.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tsqp.algebra.params import Field
from tsqp.algebra.residue_bytes import Int32
from tsqp.errors import IntegrityError
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.crypto import kernels
from tsqp.tee.crypto.freivalds import Trust
from tsqp.tee.crypto.rng import fresh_seed
from tsqp.tee.crypto.row_pool import RowPool
from tsqp.tee.offload.masked import (
    Group,
    Groups,
    Masked,
    masked_rows_per_call,
    start_in_blocks,
)
from tsqp.tee.offload.offload import Linear, Pending
from tsqp.tee.placement import MASKED
from tsqp.wire.channel import Channel
from tsqp.wire.messages import Product, SeedProduct, place_of
from tsqp.wire.seeds import expand
from tsqp.wire.tensors import Spec


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows in flight, with everything that is needed to read their answers."""

    tickets: tuple[int, ...]  # one for each worker
    masked: Masked


class SharesLinear:
    """Runs linear layers on n >= 2 workers at once.

    Args:
        channels: one for each worker. The other workers must not be able to read it: one share
            reveals nothing, but all of them together reveal the input.
        timeout: seconds that the workers may take for one call.
        trust: ended by a wrong answer, and shared with sessions that replace this one.
    """

    placement = MASKED

    def __init__(
        self,
        channels: Sequence[Channel],
        groups: Mapping[LinearGroup, Group[Masked]],
        dtype: torch.dtype,
        timeout: float,
        row_pool: RowPool,
        trust: Trust,
    ) -> None:
        assert len(channels) >= 2
        self._channels = tuple(channels)
        self._seeded, self._last = self._channels[:-1], self._channels[-1]
        self._groups: Groups[Group[Masked]] = Groups(groups)
        self._dtype = dtype
        self._timeout = timeout
        self._row_pool = row_pool
        self._trust = trust

    def start(self, request: Linear) -> Pending:
        self._trust.check()
        return start_in_blocks(self, self._groups.of(request), request.x_TD, self._dtype)

    def close(self) -> None:
        self._groups.forget()
        self._row_pool.close()
        for channel in self._channels:
            channel.close()

    def rows_per_call(self, group: Group[Masked]) -> int:
        return min(masked_rows_per_call(channel, group) for channel in self._channels)

    def send(self, group: Group[Masked], x_TD: Tensor) -> _Block:
        """[P8]: send c_1 … c_n-1 as fresh seeds, and c_n = xq - Σ c_i mod p. Does not wait."""
        self._trust.check()
        seeds = [fresh_seed() for _ in self._seeded]
        tickets: list[int] = []
        try:
            for channel, seed in zip(self._seeded, seeds, strict=True):
                tickets.append(_send_seed(channel, group, len(x_TD), seed))
            ticket, masked = self._send_rest(group, x_TD, seeds)
        except BaseException:
            self._cancel(tickets)
            raise
        return _Block((*tickets, ticket), masked)

    def receive(self, group: Group[Masked], block: _Block, y_TF: Tensor) -> float:
        """Wait for all answers, and check and unmask their sum ([P8], [P7]).

        Returns:
            the seconds spent waiting.

        Raises:
            IntegrityError: the check failed; no worker is asked again.
        """
        deadline = time.monotonic() + self._timeout
        waited_s = 0.0
        others_TF = np.zeros((len(block.masked.unit_T), group.features), np.int32)  # -Σ z_i mod p
        try:
            for channel, ticket in zip(self._channels, block.tickets, strict=True):
                began = time.monotonic()
                with channel.wait(ticket, deadline) as reply:
                    waited_s += time.monotonic() - began
                    self._trust.check()
                    z_TB = reply.outputs[0]
                    if channel is self._last:
                        kept = block.masked
                        group.check_and_unmask(
                            z_TB, others_TF, kept, y_TF, self._names, self._row_pool
                        )
                        continue
                    z_np = kernels.aligned(z_TB)
                    if kernels.subtract_answer(z_np, group.field, others_TF) != kernels.ALL_ROWS:
                        raise group.wrong_product(self._names)
        except IntegrityError as error:
            # The workers and the check vectors are never used again [P7].
            self._trust.end(error)
            self.close()
            raise
        return waited_s

    def cancel(self, block: _Block) -> None:
        self._cancel(block.tickets)

    def _send_rest(
        self, group: Group[Masked], x_TD: Tensor, seeds: Sequence[bytes]
    ) -> tuple[int, Masked]:
        width = group.field.residue_bytes * group.width
        operation = Product(*place_of(group.linear), group.field.name)
        inputs = [Spec((len(x_TD), width), torch.uint8)]
        slot = self._last.reserve(operation, inputs, [_answer(group, len(x_TD))])
        try:
            rest_TD = _minus_sum(seeds, (len(x_TD), group.width), group.field)
            masked = group.mask(x_TD, rest_TD, slot.inputs[0], self._row_pool)
        except BaseException:
            self._last.discard(slot)
            raise
        return self._last.submit(slot), masked

    def _cancel(self, tickets: Sequence[int]) -> None:
        for channel, ticket in zip(self._channels, tickets, strict=False):
            channel.cancel(ticket)

    @property
    def _names(self) -> str:
        *names, last = (channel.endpoint for channel in self._channels)
        return f"One of the workers at {', '.join(names)} and {last}"


def _send_seed(channel: Channel, group: Group[Masked], rows: int, seed: bytes) -> int:
    operation = SeedProduct(*place_of(group.linear), group.field.name, rows, seed)
    return channel.submit(channel.reserve(operation, [], [_answer(group, rows)]))


def _answer(group: Group[Masked], rows: int) -> Spec:
    return Spec((rows, group.field.residue_bytes * group.features), torch.uint8)


def _minus_sum(seeds: Sequence[bytes], shape: tuple[int, int], field: Field) -> Int32:
    """-Σ c_i mod p of the shares that the seeds stand for."""
    rest_TD, share_TD = np.zeros(shape, np.int32), np.empty(shape, np.int32)
    for seed in seeds:
        expand(seed, share_TD.reshape(-1), field)
        rest_TD -= share_TD
        rest_TD += (rest_TD < 0) * np.int32(field.p)
    return rest_TD
