"""Lays measured figures of a GPU beside those that a simulated one predicted."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MODES = {"open": "open", "pad": "wide"}  # of `tsqp bench`, and of `tsqp bench trusted-side`


@dataclass(frozen=True, slots=True)
class Beside:
    """One mode; seconds.

    Attributes:
        prefill_s, decode_s: measured.
        predicted_prefill_s, predicted_decode_s: with a simulated GPU.
    """

    mode: str
    prefill_s: float
    predicted_prefill_s: float
    decode_s: float
    predicted_decode_s: float

    def __str__(self) -> str:
        return (
            f"{self.mode}: prefill {self.prefill_s:.3f} s (predicted {self.predicted_prefill_s:.3f}"
            f"), decode {1e3 * self.decode_s:.2f} ms a token (predicted "
            f"{1e3 * self.predicted_decode_s:.2f})"
        )


def closest_gpu(name: str) -> str:
    """The simulated GPU that is most like a device of this name, as CUDA tells it."""
    if "H200" in name:
        return "h200-sxm"
    return "h100-pcie" if "PCIe" in name else "h100-sxm"


def lay_beside(measured: Mapping[str, Any], predicted: Mapping[str, Any]) -> Iterator[Beside]:
    """The modes that both results have: one of `tsqp bench`, one of `tsqp bench trusted-side`."""
    prediction = predicted.get("prediction") or {}
    simulated = prediction.get("simulated", {})
    for mode, other in MODES.items():
        if mode in measured.get("prefill_s", {}) and other in simulated:
            yield Beside(
                mode,
                measured["prefill_s"][mode]["median"],
                simulated[other]["prefill_s"],
                measured["decode_s_per_token"][mode]["median"],
                simulated[other]["decode_s"],
            )
