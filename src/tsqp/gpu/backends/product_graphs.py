"""Products of few rows as CUDA graphs: replaying one takes less of the CPU than its launches.

A graph reads and writes fixed addresses. So a call copies its rows into a static input on the
device, replays the graph of its weight and number of rows, and copies from a static output.
"""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tsqp.algebra.params import Field
from tsqp.gpu.backends.product_choice import ResidueProduct

log = logging.getLogger("tsqp")

MOST_ROWS = 64  # beyond, the products themselves take longer than their launches
MOST_GRAPHS = 1024  # of a session
MOST_BYTES = 64 * 2**20  # of a session's static inputs and outputs

Group = tuple[int, str]  # where a weight begins, and the field


@dataclass(slots=True)
class Refusals:
    """Groups that cannot be captured, for all sessions of a device."""

    groups: set[Group] = field(default_factory=set)

    def add(self, group: Group, exc: Exception) -> None:
        if not self.groups:
            log.warning(
                "A product cannot be captured as a CUDA graph (%s), so it is launched each time",
                type(exc).__name__,
            )
        self.groups.add(group)


@dataclass(slots=True)
class StaticProduct:
    """A product at fixed addresses.

    Attributes:
        c_TB, z_TB: its input and output, which other groups of the same shape use too: the calls of
            a session follow one another.
        graph: None until it is captured.
    """

    c_TB: Tensor
    z_TB: Tensor
    graph: torch.cuda.CUDAGraph | None = None


class ProductGraphs:
    """The graphs of one session, whose stream must be the current one."""

    def __init__(self, device: torch.device, product: ResidueProduct, refusals: Refusals) -> None:
        self._device = device
        self._product = product
        self._refusals = refusals
        self._pool: Any = None  # memory that the graphs share
        self._statics: dict[tuple[Group, int], StaticProduct] = {}
        self._buffers: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
        self._bytes = 0

    def static(self, rows: int, weight_FD: Tensor, field: Field) -> StaticProduct | None:
        """Where a product of this shape is computed; None if it is not to be a graph."""
        group = weight_FD.data_ptr(), field.name
        if rows > MOST_ROWS or group in self._refusals.groups:
            return None
        key = group, bucket_of(rows)
        found = self._statics.get(key)
        if found is None and len(self._statics) < MOST_GRAPHS:
            buffers = self._buffers_for(key[1], weight_FD, field)
            if buffers is not None:
                found = self._statics[key] = StaticProduct(*buffers)
        return found

    def run(self, static: StaticProduct, weight_FD: Tensor, field: Field) -> None:
        """Compute z from c."""
        try:
            if static.graph is None:
                static.graph = self._capture(static, weight_FD, field)
            static.graph.replay()
        except torch.OutOfMemoryError:  # another session's, perhaps, and not for ever
            self._compute(static, weight_FD, field)
        except Exception as exc:  # of the driver, or a library that cannot be captured
            self._refusals.add((weight_FD.data_ptr(), field.name), exc)
            self._compute(static, weight_FD, field)

    def _compute(self, static: StaticProduct, weight_FD: Tensor, field: Field) -> None:
        self._product(static.c_TB, weight_FD, field, static.z_TB)

    def _capture(
        self, static: StaticProduct, weight_FD: Tensor, field: Field
    ) -> torch.cuda.CUDAGraph:
        # Launched once before: kernels are compiled and libraries set up.
        self._compute(static, weight_FD, field)
        # Not `torch.cuda.graph`, which waits for the whole device and collects garbage.
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            self._compute(static, weight_FD, field)
        finally:
            graph.capture_end()
        return graph

    def _buffers_for(
        self, rows: int, weight_FD: Tensor, field: Field
    ) -> tuple[Tensor, Tensor] | None:
        features, width = (field.residue_bytes * size for size in weight_FD.shape)
        shape = rows, width, features
        found = self._buffers.get(shape)
        if found is None and self._bytes + rows * (width + features) <= MOST_BYTES:
            try:
                c_TB = torch.zeros(rows, width, dtype=torch.uint8, device=self._device)
                found = self._buffers[shape] = c_TB, c_TB.new_empty(rows, features)
            except torch.OutOfMemoryError:
                return None
            self._bytes += rows * (width + features)
        return found


def bucket_of(rows: int) -> int:
    """The number of rows that a graph for `rows` rows computes: the next power of two."""
    return 1 << (rows - 1).bit_length()
