"""The figures of `tsqp bench trusted-side`."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Self

from tsqp.bench.gpu_prediction import DeviceTimes
from tsqp.bench.simulated_gpu import Gpu


@dataclass(frozen=True, slots=True)
class Floor:
    """Costs of the trusted side in one mode; seconds.

    Attributes:
        prefill_s: wall time of the prompt, with masks made ahead.
        prefill_wait_s: the part of it spent waiting for answers, which is the transport's.
        prefill_cpu_s: processor time of the trusted side for the prompt.
        decode_s, decode_wait_s, decode_cpu_s: the same for each new token.
        masks_s: wall time to make one row of masks of every group, ahead of time, while nothing
            else runs; 0 in `open`.
        masks_cpu_s: the same in processor time.
        calls: calls to the worker for each new token.
    """

    prefill_s: float
    prefill_wait_s: float
    prefill_cpu_s: float
    decode_s: float
    decode_wait_s: float
    decode_cpu_s: float
    masks_s: float
    masks_cpu_s: float
    calls: float

    @classmethod
    def median(cls, floors: Sequence[Self]) -> Self:
        """The median of each figure."""
        return cls(*(statistics.median(_values(floors, name)) for name in _NAMES))

    def extrapolated(self, layers: int, other: "Floor", others: int, wanted: int) -> "Floor":
        """The figures of `wanted` layers, on the line through those of two depths.

        More layers cannot take less. A figure that says so shows only noise, and is NaN here.
        """
        times = (wanted - layers) / (others - layers)
        pairs = ((getattr(self, name), getattr(other, name)) for name in _NAMES)
        return Floor(
            *(
                one + times * (two - one) if (two - one) * (others - layers) >= 0 else math.nan
                for one, two in pairs
            )
        )


_NAMES = tuple(each.name for each in fields(Floor))


def _values(floors: Sequence[Floor], name: str) -> list[float]:
    return [getattr(each, name) for each in floors]


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the simulated GPU adds, for all layers.

    Attributes:
        gpu: what was simulated.
        simulated: by mode: the figures with a replay worker that takes the GPU's times.
        device: by mode: the GPU's times by the formula alone.
        weight_bytes: of the model's int8 weights.
        gpu_alone: the same for a GPU that runs the model by itself in bfloat16.
        waiting_errors: for waits of so many microseconds, by how many seconds they are too long
            here: the median, and the largest of 100.
    """

    gpu: Gpu
    simulated: dict[str, Floor]
    device: dict[str, DeviceTimes]
    weight_bytes: int
    gpu_alone: DeviceTimes
    waiting_errors: dict[int, tuple[float, float]]


@dataclass(frozen=True, slots=True)
class TrustedSideResult:
    """The figures of one geometry.

    Attributes:
        all_layers: number of layers of the geometry.
        layers: depths that were measured; one or two.
        measured: by mode and depth.
        floors: by mode, for all layers; extrapolated unless all layers were measured.
        prediction: with a simulated GPU; None without.
    """

    model: str
    dtype: str
    prompt_tokens: int
    new_tokens: int
    rounds: int
    threads: int
    all_layers: int
    layers: list[int]
    measured: dict[str, dict[int, Floor]]
    floors: dict[str, Floor]
    prediction: Prediction | None
    machine: dict[str, str]

    @property
    def is_extrapolated(self) -> bool:
        return self.all_layers not in self.layers

    def as_json(self) -> dict[str, object]:
        """Ready for JSON, which has no NaN."""
        return {name: _without_nan(value) for name, value in asdict(self).items()}


def _without_nan(value: object) -> object:
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def at_depth(measured: Mapping[int, Floor], layers: int) -> Floor:
    """The figures of so many layers: measured, or extrapolated from those of two depths."""
    if layers in measured:
        return measured[layers]
    (first, one), (second, two) = measured.items()
    return one.extrapolated(first, two, second, layers)
