"""The devices that a worker can compute on, each where there is one."""

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch

from tsqp.gpu.backends.backend import Backend, HostStream, Stream
from tsqp.gpu.backends.cpu import CpuBackend
from tsqp.gpu.backends.cuda import CudaBackend

HAS_CUDA = torch.cuda.is_available()
needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device, and torch sees none")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """CPU, and CUDA; what is written for CUDA is tried on the tensors of both."""
    return torch.device(request.param)


class CudaOnCpu(CudaBackend):
    """What is written for CUDA, on tensors in host memory, where there are no streams."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def open_stream(self) -> Stream:
        return HostStream()

    def on(self, stream: Stream) -> AbstractContextManager[None]:
        return nullcontext()

    def check_room(self, required: int, what: str) -> None:
        CpuBackend().check_room(required, what)


@pytest.fixture(params=["cpu", "cuda on a cpu", pytest.param("cuda", marks=needs_cuda)])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Every backend, that of CUDA also where there is no such device."""
    if request.param == "cuda":
        return CudaBackend(torch.device("cuda"))
    return CpuBackend() if request.param == "cpu" else CudaOnCpu()
