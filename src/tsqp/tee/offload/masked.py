"""The common part of the private modes: fixed point, the check, and everything done in the TEE.

Shape suffixes: T tokens; D input and F output features of a group; V vocabulary; B bytes of a row.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from tsqp.algebra.fixed_point import Bounds
from tsqp.algebra.params import Field
from tsqp.algebra.residue_bytes import Int32
from tsqp.checkpoint.quantize import IntegerWeights
from tsqp.errors import IntegrityError, NumericalError, UnsupportedModel, WorkerLost
from tsqp.model.config import ModelConfig
from tsqp.model.linear_group import LinearGroup
from tsqp.nn.attention import CachedAttention
from tsqp.nn.kv_cache import KvCache
from tsqp.tee.crypto import kernels
from tsqp.tee.crypto.freivalds import VECTORS, CheckVectors
from tsqp.tee.crypto.row_pool import RowPool
from tsqp.tee.offload.checked_group import CheckedGroup
from tsqp.tee.offload.offload import (
    Attention,
    Embedding,
    Linear,
    Pending,
    Ready,
    Request,
    attend_here,
)
from tsqp.tee.placement import Placement
from tsqp.wire.call_limit import residue_rows_within
from tsqp.wire.channel import Channel

Block = TypeVar("Block")  # what a mode keeps for rows that were sent
Kept = TypeVar("Kept")  # what a group keeps for them
Sent = TypeVar("Sent", bound="HasFeatures")  # a group, or all shards of one
Sent_contra = TypeVar("Sent_contra", bound="HasFeatures", contravariant=True)

BLOCK_ROWS = 128  # most rows of a call: the TEE unmasks one while the worker multiplies the next
BLOCKS_IN_FLIGHT = 2


class HasFeatures(Protocol):
    """Something whose product has so many columns."""

    features: int


class Group(Protocol[Kept]):
    """One group of linear layers, as the private modes use it: it masks inputs and checks products.

    Masks and their products are residues in arrays made by `tsqp.tee.crypto.pads.empty_rows`.
    """

    linear: LinearGroup
    features: int
    width: int

    @property
    def field(self) -> Field: ...

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's residues, in both directions."""
        ...

    def mask(self, x_TD: Tensor, r_TD: NDArray[Any], c_TB: Tensor, row_pool: RowPool) -> Kept:
        """Write the masked x; raises NumericalError if x is not finite."""
        ...

    def mask_for(
        self,
        others: Sequence[Any],
        x_TD: Tensor,
        r_TD: NDArray[Any],
        c_TB: Tensor,
        row_pool: RowPool,
    ) -> list[Kept]:
        """The same for several shards at once; see `CheckedGroup.mask_for`."""
        ...

    def check_and_unmask(
        self,
        z_TB: Tensor,
        u_TF: NDArray[Any],
        masked: Kept,
        y_TF: Tensor,
        worker_name: str,
        row_pool: RowPool,
    ) -> None:
        """Write the product y; raises IntegrityError if a row of the answer fails its check."""
        ...

    def wrong_product(self, worker_name: str) -> IntegrityError:
        """The error to raise if an answer is not the product."""
        ...


@dataclass(frozen=True, slots=True)
class Masked:
    """What the TEE keeps for each row that was sent.

    Attributes:
        unit_T: size of one step of each row's integers, float64.
        expected_T2: k_iW · xq mod P, the expected value of [P7].
    """

    unit_T: NDArray[np.float64]
    expected_T2: NDArray[np.int64]


