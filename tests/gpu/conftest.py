"""The devices that a worker can compute on, each where there is one."""

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device, and torch sees none")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """CPU, and CUDA; what is written for CUDA is tried on the tensors of both."""
    return torch.device(request.param)
