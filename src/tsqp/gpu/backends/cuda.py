"""A CUDA device: inputs are copied to it, and answers back. Shape suffixes as in `backend.py`."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from tsqp.algebra import residue_bytes
from tsqp.algebra.params import Field
from tsqp.errors import OutOfMemory
from tsqp.gpu.backends import cuda_product, residues
from tsqp.gpu.backends.backend import Stream, group_queries, weigh_values
from tsqp.gpu.backends.cuda_stream import CudaStream
from tsqp.gpu.backends.product_choice import ResidueProduct, choose_product, is_exact
from tsqp.gpu.backends.product_graphs import ProductGraphs, Refusals

log = logging.getLogger("tsqp")


class CudaBackend:
    """A `Backend` on one CUDA device. Its products, but not its memory, are tested on a CPU too.

    Inside `with` of a stream, calls return before they are computed. Otherwise they are complete.

    Attributes:
        has_graphs: whether products of few rows are CUDA graphs in streams.
    """

    name = "cuda"
    takes_memory_at_once = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._product: ResidueProduct = cuda_product.packed_product  # before `prepare`
        self.has_graphs = False
        self._refusals = Refusals()
        self._stream: CudaStream | None = None  # of the session whose call is begun

    def prepare(self) -> None:
        residues.compile_loops()
        self._product = choose_product(self.device)
        self.has_graphs = self._graphs_are_exact()

    def open_stream(self, *, with_graphs: bool = True) -> Stream:
        # What was loaded or computed on the default stream is there before the first call.
        torch.cuda.current_stream(self.device).synchronize()
        graphs = None
        if with_graphs and self.has_graphs:
            graphs = ProductGraphs(self.device, self._product, self._refusals)
        return CudaStream(self.device, graphs)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        assert isinstance(stream, CudaStream)
        self._stream = stream
        try:
            with stream.current():
                yield
        except BaseException:
            # The client may use the memory again once it knows that its call has failed.
            stream.drain()
            raise
        finally:
            self._stream = None

    def free_bytes(self) -> int:
        available, _ = torch.cuda.mem_get_info(self.device)
        # What was freed here stays with torch, which gives it out again.
        held = torch.cuda.memory_reserved(self.device)
        return available + held - torch.cuda.memory_allocated(self.device)

    def check_room(self, required: int, what: str) -> None:
        available = self.free_bytes()
        if required > available:
            raise OutOfMemory(
                f"{what} would take {required} bytes, and {available} bytes are free "
                f"on {self.device}: free some, or choose a smaller dtype or model."
            )

    def to_device(self, x: Tensor) -> Tensor:
        if self._stream is None:
            return x.to(self.device, copy=True)
        there = torch.empty(x.shape, dtype=x.dtype, device=self.device)
        self._stream.copy(x, there, host=x)
        return there

    def to_host(self, y: Tensor, out: Tensor) -> None:
        if self._stream is None:
            out.copy_(y)
        else:
            self._stream.copy(y.contiguous(), out, host=out)

    def linear(self, x_TD: Tensor, weight_FD: Tensor, out_TF: Tensor) -> None:
        self.to_host(F.linear(self.to_device(x_TD), weight_FD), out_TF)

    def embed(self, token_ids_T: Tensor, table_VD: Tensor, out_TD: Tensor) -> None:
        self.to_host(F.embedding(self.to_device(token_ids_T), table_VD), out_TD)

    def attention_scores(self, q_THK: Tensor, k_JSK: Tensor, out_HTS: Tensor) -> None:
        kv_heads, length, _ = k_JSK.shape
        q_JMK = group_queries(self.to_device(q_THK), kv_heads)
        y_JMS = torch.bmm(q_JMK, k_JSK.transpose(1, 2))
        self.to_host(y_JMS, out_HTS.view(kv_heads, -1, length))

    def weighted_values(
        self,
        weights: Sequence[Tensor],
        values: Sequence[Tensor],
        weight_FD: Tensor,
        out_TF: Tensor,
    ) -> None:
        pairs = zip(weights, values, strict=True)
        rows = [weigh_values(self.to_device(w_HTS), v_JSK) for w_HTS, v_JSK in pairs]
        self.to_host(F.linear(torch.cat(rows), weight_FD), out_TF)

    def residue_product(
        self, c_TB: Tensor, weight_FD: Tensor, field: Field, out_TB: Tensor
    ) -> None:
        if self._stream is not None and self._stream.multiply(c_TB, weight_FD, field, out_TB):
            return
        z_TB = torch.empty(out_TB.shape, dtype=torch.uint8, device=self.device)
        self._product(self.to_device(c_TB), weight_FD, field, z_TB)
        self.to_host(z_TB, out_TB)

    def seed_product(self, seed: bytes, weight_FD: Tensor, field: Field, out_TB: Tensor) -> None:
        c_TD = residues.expand(seed, len(out_TB), weight_FD.shape[1], field)
        c_TB = torch.empty(len(c_TD), field.residue_bytes * c_TD.shape[1], dtype=torch.uint8)
        residue_bytes.pack(c_TD.numpy(), field, c_TB.numpy())
        self.residue_product(c_TB, weight_FD, field, out_TB)

    def _graphs_are_exact(self) -> bool:
        """Whether products are right as graphs on this device, too."""
        if self.device.type != "cuda":
            return False
        try:
            if is_exact(self._replay, self.device):
                return True
            reason = "they are wrong"
        except Exception as exc:  # of the driver
            reason = type(exc).__name__
        log.warning("CUDA graphs are not used on %s (%s)", self.device, reason)
        return False

    def _replay(self, c_TB: Tensor, weight_FD: Tensor, field: Field, out_TB: Tensor) -> None:
        """A product as a new graph, replayed for other rows than it was captured with."""
        refusals = Refusals()
        graphs = ProductGraphs(self.device, self._product, refusals)
        torch.cuda.current_stream(self.device).synchronize()
        stream = CudaStream(self.device, graphs)
        with stream.current():
            for rows_TB in (torch.zeros_like(c_TB), c_TB):
                stream.multiply(rows_TB, weight_FD, field, out_TB)
            stream.drain()
        if refusals.groups:
            raise RuntimeError("a product cannot be captured")
