"""A fake of the calls of torch.cuda that the worker uses, for tests: the device is the CPU.

Copies and launches take effect at once. A launch while a graph is captured is only noted, and
replaying the graph does it. Nothing here shows that a real device works.
"""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tsqp.algebra.params import Field
from tsqp.gpu.backends import cuda_product


class FakeCuda:
    """What was asked of the device.

    Attributes:
        refuses_capture: whether capturing fails.
        is_full: whether capturing finds no memory.
        registrations: how many more ranges of memory it registers.
        registered: sizes of registered ranges, by where they begin.
        captures, replays, launches: how many there were.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refuses_capture = self.is_full = False
        self.registrations = 1000
        self.registered: dict[int, int] = {}
        self.captures = self.replays = self.launches = 0
        self.streams: list[FakeStream] = []
        self.current: list[FakeStream] = []
        self.capturing: FakeGraph | None = None
        for name, fake in {
            "Stream": lambda device: FakeStream(self),
            "stream": self._as_current,
            "current_stream": lambda device: FakeStream(self),
            "Event": FakeEvent,
            "CUDAGraph": lambda: FakeGraph(self),
            "graph_pool_handle": lambda: (0, 1),
            "cudart": lambda: self,
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    @contextmanager
    def _as_current(self, stream: "FakeStream") -> Any:
        self.current.append(stream)
        try:
            yield
        finally:
            self.current.pop()

    def cudaHostRegister(self, start: int, size: int, flags: int) -> int:
        self.registrations -= 1
        if self.registrations < 0:
            return 801  # cudaErrorNotSupported
        self.registered[start] = size
        return 0

    def cudaHostUnregister(self, start: int) -> int:
        del self.registered[start]
        return 0

    def product(self, c_TB: Tensor, weight_FD: Tensor, field: Field, out_TB: Tensor) -> None:
        """The library's product, as a launch."""
        self.launches += 1
        assert self.current, "launched on the default stream"

        def compute() -> None:
            cuda_product.packed_product(c_TB, weight_FD, field, out_TB)

        if self.capturing is not None:
            self.capturing.launches.append(compute)
        else:
            compute()


class FakeStream:
    def __init__(self, cuda: FakeCuda) -> None:
        self.waits = 0
        cuda.streams.append(self)

    def synchronize(self) -> None:
        self.waits += 1


class FakeEvent:
    def __init__(self, *, enable_timing: bool) -> None:
        self.stream: FakeStream | None = None

    def record(self, stream: FakeStream) -> None:
        self.stream = stream

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert self.stream is end.stream
        return 0.25


class FakeGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.launches: list[Callable[[], None]] = []

    def capture_begin(self, *, pool: object, capture_error_mode: str) -> None:
        if self._cuda.refuses_capture:
            raise RuntimeError("operation not permitted when stream is capturing")
        if self._cuda.is_full:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self._cuda.capturing = self
        self._cuda.captures += 1

    def capture_end(self) -> None:
        self._cuda.capturing = None

    def replay(self) -> None:
        self._cuda.replays += 1
        for launch in self.launches:
            launch()
