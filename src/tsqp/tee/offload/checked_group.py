"""What groups of all fields have in common: copies with check vectors of their own.

Shape suffixes: D input and F output features of a group.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from typing import Any, Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tsqp.tee.crypto.row_pool import RowPool

Rows = TypeVar("Rows")  # what the TEE keeps for rows that were sent


class CheckedGroup(ABC, Generic[Rows]):
    """A group whose products are checked with secret vectors, which one worker's answers are for.

    Attributes:
        features: F.
    """

    features: int
    _scale_F: NDArray[np.float64]
    _bias_F: Tensor | None

    def mask(self, x_TD: Tensor, r_TD: NDArray[Any], c_TB: Tensor, row_pool: RowPool) -> Rows:
        """`mask_for` without other shards."""
        [kept] = self.mask_for((), x_TD, r_TD, c_TB, row_pool)
        return kept

    @abstractmethod
    def mask_for(
        self,
        others: Sequence[Self],
        x_TD: Tensor,
        r_TD: NDArray[Any],
        c_TB: Tensor,
        row_pool: RowPool,
    ) -> list[Rows]:
        """Write the masked input, and keep what is needed to check the answers to it.

        Args:
            others: further shards of the group, which get the same masked input.
            x_TD: float32, contiguous.
            r_TD: masks, as `tsqp.tee.crypto.pads.empty_rows` has them.
            c_TB: uint8, may be shared memory; the only value that leaves the TEE.

        Returns:
            what is kept for the answers to this group and to each of the others.

        Raises:
            NumericalError: a row of x is not finite.
        """

    def with_own_checks(self, weight_FD: Tensor) -> Self:
        """The same group for another worker: its check vectors are its own [P6], [P13].

        Args:
            weight_FD: the weights of this group.
        """
        return self.of_rows(slice(0, self.features), weight_FD)

    def of_rows(self, rows: slice, weight_FD: Tensor) -> Self:
        """A shard of the group: some output features, with check vectors of their own [P6], [P13].

        The bounds stay those of the whole group, so that all shards get the same masked input.

        Args:
            weight_FD: the weights of this group, all of them.
        """
        shard = copy(self)
        shard.features = rows.stop - rows.start
        shard._scale_F = self._scale_F[rows]
        shard._bias_F = None if self._bias_F is None else self._bias_F[rows]
        shard._draw_checks(weight_FD[rows])
        return shard

    @abstractmethod
    def _draw_checks(self, weight_FD: Tensor) -> None:
        """Draw check vectors, for an answer with the columns of these weights."""
