"""One group of linear layers under lattice masks: masks its input, checks and unmasks the product.

Shape suffixes: T tokens; D input and F output features; P pairs of them; B bytes of a row;
G blocks of features; W words of a block.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tsqp.algebra.fixed_point import Bounds
from tsqp.algebra.params import LATTICE
from tsqp.algebra.residue_blocks import BLOCK, UInt32
from tsqp.checkpoint.quantize import IntegerWeights
from tsqp.errors import IntegrityError, LatticeError, NumericalError, UnsupportedModel
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.crypto import kernels, lattice_kernels
from tsqp.tee.crypto.freivalds import VECTORS, CheckVectors, times
from tsqp.tee.crypto.kernels import ALL_ROWS
from tsqp.tee.crypto.rng import uniform
from tsqp.tee.crypto.row_pool import RowPool
from tsqp.tee.offload.checked_group import CheckedGroup


@dataclass(frozen=True, slots=True)
class MaskedRows:
    """What the TEE keeps for each row that was sent.

    Attributes:
        unit_T: size of one step of each row's integers.
        expected_T2: k_iW · c mod q, the expected value of [P13].
        expected_after_T: kW · xq mod P, the expected value of [P7] after rounding.
    """

    unit_T: NDArray[np.float64]
    expected_T2: NDArray[np.int64]
    expected_after_T: NDArray[np.int64]


class Switch:
    """Whether a process may use lattice masks: until one of them turns out to be wrong."""

    def __init__(self) -> None:
        self._reason = ""

    def check(self) -> None:
        """Raise LatticeError once it is off."""
        if self._reason:
            raise LatticeError(self._reason)

    def turn_off(self, group: LinearGroup) -> LatticeError:
        """Turn it off because a mask of this group was wrong; returns the error to raise."""
        self._reason = (
            f"A lattice mask of {group} is wrong, so this process uses no more lattice masks. The "
            "worker did not cause this; the hints or TSQP are wrong. Use --field wide, and report "
            "it."
        )
        return LatticeError(self._reason)


process_switch = Switch()  # for all sessions of the process


class LatticeGroup(CheckedGroup[MaskedRows]):
    """Check vectors, scales and bounds of one group; the weights themselves are not kept.

    Attributes:
        linear: which group it is.
        features, width: F and D.
    """

    field = LATTICE

    def __init__(
        self,
        linear: LinearGroup,
        weights: IntegerWeights,
        bias_F: Tensor | None,
        switch: "Switch | None" = None,
    ) -> None:
        """Draw check vectors [P6], [P13].

        Args:
            switch: by default, the one of the process.

        Raises:
            UnsupportedModel: the field is too small for these weights.
        """
        self._switch = process_switch if switch is None else switch
        self.linear = linear
        self.features, self.width = weights.weight_FD.shape
        bounds = Bounds.of(weights.weight_FD)
        self._l1, self._l2 = float(bounds.l1), math.sqrt(bounds.l2_squared)
        self.delta = bounds.delta(LATTICE)
        try:
            self._room = bounds.room(LATTICE)
        except ValueError as exc:
            raise UnsupportedModel(
                f"{linear} does not fit the lattice field: {exc}; use --field wide, or another "
                "model."
            ) from exc
        self._scale_F = weights.scale_F.double().numpy()
        self._bias_F = None if bias_F is None else bias_F.float()
        self._draw_checks(weights.weight_FD)

    def _draw_checks(self, weight_FD: Tensor) -> None:
        k_2F = uniform((VECTORS, self.features), LATTICE)
        self._k_22F = lattice_kernels.as_halves(k_2F)
        kw_2D = times(k_2F, weight_FD, LATTICE)
        self._kw_22D = lattice_kernels.as_halves(kw_2D)
        after = CheckVectors.draw(weight_FD)
        self._after_F = kernels.as_pairs(after.k_2F)[0]
        self._after_D = kernels.as_pairs(after.kw_2D)[0]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's residues, in both directions."""
        return LATTICE.residue_bytes * (self.width + self.features)

    def mask_for(
        self, others: Sequence[Self], x_TD: Tensor, r_GTW: UInt32, c_TB: Tensor, row_pool: RowPool
    ) -> list[MaskedRows]:
        """[P12]: c = Δ · xq + r mod q.

        Raises:
            NumericalError: a row of x is not finite.
            LatticeError: a mask was wrong before, in any session of this process.
        """
        self._switch.check()
        shards, x_np = [self, *others], x_TD.numpy()
        unit_T = np.empty(len(x_np))
        expected_T2 = [np.empty((len(x_np), VECTORS), np.int64) for _ in shards]
        expected_after_T = [np.empty(len(x_np), np.int64) for _ in shards]
        kernel = partial(
            lattice_kernels.quantize_and_mask,
            x_np,
            r_GTW,
            [each._kw_22D for each in shards],
            [each._after_D for each in shards],
            self._l1,
            self._l2,
            self._room,
            self.delta.bit_length() - 1,
            LATTICE.p,
            c_TB.numpy(),
            unit_T,
            expected_T2,
            expected_after_T,
        )
        if row_pool.run(len(x_np), kernel) != ALL_ROWS:
            raise NumericalError(
                f"The input of {self.linear} holds NaN or infinity; try --dtype float32, or check "
                "the model."
            )
        pairs = zip(expected_T2, expected_after_T, strict=True)
        return [MaskedRows(unit_T, expected, after) for expected, after in pairs]

    def check_and_unmask(
        self,
        z_TB: Tensor,
        u_GTW: UInt32,
        masked: MaskedRows,
        y_TF: Tensor,
        worker_name: str,
        row_pool: RowPool,
    ) -> None:
        """[P13], and then [P12], [P7] and [P3]: write y, or raise.

        Args:
            y_TF: float32, contiguous, in private memory; undefined if this raises.
            u_GTW: the masks' products, as `residue_blocks` has them.
            worker_name: names the worker at the beginning of an error message.

        Raises:
            IntegrityError: some row is not the product; nothing was unmasked.
            LatticeError: a mask was wrong, now or before, in any session of this process. The
                worker cannot cause this.
        """
        self._switch.check()
        z_TF = np.empty((len(y_TF), BLOCK * len(u_GTW)), np.int64)
        verify = partial(
            lattice_kernels.verify,
            kernels.aligned(z_TB),
            self._k_22F,
            masked.expected_T2,
            LATTICE.p,
            z_TF,
        )
        if row_pool.run(len(y_TF), verify) != ALL_ROWS:
            raise self.wrong_product(worker_name)
        unmask = partial(
            lattice_kernels.unmask,
            z_TF,
            u_GTW,
            self._after_F,
            self._scale_F,
            masked.unit_T,
            masked.expected_after_T,
            LATTICE.p,
            self.delta.bit_length() - 1,
            y_TF.numpy(),
        )
        if row_pool.run(len(y_TF), unmask) != ALL_ROWS:
            raise self._switch.turn_off(self.linear)
        if self._bias_F is not None:
            y_TF.add_(self._bias_F)

    def wrong_product(self, worker_name: str) -> IntegrityError:
        """The error to raise if an answer is not the product."""
        return IntegrityError(
            f"{worker_name} returned a wrong product for {self.linear}; the answer was "
            "discarded. Do not use this worker again."
        )