class MaskedGroup(CheckedGroup[Masked]):
    """One group of linear layers: its integers, and the secret vectors that check products.

    Attributes:
        linear: which group it is.
        features, width: F and D.
    """

    def __init__(
        self, linear: LinearGroup, weights: IntegerWeights, bias_F: Tensor | None, field: Field
    ) -> None:
        """Draw check vectors [P6].

        Raises:
            UnsupportedModel: the field is too small for these weights.
        """
        self.linear = linear
        self.features, self.width = weights.weight_FD.shape
        self.field = field
        bounds = Bounds.of(weights.weight_FD)
        self._l1, self._l2 = float(bounds.l1), math.sqrt(bounds.l2_squared)
        try:
            self._room = bounds.room(field)
        except ValueError as exc:
            raise UnsupportedModel(
                f"{linear} does not fit the {field.name} field: {exc}; use --field wide, or "
                "another model."
            ) from exc
        self._scale_F = weights.scale_F.double().numpy()
        self._bias_F = None if bias_F is None else bias_F.float()
        self._draw_checks(weights.weight_FD)

    def _draw_checks(self, weight_FD: Tensor) -> None:
        checks = CheckVectors.draw(weight_FD)
        self._k_2P, self._kw_2P = kernels.as_pairs(checks.k_2F), kernels.as_pairs(checks.kw_2D)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's residues, in both directions."""
        return self.field.residue_bytes * (self.width + self.features)

    def mask_for(
        self, others: Sequence[Self], x_TD: Tensor, r_TD: Int32, c_TB: Tensor, row_pool: RowPool
    ) -> list[Masked]:
        """[P2], [P5]: c = xq + r mod p."""
        shards = [self, *others]
        x_np, c_np = x_TD.numpy(), c_TB.numpy()
        unit_T = np.empty(len(x_np))
        expected_T2 = [np.empty((len(x_np), VECTORS), np.int64) for _ in shards]
        kernel = partial(
            kernels.quantize_and_pad,
            x_np,
            r_TD,
            [each._kw_2P for each in shards],
            self._l1,
            self._l2,
            self._room,
            self.field,
            c_np,
            unit_T,
            expected_T2,
        )
        if row_pool.run(len(x_np), kernel) != kernels.ALL_ROWS:
            raise NumericalError(
                f"The input of {self.linear} holds NaN or infinity; try --dtype float32, or check "
                "the model."
            )
        return [Masked(unit_T, expected) for expected in expected_T2]

    def check_and_unmask(
        self,
        z_TB: Tensor,
        u_TF: Int32,
        masked: Masked,
        y_TF: Tensor,
        worker_name: str,
        row_pool: RowPool,
    ) -> None:
        """[P5], [P7], [P3]: write y, and raise unless every row of it has passed the check.

        Args:
            y_TF: float32, contiguous, in private memory; undefined if this raises.
            worker_name: names the worker at the beginning of an error message.

        Raises:
            IntegrityError: some row is not the product.
        """
        kernel = partial(
            kernels.unpad_and_check,
            kernels.aligned(z_TB),
            u_TF,
            self._k_2P,
            self._scale_F,
            masked.unit_T,
            masked.expected_T2,
            self.field,
            y_TF.numpy(),
        )
        if row_pool.run(y_TF.shape[0], kernel) != kernels.ALL_ROWS:
            raise self.wrong_product(worker_name)
        if self._bias_F is not None:
            y_TF.add_(self._bias_F)

    def wrong_product(self, worker_name: str) -> IntegrityError:
        """The error to raise if an answer is not the product."""
        return IntegrityError(
            f"{worker_name} returned a wrong product for {self.linear}; the answer was "
            "discarded. Do not use this worker again."
        )


class Groups(Generic[Sent]):
    """The groups of one session. They are forgotten when it ends [P7]."""

    def __init__(self, groups: Mapping[LinearGroup, Sent]) -> None:
        self._groups = dict(groups)

    def of(self, request: Linear) -> Sent:
        """The group that a request asks for.

        Raises:
            WorkerLost: the session has ended.
        """
        if not self._groups:
            raise WorkerLost("This session with its workers has ended; begin a new one.")
        return self._groups[request.group]

    def forget(self) -> None:
        """Forget all groups; safe to call twice."""
        self._groups.clear()


class LinearPart(Protocol):
    """Where the linear layers of a private mode run."""

    @property
    def placement(self) -> Placement: ...

    def start(self, request: Linear) -> Pending: ...

    def close(self) -> None: ...


