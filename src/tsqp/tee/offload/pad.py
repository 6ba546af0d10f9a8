"""`--privacy pad`: one untrusted worker, which sees random-looking residues and is always checked.

Pads come from a pool [P4]; [P5] masks and unmasks, [P6] and [P7] check every row. Lattice masks
come from the same pool; [P12] masks, [P13] checks every row, and [P12] unmasks it after that. Shape
suffixes: T tokens; D input and F output features of a group.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic

import torch
from torch import Tensor

from tsqp.errors import IntegrityError, LatticeError
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.crypto.freivalds import Trust
from tsqp.tee.crypto.pad_pool import PadPool
from tsqp.tee.crypto.pads import Pads
from tsqp.tee.crypto.row_pool import RowPool
from tsqp.tee.offload.masked import (
    Group,
    Groups,
    Kept,
    masked_rows_per_call,
    start_in_blocks,
)
from tsqp.tee.offload.offload import Linear, Pending
from tsqp.tee.placement import MASKED
from tsqp.wire.call_times import PADS, end_stage
from tsqp.wire.channel import Channel
from tsqp.wire.messages import Product, place_of
from tsqp.wire.tensors import Spec


@dataclass(frozen=True, slots=True)
class _Block(Generic[Kept]):
    """Rows that were sent, with everything that is needed to read their answer."""

    ticket: int
    pads: Pads
    masked: Kept


class PadLinear(Generic[Kept]):
    """Linear layers by one worker.

    Args:
        timeout: seconds that the worker may take for one call.
        trust: ended by a wrong answer, and shared with sessions that replace this one.
    """

    placement = MASKED

    def __init__(
        self,
        channel: Channel,
        groups: Mapping[LinearGroup, Group[Kept]],
        pool: PadPool,
        dtype: torch.dtype,
        timeout: float,
        row_pool: RowPool,
        trust: Trust,
    ) -> None:
        self._channel = channel
        self._groups = Groups(groups)
        self._pool = pool
        self._dtype = dtype
        self._timeout = timeout
        self._row_pool = row_pool
        self._trust = trust
        self._forms: dict[LinearGroup, tuple[Product, tuple[Spec, ...], tuple[Spec, ...]]] = {}

    def start(self, request: Linear) -> Pending:
        self._trust.check()
        return start_in_blocks(self, self._groups.of(request), request.x_TD, self._dtype)

    def close(self) -> None:
        self._groups.forget()
        self._pool.close()
        self._row_pool.close()
        self._channel.close()

    def rows_per_call(self, group: Group[Kept]) -> int:
        return masked_rows_per_call(self._channel, group)

    def send(self, group: Group[Kept], x_TD: Tensor) -> _Block[Kept]:
        """[P4], [P5], [P12]: take fresh pads, mask, and submit."""
        self._trust.check()
        rows = x_TD.shape[0]
        slot = self._channel.reserve(*self._form(group, rows))
        pads: Pads | None = None
        try:
            pads = self._pool.take(group.linear, rows)
            end_stage(slot.times, PADS)
            masked = group.mask(x_TD, pads.r_ND, slot.inputs[0], self._row_pool)
        except BaseException:
            if pads is not None:
                pads.wipe()
            self._channel.discard(slot)
            raise
        try:
            return _Block(self._channel.submit(slot), pads, masked)
        except BaseException:
            pads.wipe()
            raise

    def _form(
        self, group: Group[Kept], rows: int
    ) -> tuple[Product, tuple[Spec, ...], tuple[Spec, ...]]:
        """The operation, inputs and outputs of a call; remembered for one row, as in decode."""
        form = self._forms.get(group.linear) if rows == 1 else None
        if form is None:
            each = group.field.residue_bytes
            form = (
                Product(*place_of(group.linear), group.field.name),
                (Spec((rows, each * group.width), torch.uint8),),
                (Spec((rows, each * group.features), torch.uint8),),
            )
            if rows == 1:
                self._forms[group.linear] = form
        return form

    def receive(self, group: Group[Kept], block: _Block[Kept], y_TF: Tensor) -> float:
        """Wait for the answer, check it, and unmask it ([P5], [P7], or [P13], [P12]).

        The pads are wiped in any case.

        Returns:
            the seconds spent waiting.

        Raises:
            IntegrityError, LatticeError: a check failed; no worker is asked again.
        """
        began = time.monotonic()
        try:
            with self._channel.wait(block.ticket, began + self._timeout) as reply:
                waited_s = time.monotonic() - began
                self._trust.check()
                try:
                    group.check_and_unmask(
                        reply.outputs[0],
                        block.pads.u_NF,
                        block.masked,
                        y_TF,
                        f"The worker at {self._channel.endpoint}",
                        self._row_pool,
                    )
                except (IntegrityError, LatticeError) as error:
                    # The worker, its pads and the check vectors are never used again [P7].
                    self._trust.end(error)
                    self.close()
                    raise
        finally:
            block.pads.wipe()
        return waited_s

    def cancel(self, block: _Block[Kept]) -> None:
        block.pads.wipe()
        self._channel.cancel(block.ticket)
