"""The devices that a worker can compute on.

`backend.py` says what a backend does; there is one file for each kind of device.
"""

import torch

from tsqp.errors import UsageError
from tsqp.gpu.backends.backend import Backend
from tsqp.gpu.backends.cpu import CpuBackend
from tsqp.gpu.backends.cuda import CudaBackend


def backend_on(device: torch.device) -> Backend:
    """The backend that computes on `device`."""
    return CpuBackend() if device.type == "cpu" else CudaBackend(device)


def parse_device(name: str) -> torch.device:
    """The device of `tsqp worker --device`.

    Raises:
        UsageError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    kind, _, number = name.partition(":")
    if kind != "cuda" or not (number.isdecimal() or name == "cuda"):
        raise UsageError("There is no such device; choose auto, cpu, cuda or cuda:NUMBER.")
    if not torch.cuda.is_available():
        raise UsageError(
            "torch sees no CUDA device here; use --device cpu, or install its CUDA build."
        )
    if int(number or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"There is no device {name}; torch sees {torch.cuda.device_count()} of them here."
        )
    return torch.device("cuda", int(number or 0))
