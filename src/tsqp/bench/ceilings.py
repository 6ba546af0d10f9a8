"""What this machine could do at best, measured in the same run as what it did."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

REPEATS = 5


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The best rates seen.

    Attributes:
        matmul_flops: floating-point operations a second in one large product.
        read_bytes_per_s: weights streamed from memory by a matrix-vector product.
    """

    matmul_flops: float
    read_bytes_per_s: float


def measure_ceilings(dtype: torch.dtype) -> Ceilings:
    """Measure with the threads that torch is set to."""
    size = 2048
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    product_s = _best(lambda: torch.mm(a, b))
    # Far larger than any cache, so that every pass comes from memory.
    weight = torch.ones(2**29 // dtype.itemsize // size, size, dtype=dtype)
    row = torch.ones(1, size, dtype=dtype)
    stream_s = _best(lambda: torch.nn.functional.linear(row, weight))
    return Ceilings(2 * size**3 / product_s, weight.nbytes / stream_s)


def _best(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
