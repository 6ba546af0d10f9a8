"""How long a stated GPU would take for a call, by a model: a prediction, no measurement.

A call copies its input over the link, reads the weights from the GPU's memory while it multiplies,
and copies the answer back. One call follows another.
"""

import os
import time
from dataclasses import dataclass

from tsqp.algebra.params import Field
from tsqp.errors import UsageError

SPIN_S = 100e-6  # a sleep may end this much too late, so the last part of a wait spins


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU with its link.

    The rates are those of the data sheet, for dense matrices. Programs reach `efficiency` of them.

    Attributes:
        memory_bytes: size of its memory.
        read_bytes_per_s: rate of its memory.
        int8_ops, bf16_flops: operations a second, where a multiplication and an addition are two.
        link_bytes_per_s: of the link to the host, in one direction.
        call_s: fixed time of a call: launching the product, and starting both copies.
        efficiency: part of each rate that is reached.
    """

    name: str
    memory_bytes: float
    read_bytes_per_s: float
    int8_ops: float
    bf16_flops: float
    link_bytes_per_s: float
    call_s: float
    efficiency: float

    def product_s(
        self, rows: int, features: int, width: int, sent_bytes: int, field: Field | None
    ) -> float:
        """Seconds of one call.

        Args:
            features, width: output and input features of the group.
            sent_bytes: bytes of the input and of the answer.
            field: of the residues, whose digits are multiplied by int8 weights; None for `open`,
                where the GPU multiplies in bfloat16.
        """
        products = 2 * rows * features * width
        if field is None:
            weight_bytes, compute_s = 2 * features * width, products / self.bf16_flops
        else:
            weight_bytes, compute_s = features * width, field.digits * products / self.int8_ops
        bound_s = max(compute_s, weight_bytes / self.read_bytes_per_s)
        return self.call_s + (bound_s + sent_bytes / self.link_bytes_per_s) / self.efficiency


# NVIDIA's data sheets of the H100 and H200 have the rates of memory and of tensor cores; those are
# with sparsity, and half of them without. PCIe 5.0 x16 transfers 64 GB/s in each direction. A copy
# takes 5 to 7 µs to start (Wu et al., 2026, arXiv:2602.21548, section 5.2), and there are two. That
# a launch takes 6 µs, and that programs reach 0.7 of each rate, are assumptions.
_CALL_S, _EFFICIENCY, _LINK = 18e-6, 0.7, 64e9
GPUS = {
    "h100-pcie": Gpu("H100 PCIe", 80e9, 2.0e12, 1513e12, 756e12, _LINK, _CALL_S, _EFFICIENCY),
    "h100-sxm": Gpu("H100 SXM", 80e9, 3.35e12, 1979e12, 989e12, _LINK, _CALL_S, _EFFICIENCY),
    "h200-sxm": Gpu("H200 SXM", 141e9, 4.8e12, 1979e12, 989e12, _LINK, _CALL_S, _EFFICIENCY),
    # No device that exists: so slow that two cores are enough to wait for several of them.
    "slow": Gpu("a slow device", 8e9, 0.1e9, 0.5e12, 0.25e12, _LINK, _CALL_S, _EFFICIENCY),
}


def find_gpu(name: str) -> Gpu:
    """The GPU called `name`.

    Raises:
        UsageError: there is none.
    """
    if name not in GPUS:
        raise UsageError(f"There is no such simulated GPU; choose {', '.join(GPUS)}.")
    return GPUS[name]


def wait_until(moment: float) -> None:
    """Wait until `time.perf_counter()` reaches `moment`.

    Sleeps, and leaves the cores to others, except for the last SPIN_S, in which it offers its core
    again and again.
    """
    left = moment - time.perf_counter()
    if left > SPIN_S:
        time.sleep(left - SPIN_S)
    while time.perf_counter() < moment:
        os.sched_yield()


def waiting_error_s(seconds: float, times: int = 200) -> tuple[float, float]:
    """By how much waits of `seconds` are too long here: the median, and the largest of 100."""
    late = []
    for _ in range(times):
        moment = time.perf_counter() + seconds
        wait_until(moment)
        late.append(time.perf_counter() - moment)
    late.sort()
    return late[times // 2], late[times - 1 - times // 100]
