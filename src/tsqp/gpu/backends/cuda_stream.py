"""The calls of one session on a CUDA device: a stream, its graphs, and its host memory."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

from tsqp.algebra.params import Field
from tsqp.gpu.backends.product_graphs import ProductGraphs
from tsqp.gpu.backends.registered_memory import RegisteredMemory


class CudaCompletion:
    """Two events around a call; see `tsqp.wire.channel.Completion`."""

    def __init__(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> None:
        self._begin, self._end = begin, end

    def is_done(self) -> bool:
        return bool(self._end.query())

    def wait(self) -> None:
        self._end.synchronize()

    def compute_ns(self) -> int:
        return int(1e6 * self._begin.elapsed_time(self._end))


class CudaStream:
    """A stream. Its calls follow one another; those of others overlap.

    Nothing here waits for the device, except `drain` and copies of memory that is not
    registered.

    Args:
        graphs: None if products are not to be graphs.
    """

    def __init__(self, device: torch.device, graphs: ProductGraphs | None) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._graphs = graphs
        self._memory: RegisteredMemory | None = None
        self._begin: torch.cuda.Event | None = None

    @contextmanager
    def current(self) -> Iterator[None]:
        """Inside `with`, torch launches on this stream."""
        with torch.cuda.stream(self._stream):
            self._begin = torch.cuda.Event(enable_timing=True)
            self._begin.record(self._stream)
            yield

    def completion(self) -> CudaCompletion:
        """Of all that was begun in the last `current`."""
        assert self._begin is not None
        end = torch.cuda.Event(enable_timing=True)
        end.record(self._stream)
        return CudaCompletion(self._begin, end)

    def multiply(self, c_TB: Tensor, weight_FD: Tensor, field: Field, out_TB: Tensor) -> bool:
        """Replay a product of rows in host memory; False if it is not a graph."""
        if self._graphs is None:
            return False
        rows = len(c_TB)
        static = self._graphs.static(rows, weight_FD, field)
        if static is None:
            return False
        self.copy(c_TB, static.c_TB[:rows], host=c_TB)
        self._graphs.run(static, weight_FD, field)
        self.copy(static.z_TB[:rows], out_TB, host=out_TB)
        return True

    def copy(self, source: Tensor, target: Tensor, host: Tensor) -> None:
        """Copy between the device and `host`, one of both, which is contiguous, as the other is."""
        pieces = [] if self._memory is None else list(self._memory.pieces(host))
        if len(pieces) <= 1:
            target.copy_(source, non_blocking=True)
            return
        from_B, to_B = source.view(-1).view(torch.uint8), target.view(-1).view(torch.uint8)
        for piece in pieces:
            to_B[piece].copy_(from_B[piece], non_blocking=True)

    def use_memory(self, memory: Tensor) -> None:
        """Register host memory from and to which calls copy."""
        self.forget_memory()
        self._memory = RegisteredMemory(memory, self._device)

    def forget_memory(self) -> None:
        """Wait for all calls, and unregister the memory."""
        self.drain()
        if self._memory is not None:
            self._memory.unregister()
            self._memory = None

    def drain(self) -> None:
        """Wait for the calls of this session; a failed device has none.

        torch has 32 streams, so with more sessions than that some share one.
        """
        with suppress(RuntimeError):
            self._stream.synchronize()
