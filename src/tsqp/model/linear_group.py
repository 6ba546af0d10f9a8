"""Groups of linear layers that share their input, which every side computes as one product."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Part:
    """One linear layer of the checkpoint.

    Attributes:
        name: prefix of its tensors, for example "model.layers.0.self_attn.q_proj"; the weight is
            `name + ".weight"`, [out_features, in_features], and the bias `name + ".bias"`.
    """

    name: str
    out_features: int
    in_features: int
    bias: bool


@dataclass(frozen=True, slots=True)
class LinearGroup:
    """One group. Two groups are equal if they have the same place in a model: layer and name.

    Attributes:
        layer: 0-based; None for the output projection.
        name: "qkv", "o", "gate_up", "down", or "lm_head" for the output projection.
        features, width: F and D, the output and input features of the whole group.
        parts: the linear layers that it fuses, in the order of their outputs. Layers that the
            checkpoint has fused are one part. Empty for a group of a prepared file, which does
            not name them.
    """

    layer: int | None
    name: str
    features: int = field(compare=False)
    width: int = field(compare=False)
    parts: tuple[Part, ...] = field(default=(), compare=False)

    @classmethod
    def of(cls, layer: int | None, name: str, parts: tuple[Part, ...]) -> "LinearGroup":
        """The group that fuses `parts`, which all have the same input."""
        features = sum(part.out_features for part in parts)
        return cls(layer, name, features, parts[0].in_features, parts)

    @property
    def shape(self) -> tuple[int, int]:
        """(F, D), the shape of its weight."""
        return self.features, self.width

    def pieces(self, rows: slice) -> Iterator[tuple[Part, slice]]:
        """The parts that have some of the group's output features, and which of their own."""
        start = 0
        for part in self.parts:
            stop = start + part.out_features
            if rows.start < stop and start < rows.stop:
                yield part, slice(max(rows.start, start) - start, min(rows.stop, stop) - start)
            start = stop

    @property
    def has_bias(self) -> bool:
        """Whether any of its parts has a bias."""
        return any(part.bias for part in self.parts)

    @property
    def prefix(self) -> str:
        """Prefix of its tensors in digests, prepared files and hints files."""
        return self.name if self.layer is None else f"layers.{self.layer}.{self.name}"

    @property
    def integer_names(self) -> tuple[str, str]:
        """The names of its integers and scales [P1] in digests and prepared files."""
        return f"{self.prefix}.weight", f"{self.prefix}.scale"

    def integer_names_of(self, rows: slice) -> tuple[str, str]:
        """The same of some output features, in the digest of a shard."""
        weight, scale = self.integer_names
        return f"{weight}[{rows.start}:{rows.stop}]", f"{scale}[{rows.start}:{rows.stop}]"

    @property
    def hint_names(self) -> tuple[str, str]:
        """The names of the lower and upper bits of its hints [P10] in hints files."""
        return f"{self.prefix}.hints_low", f"{self.prefix}.hints_high"

    def __str__(self) -> str:
        return f"group {self.name}" + ("" if self.layer is None else f" of layer {self.layer}")


class LayerGroups(NamedTuple):
    """The groups of one layer, in canonical order."""

    qkv: LinearGroup
    o: LinearGroup
    gate_up: LinearGroup
    down: LinearGroup
