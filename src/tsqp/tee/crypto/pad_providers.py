"""Who makes pads: the interface, and the provider of pads [P4]. Lattice masks: see `lattice`.

Shape suffixes: N rows; D input and F output features of a group.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tsqp.algebra.int8_product import residue_product
from tsqp.algebra.params import DIRECT_FIELDS, Field
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.crypto.pads import Pads
from tsqp.tee.crypto.rng import uniform

BATCH_ROWS = 64  # made at once: enough for the matrix units
BATCH_PRODUCTS = 2**29  # and at most this many, so that the engine never waits long for a core
BATCHES = 4  # at least, of a small stock: it is refilled before it is used up


class PadProvider(Protocol):
    """Makes batches of pads."""

    @property
    def field(self) -> Field:
        """The field of the residues."""
        ...

    def stock_rows(self, memory_rows: int) -> int:
        """How many rows the stock of a group has room for, if memory suffices for this many.

        It may be more than that: the rest of a batch that was made when needed is kept in any case.
        """
        ...

    def batch_rows(self, key: LinearGroup, room: int, memory_rows: int) -> int:
        """How many rows of a group to make ahead at once; 0 if there is too little room.

        Args:
            room: rows that the stock of the group has room for, at most `memory_rows`.
        """
        ...

    def rows_made(self, key: LinearGroup, rows: int) -> int:
        """How many rows to make for somebody who waits for this many; it may be more or fewer."""
        ...

    def make(self, key: LinearGroup, pads: Pads, place: list[int]) -> None:
        """Write fresh pads of one group, never given out before, to these rows of `pads`.

        Args:
            place: as many rows as `batch_rows` or `rows_made` said.
        """
        ...

    def forget(self) -> None:
        """Erase what pads to come would be made from; safe to call twice."""
        ...


class DirectProvider:
    """[P4]: the TEE multiplies its own random rows."""

    def __init__(self, weights_FD: Mapping[LinearGroup, Tensor], field: Field) -> None:
        assert field in DIRECT_FIELDS
        self._weights_FD = weights_FD
        self.field = field

    def stock_rows(self, memory_rows: int) -> int:
        return memory_rows

    def batch_rows(self, key: LinearGroup, room: int, memory_rows: int) -> int:
        a_part, products = -(-memory_rows // BATCHES), self._weights_FD[key].numel()
        return min(room, max(1, min(BATCH_ROWS, a_part, BATCH_PRODUCTS // products)))

    def rows_made(self, key: LinearGroup, rows: int) -> int:
        return rows

    def make(self, key: LinearGroup, pads: Pads, place: list[int]) -> None:
        weight_FD = self._weights_FD[key]
        features, width = weight_FD.shape
        r_ND = uniform((len(place), width), self.field)
        u_NF = np.empty((len(place), features), np.int32)
        residue_product(torch.from_numpy(r_ND), weight_FD, self.field, torch.from_numpy(u_NF))
        made = Pads(r_ND, u_NF)
        pads.put(place, made)
        made.wipe()

    def forget(self) -> None:
        pass
