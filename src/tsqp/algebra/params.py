"""The fields of the masking protocol, and the modulus of its check."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

FieldName = Literal["wide", "compact", "lattice"]

CHECK_MODULUS = 2**31 - 1  # P of [P6] and [P7]: prime, and at least the p of WIDE and COMPACT
MAX_WIDTH = 131_072  # input features D: sums of int8 products stay below 2^31


@dataclass(frozen=True, slots=True)
class Field:
    """The integers mod p, where p = 2^bits - gap is prime and `gap` is small.

    Attributes:
        digits: L, how many balanced base-256 digits hold any residue [P9].
        residue_bytes: bytes of one residue on the wire.
    """

    name: FieldName
    bits: int
    gap: int
    digits: int
    residue_bytes: int

    @property
    def p(self) -> int:
        return (1 << self.bits) - self.gap

    @property
    def dtype(self) -> Any:
        """The dtype of arrays of residues: int32, or int64 if they do not fit into that."""
        return np.int32 if self.bits < 32 else np.int64

    @property
    def half(self) -> int:
        """The largest centred residue."""
        return (self.p - 1) // 2

    @property
    def largest_digits(self) -> int:
        """The largest number that L balanced digits hold; residues above it stand for c - p."""
        return int(127 * (256**self.digits - 1) // 255)


WIDE = Field("wide", bits=31, gap=1, digits=4, residue_bytes=4)
COMPACT = Field("compact", bits=24, gap=3, digits=3, residue_bytes=3)
LATTICE = Field("lattice", bits=46, gap=110_591, digits=6, residue_bytes=6)
FIELDS: dict[FieldName, Field] = {field.name: field for field in (WIDE, COMPACT, LATTICE)}
DEGREE = 2048  # N of the ring of [P10]: rows of a batch of lattice masks
DIRECT_FIELDS = (WIDE, COMPACT)  # the fields of pads and shares
