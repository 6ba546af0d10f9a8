"""Which side runs which operation. An offload states this, and the decoder follows it."""

from dataclasses import dataclass
from typing import Literal

Side = Literal["TEE", "worker", "both"]


@dataclass(frozen=True, slots=True)
class Placement:
    """The side of each kind of operation.

    Attributes:
        linear: the worker's input may be masked.
        rms_norm: "both" if the worker runs whole layers, because the TEE runs the last norm.
    """

    embedding: Side = "TEE"
    linear: Side = "TEE"
    qk_product: Side = "TEE"
    softmax: Side = "TEE"
    pv_product: Side = "TEE"
    rms_norm: Side = "TEE"
    rotary: Side = "TEE"
    activation: Side = "TEE"
    sampling: Side = "TEE"

    @property
    def kv_in_tee(self) -> bool:
        """Whether keys and values are kept in the TEE."""
        return self.qk_product == "TEE"

    @property
    def splits_attention(self) -> bool:
        """Whether the softmax and the products around it run on different sides."""
        return self.softmax != self.qk_product

    @property
    def fuses_layers(self) -> bool:
        """Whether the worker runs whole layers."""
        return self.activation == "worker"


IN_TEE = Placement()
MASKED = Placement(linear="worker")
OPEN = Placement(embedding="worker", linear="worker")
OPEN_ATTENTION = Placement(
    embedding="worker", linear="worker", qk_product="worker", pv_product="worker"
)
OPEN_LAYERS = Placement(
    embedding="worker",
    linear="worker",
    qk_product="worker",
    softmax="worker",
    pv_product="worker",
    rms_norm="both",
    rotary="worker",
    activation="worker",
)
