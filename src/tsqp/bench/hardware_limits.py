"""The best rates of this machine, measured in the same run as the benchmark."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tsqp.algebra.int8_product import int8_product
from tsqp.bench.timing import least_seconds

SIZE = 2048
STREAM_BYTES = 2**29  # far larger than any cache, so that every pass reads memory


@dataclass(frozen=True, slots=True)
class HardwareLimits:
    """The best rates measured on this machine, per second.

    Attributes:
        matmul_flops: floating-point operations in one large matrix product.
        int8_ops: multiplications and additions of int8 in one large matrix product.
        read_bytes_per_s: bytes of weights that a matrix-vector product reads from memory.
        copy_bytes_per_s: bytes copied from memory to memory.
    """

    matmul_flops: float
    int8_ops: float
    read_bytes_per_s: float
    copy_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """The best rates measured on a GPU, per second.

    Attributes:
        name: name of the device.
        matmul_flops, int8_ops, read_bytes_per_s: as in `HardwareLimits`.
        copy_bytes_per_s: bytes copied between host and device, in the slower direction.
    """

    name: str
    matmul_flops: float
    int8_ops: float
    read_bytes_per_s: float
    copy_bytes_per_s: float


def measure_limits(dtype: torch.dtype) -> HardwareLimits:
    """Measure this machine, with the number of threads that torch is set to."""
    a, b = torch.ones(SIZE, SIZE, dtype=dtype), torch.ones(SIZE, SIZE, dtype=dtype)
    product_s = least_seconds(lambda: torch.mm(a, b))
    weight = torch.ones(STREAM_BYTES // dtype.itemsize // SIZE, SIZE, dtype=dtype)
    row = torch.ones(1, SIZE, dtype=dtype)
    stream_s = least_seconds(lambda: torch.nn.functional.linear(row, weight))
    return HardwareLimits(
        2 * SIZE**3 / product_s, int8_ops(), weight.nbytes / stream_s, copy_bytes_per_s()
    )


def measure_device_limits(device: torch.device, dtype: torch.dtype) -> DeviceLimits:
    """Measure a CUDA device."""

    def rate(amount: float, run: Callable[[], object]) -> float:
        def whole() -> None:
            run()
            torch.cuda.synchronize(device)

        whole()
        return amount / least_seconds(whole)

    size = 4 * SIZE
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    bytes_a, bytes_b = (torch.ones(size, size, dtype=torch.int8, device=device) for _ in range(2))
    there = torch.ones(STREAM_BYTES // 2, dtype=torch.uint8, device=device)
    here = torch.ones(STREAM_BYTES // 2, dtype=torch.uint8).pin_memory()
    copies = (lambda: there.copy_(here), lambda: here.copy_(there))
    return DeviceLimits(
        name=torch.cuda.get_device_name(device),
        matmul_flops=rate(2 * size**3, lambda: a @ b),
        int8_ops=rate(2 * size**3, lambda: torch._int_mm(bytes_a, bytes_b.t())),
        read_bytes_per_s=rate(there.nbytes, there.view(torch.float32).sum),
        copy_bytes_per_s=min(rate(here.nbytes, copy) for copy in copies),
    )


def int8_ops() -> float:
    """Multiplications and additions of int8 per second."""
    a, b = (torch.ones(SIZE, SIZE, dtype=torch.int8) for _ in range(2))
    return 2 * SIZE**3 / least_seconds(lambda: int8_product(a, b.t()))


def copy_bytes_per_s(nbytes: int = STREAM_BYTES // 2) -> float:
    """Bytes copied per second, in copies of `nbytes` bytes; a byte read and written counts once."""
    source = torch.ones(nbytes, dtype=torch.uint8)
    target = torch.ones_like(source)
    return source.nbytes / least_seconds(lambda: target.copy_(source))