class PrivateOffload:
    """Embedding, attention and the KV cache in the TEE; linear layers elsewhere, masked."""

    most_scores = 0

    def __init__(
        self, config: ModelConfig, kv: KvCache, embedding_VD: Tensor, linear: LinearPart
    ) -> None:
        self.kv = kv
        self._attention = CachedAttention(config, kv)
        self._embedding_VD = embedding_VD
        self._linear = linear
        self.placement = linear.placement

    def start(self, request: Request) -> Pending:
        if isinstance(request, Linear):
            return self._linear.start(request)
        if isinstance(request, Attention):
            return attend_here(self._attention, request)
        assert isinstance(request, Embedding)
        return Ready(F.embedding(request.token_ids_T, self._embedding_VD))

    def close(self) -> None:
        self._linear.close()


class _BlockSender(Protocol[Block, Sent_contra]):
    """A masked mode's work on one block of rows."""

    def rows_per_call(self, group: Sent_contra) -> int: ...

    def send(self, group: Sent_contra, x_TD: Tensor) -> Block: ...

    def receive(self, group: Sent_contra, block: Block, y_TF: Tensor) -> float:
        """Write the product, float32; the seconds spent waiting for it."""
        ...

    def cancel(self, block: Block) -> None:
        """Give up a block, or the rest of it after `receive` has failed."""
        ...


def start_in_blocks(
    sender: _BlockSender[Block, Sent], group: Sent, x_TD: Tensor, dtype: torch.dtype
) -> Pending:
    """Send the first blocks of rows; the others are sent as answers arrive."""
    return _Blocks(sender, group, x_TD.float().contiguous(), dtype)


def masked_rows_per_call(channel: Channel, group: Group[Any]) -> int:
    """How many rows fit into one call, by their bytes and by the worker's limit of work."""
    by_work = residue_rows_within(channel.welcome.max_call_macs, group.features, group.width)
    return max(1, min(by_work, channel.max_call_bytes // group.row_bytes))


class _Blocks(Generic[Block, Sent]):
    """An answer that is being computed. At most BLOCKS_IN_FLIGHT of its blocks are sent at once."""

    def __init__(
        self,
        sender: _BlockSender[Block, Sent],
        group: Sent,
        x_TD: Tensor,
        dtype: torch.dtype,
    ) -> None:
        self._sender = sender
        self._group = group
        self._dtype = dtype
        self._rows = x_TD.shape[0]
        self._step = min(BLOCK_ROWS, sender.rows_per_call(group))
        self._waiting = deque(_split(x_TD, self._step))
        self._out: deque[Block] = deque()
        self.waited_s = 0.0
        try:
            self._send_ahead()
        except BaseException:
            self.cancel()
            raise

    def __enter__(self) -> Tensor:
        y_TF = torch.empty(self._rows, self._group.features, dtype=self._dtype)
        exact = self._dtype is torch.float32
        try:
            for block_TF in _split(y_TF, self._step):
                block = block_TF if exact else torch.empty(block_TF.shape)
                self.waited_s += self._sender.receive(self._group, self._out[0], block)
                self._out.popleft()  # only now: until it is here, `cancel` gives it up too
                if not exact:  # block by block: all rows in float32 would not stay in a cache
                    block_TF.copy_(block)
                self._send_ahead()
        except BaseException:
            self.cancel()
            raise
        return y_TF

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass

    def cancel(self) -> None:
        self._waiting.clear()
        while self._out:
            self._sender.cancel(self._out.popleft())

    def _send_ahead(self) -> None:
        while self._waiting and len(self._out) < BLOCKS_IN_FLIGHT:
            self._out.append(self._sender.send(self._group, self._waiting.popleft()))


def _split(rows_TN: Tensor, step: int) -> Sequence[Tensor]:
    """Blocks of at most `step` rows. The check first makes this cheap for a single token."""
    # Python's len of a tensor takes four times as long as its shape.
    return [rows_TN] if rows_TN.shape[0] <= step else torch.split(rows_TN, step)
