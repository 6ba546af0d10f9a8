"""Describes tensors on the wire: dtype name, shape and raw bytes."""

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from tsqp.wire.messages import Dtype, TensorRef, WeightsDtype

TORCH_DTYPES: dict[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "uint8": torch.uint8,
}
DTYPE_NAMES: dict[torch.dtype, Dtype] = {dtype: name for name, dtype in TORCH_DTYPES.items()}
WEIGHTS_DTYPES: dict[torch.dtype, WeightsDtype] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int8: "int8",
}


class Spec(NamedTuple):
    """Shape and dtype of a tensor that does not exist yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def at(self, offset: int) -> TensorRef:
        """A reference to a tensor of this shape and dtype at `offset`."""
        return TensorRef(DTYPE_NAMES[self.dtype], self.shape, offset)

    def __str__(self) -> str:
        return f"{DTYPE_NAMES[self.dtype]}{list(self.shape)}"


def spec_of(ref: TensorRef) -> Spec:
    """The shape and dtype of a reference."""
    return Spec(ref.shape, TORCH_DTYPES[ref.dtype])


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.view(-1).view(torch.uint8).numpy().data
