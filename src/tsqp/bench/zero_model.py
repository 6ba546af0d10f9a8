"""A model whose matrices are all zero, so that the right answer to every call is known: zeros."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tsqp.checkpoint.files import BinaryFile
from tsqp.checkpoint.random_weights import RandomCheckpoint
from tsqp.errors import UsageError
from tsqp.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class ZeroCheckpoint:
    """The geometry of a random model, perhaps with fewer layers. See `checkpoint.Checkpoint`.

    Every matrix is zero. Norms and biases are those of the random model.
    """

    random: RandomCheckpoint
    layers: int

    @classmethod
    def parse(cls, model: str, layers: int | None = None) -> "ZeroCheckpoint":
        """The model "random:NAME[:SEED]" with its first `layers` layers, or all of them.

        Raises:
            UsageError: another kind of model, or it does not have so many layers.
            ModelError: there is no such geometry.
        """
        if not model.startswith("random:"):
            raise UsageError("This benchmark takes a geometry: give the model as random:NAME.")
        random = RandomCheckpoint.parse(model)
        most = random.config.num_layers
        if layers is not None and not 1 <= layers <= most:
            raise UsageError(f"{model} has {most} layers; ask for 1 to {most}.")
        return cls(random, layers or most)

    @property
    def config(self) -> ModelConfig:
        whole = self.random.config
        return replace(whole, layers=whole.layers[: self.layers])

    @property
    def name(self) -> str:
        return f"{self.random.name} with {self.layers} layers and zeros as weights"

    @property
    def sources(self) -> dict[str, BinaryFile]:
        """See `checkpoint.Checkpoint`."""
        return {}

    def file_digests(self) -> dict[str, str]:
        """See `checkpoint.Checkpoint`."""
        return self.random.file_digests()

    def read(self, name: str, shape: tuple[int, ...], rows: slice | None = None) -> Tensor:
        """float32; see `checkpoint.Checkpoint`."""
        if len(shape) == 1:
            return self.random.read(name, shape, rows)
        first, last = (0, shape[0]) if rows is None else (rows.start, rows.stop)
        return torch.zeros(last - first, *shape[1:])

    def close(self) -> None:
        pass
