"""The residues of a call, in private host memory, for backends that do not read bytes.

Shape suffixes: T tokens; D input features; B bytes of a row.
"""

import numpy as np
import torch
from torch import Tensor

from tsqp.algebra import digits, rejection, residue_bytes
from tsqp.algebra.params import FIELDS, Field
from tsqp.wire import seeds


def compile_loops() -> None:
    """Compile the loops for all fields."""
    for field in FIELDS.values():
        digits.compile_loops(field)
        rejection.compile_loops(field)
        residue_bytes.compile_loops(field)


def unpack(c_TB: Tensor, field: Field) -> Tensor:
    """c_TD of the field's dtype as it was sent, with what is not a residue. Reads c_TB once."""
    c_TD = np.empty((len(c_TB), c_TB.shape[1] // field.residue_bytes), field.dtype)
    residue_bytes.unpack(c_TB.numpy(), field, c_TD)
    return torch.from_numpy(c_TD)


def expand(seed: bytes, rows: int, width: int, field: Field) -> Tensor:
    """c_TD of the field's dtype, the residues that a seed stands for [P8]."""
    c_TD = np.empty((rows, width), field.dtype)
    seeds.expand(seed, c_TD.reshape(-1), field)
    return torch.from_numpy(c_TD)
