"""Converts a checkpoint's tensors to the tensors that computation uses, one group at a time.

Shape suffixes: F output and D input features of a linear layer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tsqp.checkpoint.blocks import read_blocks
from tsqp.checkpoint.checkpoint import Checkpoint
from tsqp.checkpoint.memory import available_bytes
from tsqp.checkpoint.weights_digest import TensorHash, WeightsDigest, hashing
from tsqp.errors import ModelError, OutOfMemory
from tsqp.model.config import EMBEDDING, ModelConfig, linear_groups, norm_shapes
from tsqp.model.linear_group import LinearGroup

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class LinearWeights:
    """The weights of one group of linear layers, the parts' outputs concatenated along F.

    Attributes:
        weight_FD: in the run's dtype, and in the memory order of `empty_matrix`.
        bias_F: None if no part has a bias; zeros for the parts without one.
    """

    weight_FD: Tensor
    bias_F: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.weight_FD.nbytes + (0 if self.bias_F is None else self.bias_F.nbytes)


def parse_dtype(name: str, config: ModelConfig) -> torch.dtype:
    """The dtype called `name`, where "auto" means the checkpoint's own.

    Raises:
        ModelError: no such dtype.
    """
    dtype = DTYPES.get(config.dtype if name == "auto" else name)
    if dtype is None:
        raise ModelError(f"There is no such dtype: choose auto, {', '.join(DTYPES)}.")
    return dtype


def read_linear(
    checkpoint: Checkpoint,
    group: LinearGroup,
    dtype: torch.dtype,
    digest: WeightsDigest | None = None,
    device: torch.device = CPU,
) -> LinearWeights:
    """Read one group into one tensor, and add its parts to `digest`.

    Holds a block of rows besides. The biases stay on the CPU.

    Raises:
        CheckpointError: a tensor is missing, cut short, of another shape, or not finite.
    """
    weight_FD = empty_matrix(group.features, group.width, dtype, device)
    start = 0
    for part in group.parts:
        rows = slice(start, start + part.out_features)
        _read_into(weight_FD[rows], checkpoint, f"{part.name}.weight", digest)
        start = rows.stop
    return LinearWeights(weight_FD, read_bias(checkpoint, group, dtype, digest))


def read_bias(
    checkpoint: Checkpoint,
    group: LinearGroup,
    dtype: torch.dtype,
    digest: WeightsDigest | None = None,
) -> Tensor | None:
    """The biases of one group, [F]: None if no part has one, zeros for the parts without."""
    if not group.has_bias:
        return None
    bias_F = torch.zeros(group.features, dtype=dtype)
    start = 0
    for part in group.parts:
        rows = slice(start, start + part.out_features)
        if part.bias:
            _read_into(bias_F[rows], checkpoint, f"{part.name}.bias", digest)
        start = rows.stop
    return bias_F


def empty_matrix(
    features: int, width: int, dtype: torch.dtype, device: torch.device = CPU
) -> Tensor:
    """Room for [F, D], in the memory order in which `device` multiplies one token fastest.

    For float32 on a CPU this is column order: MKL's matrix-vector product then reads memory 1.4 to
    2 times as fast, and products with many tokens take as long as before. The half-width types use
    oneDNN, which needs row order.
    """
    if dtype == torch.float32 and device.type == "cpu":
        return torch.empty(width, features).t()
    return torch.empty(features, width, dtype=dtype, device=device)


def read_embedding(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    digest: WeightsDigest | None = None,
    device: torch.device = CPU,
    *,
    multiplies: bool = False,
) -> Tensor:
    """The embedding table, [vocab_size, hidden_size], added to `digest`.

    Args:
        multiplies: whether it is also the output projection, and needs that memory order.
    """
    shape = checkpoint.config.vocab_size, checkpoint.config.hidden_size
    if multiplies:
        table = empty_matrix(*shape, dtype, device)
    else:
        table = torch.empty(shape, dtype=dtype, device=device)
    _read_into(table, checkpoint, EMBEDDING, digest)
    return table


def read_norm(
    checkpoint: Checkpoint, name: str, dtype: torch.dtype, digest: WeightsDigest | None = None
) -> Tensor:
    """A norm's weight as it is stored, added to `digest`; `name` is one of `norm_shapes`."""
    weight = torch.empty(norm_shapes(checkpoint.config)[name], dtype=dtype)
    _read_into(weight, checkpoint, name, digest)
    return weight


def norm_weight(config: ModelConfig, stored: Tensor) -> Tensor:
    """The weight for `ops.rms_norm`; float32 if the family adds an offset to the stored weight."""
    return stored if config.norm_offset == 0 else stored.float() + config.norm_offset


def _read_into(
    target: Tensor, checkpoint: Checkpoint, name: str, digest: WeightsDigest | None
) -> None:
    """Read, convert, hash and place one tensor, a block of rows at a time."""
    shape = tuple(target.shape)
    found = None if digest is None else TensorHash(name, shape, target.dtype)
    with hashing(found) as add:
        for rows, block in read_blocks(checkpoint, name, shape, target.dtype):
            add(block)
            place_rows(target, rows, block)
    if digest is not None and found is not None:
        digest.add(found)


def place_rows(target: Tensor, rows: slice, block: Tensor) -> None:
    """Copy rows to their place in a tensor, which may be in the order of `empty_matrix`."""
    if target.dim() == 2 and target.stride(0) == 1:  # whole pieces of columns
        target.t()[:, rows].copy_(block.t().contiguous())
    else:
        target[rows].copy_(block)


def linear_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of all linear weights and biases, the output projection (also a tied one) included."""
    parts = [part for group in linear_groups(config) for part in group.parts]
    elements = sum(part.out_features * (part.in_features + part.bias) for part in parts)
    return int(dtype.itemsize) * elements


def embedding_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of the embedding table."""
    return int(dtype.itemsize) * config.vocab_size * config.hidden_size


def check_memory(required: int, what: str, advice: str = "choose a smaller dtype or model") -> None:
    """Raise early if something would not fit into memory.

    Args:
        required: bytes.
        what: the subject of the message, such as "The model's weights".
        advice: what else the user can do than free some memory.

    Raises:
        OutOfMemory: fewer bytes are free, in the machine or in this process's control group.
    """
    available = available_bytes()
    if required > available:
        raise OutOfMemory(
            f"{what} would take {required} bytes ({required / 2**30:.1f} GiB), and {available}"
            f" bytes ({available / 2**30:.1f} GiB) are available: free some, or {advice}."
        )
