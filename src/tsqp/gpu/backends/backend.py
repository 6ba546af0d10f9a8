"""The interface to a device: it multiplies host buffers by weights that are on the device.

Inputs and outputs are in host memory, which is shared with the TEE or is about to be sent. Weights,
keys and values are on the backend's device. The TEE may change shared memory at any time, so a
wrong input may give a wrong answer, but nothing worse.

Shape suffixes: T tokens; D input and F output features; B bytes of a row; V vocabulary; H query
heads; J key/value heads; G query heads of each of them; K features of one head; S tokens kept of a
sequence; M rows of the query heads of one key/value head.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from tsqp.algebra.params import Field
from tsqp.wire.channel import Completion


class Stream(Protocol):
    """The calls of one session, which a device computes one after the other."""

    def completion(self) -> Completion | None:
        """Of all that the last `Backend.on` began; None if it has ended."""
        ...

    def use_memory(self, memory: Tensor) -> None:
        """Prepare host memory (uint8, one dimension) for fast copies, if the device allows it."""
        ...

    def forget_memory(self) -> None:
        """Wait for the calls of this session, and end `use_memory`; safe to call twice."""
        ...

    def drain(self) -> None:
        """Wait for the calls of this session; a device that has failed has none."""
        ...


class Backend(Protocol):
    """One device.

    Attributes:
        name: its kind, as a worker announces it: "cpu" or "cuda".
        device: the device that holds its weights, keys and values.
        takes_memory_at_once: whether memory is taken when it is allocated, not page by page when
            it is first written.
    """

    name: str
    device: torch.device
    takes_memory_at_once: bool

    def prepare(self) -> None:
        """Compile the loops for products of residues, before a client waits for them."""
        ...

    def open_stream(self) -> Stream:
        """A stream for a new session."""
        ...

    def on(self, stream: Stream) -> AbstractContextManager[None]:
        """Inside `with`, calls go to this stream, and may return before they are computed."""
        ...

    def to_device(self, x: Tensor) -> Tensor:
        """A copy of contiguous host memory on the device."""
        ...

    def to_host(self, y: Tensor, out: Tensor) -> None:
        """Copy from the device into contiguous host memory of the same shape and dtype."""
        ...

    def free_bytes(self) -> int:
        """Bytes that this process may still take on the device."""
        ...

    def check_room(self, required: int, what: str) -> None:
        """Raise OutOfMemory unless this many bytes are free; `what` begins its message."""
        ...

    def linear(self, x_TD: Tensor, weight_FD: Tensor, out_TF: Tensor) -> None:
        """out = x · Wᵀ."""
        ...

    def embed(self, token_ids_T: Tensor, table_VD: Tensor, out_TD: Tensor) -> None:
        """Rows of the table. The ids lie in [0, V): the caller has checked a private copy."""
        ...

    def attention_scores(self, q_THK: Tensor, k_JSK: Tensor, out_HTS: Tensor) -> None:
        """out = Q·Kᵀ of one sequence, where query head h meets key/value head h // (H/J)."""
        ...

    def weighted_values(
        self,
        weights: Sequence[Tensor],
        values: Sequence[Tensor],
        weight_FD: Tensor,
        out_TF: Tensor,
    ) -> None:
        """out = (P·V) · Wᵀ, the heads of P·V concatenated, the rows of all sequences in order.

        Args:
            weights: [H, T, S] of each sequence.
            values: [J, S, K] of each sequence, on the device.
        """
        ...

    def residue_product(
        self, c_TB: Tensor, weight_FD: Tensor, field: Field, out_TB: Tensor
    ) -> None:
        """out = Wq · c mod p, exact [P9].

        Args:
            c_TB, out_TB: uint8, rows of packed residues; see `tsqp.algebra.residue_bytes`. What is
                not a residue gives a wrong answer and no error.
            weight_FD: int8 in [-127, 127].
        """
        ...

    def seed_product(self, seed: bytes, weight_FD: Tensor, field: Field, out_TB: Tensor) -> None:
        """The same for the residues that a seed stands for, a row for each row of out [P8]."""
        ...


class HostStream:
    """A `Stream` where calls are computed when they return."""

    def completion(self) -> None:
        return None

    def use_memory(self, memory: Tensor) -> None:
        pass

    def forget_memory(self) -> None:
        pass

    def drain(self) -> None:
        pass


class HostBackend:
    """What backends in host memory have in common."""

    def open_stream(self) -> Stream:
        return HostStream()

    def on(self, stream: Stream) -> AbstractContextManager[None]:
        return nullcontext()

    def to_device(self, x: Tensor) -> Tensor:
        return x.clone()

    def to_host(self, y: Tensor, out: Tensor) -> None:
        out.copy_(y)


def group_queries(q_THK: Tensor, kv_heads: int) -> Tensor:
    """q_JMK: the queries that meet the same key/value head, one after the other."""
    rows, _, features = q_THK.shape
    q_TJGK = q_THK.view(rows, kv_heads, -1, features)
    return q_TJGK.permute(1, 2, 0, 3).reshape(kv_heads, -1, features)


def weigh_values(weights_HTS: Tensor, v_JSK: Tensor) -> Tensor:
    """P·V of one sequence, the heads concatenated: [T, H·K]. Both lie on one device."""
    kv_heads, length, features = v_JSK.shape
    rows = weights_HTS.shape[1]
    y_JMK = torch.bmm(weights_HTS.view(kv_heads, -1, length), v_JSK)
    return y_JMK.view(kv_heads, -1, rows, features).permute(2, 0, 1, 3).reshape(rows, -1)
