"""A layer under lattice masks at its bounds: all numbers equal those of Python's integers [P12]."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from crypto_helpers import rows_of_every_kind
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from mask_blocks import from_blocks, to_blocks
from tsqp.algebra import residue_bytes
from tsqp.algebra.int8_product import residue_product
from tsqp.algebra.native import compiled
from tsqp.algebra.params import LATTICE
from tsqp.checkpoint.quantize import IntegerWeights
from tsqp.errors import IntegrityError, UnsupportedModel
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.crypto import lattice_kernels
from tsqp.tee.crypto.rng import uniform
from tsqp.tee.crypto.row_pool import RowPool
from tsqp.tee.offload.lattice_group import LatticeGroup, Switch

Q = LATTICE.p
ROWS = RowPool(1)


class Exact:
    """A group, and a worker, in exact arithmetic; masks are uniform, and so is their error."""

    def __init__(self, weight_FD: Tensor) -> None:
        self.weight_FD = weight_FD.to(torch.int8)
        self.weights = IntegerWeights(self.weight_FD, torch.ones(len(weight_FD)))
        self.group = LatticeGroup(
            LinearGroup(2, "down", *weight_FD.shape), self.weights, None, Switch()
        )

    def pack(self, residues_TN: NDArray[np.int64]) -> NDArray[np.uint8]:
        rows = np.empty((len(residues_TN), 6 * residues_TN.shape[1]), np.uint8)
        residue_bytes.pack(residues_TN, LATTICE, rows)
        return rows

    def product(self, residues_TD: NDArray[np.int64]) -> NDArray[np.int64]:
        z_TF = torch.empty(len(residues_TD), len(self.weight_FD), dtype=torch.int64)
        residue_product(torch.from_numpy(residues_TD), self.weight_FD, LATTICE, z_TF)
        return z_TF.numpy()

    def integers(self, x_D: list[float]) -> list[int]:
        """[P2] with the room of [P12], in float64 for the scale, fractions for the rounding."""
        rows = self.weight_FD.long()
        l1, l2 = int(rows.abs().sum(1).max()), math.sqrt(int(rows.square().sum(1).max()))
        squares = math.fsum(v * v for v in x_D)
        bound = min(l1 * max(map(abs, x_D)), l2 * math.sqrt(squares))
        if bound == 0:
            return [0] * len(x_D)
        delta = self.group.delta
        room = (1 - 2.0**-30) * (((Q - 1) // 2 - delta // 2) / delta - l1 / 2)
        return [round(Fraction(v * (room / bound))) for v in x_D]

    def run(self, x_TD: Tensor, error: int = 0) -> None:
        """Mask, multiply and unmask, with Wq · e = `error` everywhere, and compare everything."""
        group, tokens = self.group, len(x_TD)
        r_TD = uniform((tokens, group.width), LATTICE)
        u_TF = (self.product(r_TD) - error) % Q
        c_TB = torch.empty(tokens, 6 * group.width, dtype=torch.uint8)
        masked = group.mask(x_TD, to_blocks(r_TD), c_TB, ROWS)
        c_TD = np.empty((tokens, group.width), np.int64)
        residue_bytes.unpack(c_TB.numpy(), LATTICE, c_TD)
        z_TF = self.product(c_TD)
        y_TF = torch.empty(tokens, group.features)
        z_TB = torch.from_numpy(self.pack(z_TF))
        group.check_and_unmask(z_TB, to_blocks(u_TF), masked, y_TF, "It", ROWS)
        for t, x_D in enumerate(x_TD.double().tolist()):
            xq_D = self.integers(x_D)
            found = [(c - r + Q // 2) % Q - Q // 2 for c, r in zip(c_TD[t], r_TD[t], strict=True)]
            # The order of a sum of squares may move the scale by its last bit.
            assert all(abs(f // group.delta - x) <= 1 for f, x in zip(found, xq_D, strict=True))
            assert all(f % group.delta == 0 for f in found)
            xq = np.array([f // group.delta for f in found], dtype=object)
            yq_F = self.weight_FD.numpy().astype(object) @ xq
            assert all(abs(group.delta * int(y)) + group.delta // 2 <= (Q - 1) // 2 for y in yq_F)
            assert all(abs(int(y)) < 2**31 for y in yq_F)
            expected = torch.tensor([float(y) for y in yq_F], dtype=torch.float64)
            assert torch.equal(y_TF[t], (expected * masked.unit_T[t]).float())


def weight(features: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight_FD = torch.randint(-127, 128, (features, width), generator=generator)
    weight_FD[:, 0] = 127
    return weight_FD


@pytest.mark.parametrize("sign", [1, -1])
def test_inputs_that_reach_the_bounds_of_hoelder_and_of_cauchy_and_schwarz(sign: int) -> None:
    weight_FD = weight(6, 50)
    exact = Exact(weight_FD)
    heaviest = weight_FD[weight_FD.abs().sum(1).argmax()]
    longest = weight_FD[weight_FD.square().sum(1).argmax()]
    one = torch.zeros(50)
    one[0] = 1e20
    x_TD = sign * torch.stack([heaviest.sign().float(), longest.float() * 1e-3, one])
    for error in (0, exact.group.delta // 2 - 1, 1 - exact.group.delta // 2):
        exact.run(x_TD, error)


def test_rows_of_every_kind() -> None:
    Exact(weight(8, 37)).run(rows_of_every_kind(37))


def test_one_input_feature() -> None:
    Exact(torch.tensor([[127], [-127], [0], [1]])).run(torch.tensor([[3.5], [-1e-30], [0.0]]))


def test_weights_that_are_all_zero() -> None:
    Exact(torch.zeros(3, 5)).run(torch.randn(4, 5, generator=torch.Generator().manual_seed(0)))


def test_the_widest_group_there_may_be() -> None:
    light = weight(2, 131_072).sign()
    light[:, 0] = 127
    x_TD = torch.randn(2, 131_072, generator=torch.Generator().manual_seed(0))
    x_TD[1] = 1.0
    Exact(light).run(x_TD)
    with pytest.raises(UnsupportedModel, match=r"would keep . levels, but 64 are needed"):
        Exact(torch.full((1, 131_072), 127))


@settings(max_examples=25)
@given(
    features=st.integers(1, 9),
    width=st.integers(1, 40),
    seed=st.integers(0, 1000),
    exponent=st.integers(-30, 30),
)
def test_layers_of_any_shape(features: int, width: int, seed: int, exponent: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(3, width, generator=generator) * 2.0**exponent
    exact = Exact(weight(features, width, seed))
    exact.run(x_TD, seed % exact.group.delta - exact.group.delta // 2 + 1 if seed else 0)


def test_delta_is_a_power_of_two_of_twenty_deviations_and_products_fit_32_bits() -> None:
    for features, width in ((1, 1), (4, 1000), (2, 20_000)):
        group = Exact(weight(features, width)).group
        l2 = float(weight(features, width).double().square().sum(1).max()) ** 0.5
        assert group.delta & (group.delta - 1) == 0
        assert group.delta >= max(20 * 8**0.5 * l2, Q / 2**31) > group.delta / 2
        assert (Q - 1) / 2 / group.delta < 2**31


def test_no_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsqp.algebra.fixed_point.Bounds.delta", lambda *_: 2**44)
    with pytest.raises(UnsupportedModel, match="down of layer 2 does not fit the lattice field"):
        Exact(weight(3, 5))


@compiled("void(int32[:, :, ::1], int64[::1], int64, int64[::1])")
def _two_dots(
    k_22D: NDArray[np.int32], c_D: NDArray[np.int64], q: int, out_2: NDArray[np.int64]
) -> None:
    out_2[0], out_2[1] = lattice_kernels._two_dots(k_22D, c_D, q)


@pytest.mark.parametrize("length", [1, 2**14 - 1, 2**14, 2**14 + 1, 131_072])
def test_sums_of_products_are_exact_at_the_extremes(length: int) -> None:
    low = 2**lattice_kernels.HALF_BITS - 1  # with the largest lower half, and nearly the upper one
    largest = ((Q >> lattice_kernels.HALF_BITS) - 1 << lattice_kernels.HALF_BITS) + low
    out_2 = np.empty(2, np.int64)
    for c in (Q - 1, largest, low, 0):
        k_2D = np.stack([np.full(length, Q - 1), np.full(length, largest)])
        _two_dots(lattice_kernels.as_halves(k_2D), np.full(length, c), Q, out_2)
        assert out_2.tolist() == [length * (Q - 1) * c % Q, length * largest * c % Q]
    k_2D, c_D = uniform((2, length), LATTICE), uniform((length,), LATTICE)
    _two_dots(lattice_kernels.as_halves(k_2D), c_D, Q, out_2)
    for found, k_D in zip(out_2.tolist(), k_2D.tolist(), strict=True):
        assert found == sum(k * c for k, c in zip(k_D, c_D.tolist(), strict=True)) % Q


class Crossing:
    """One row that is out, whose memory is shared."""

    def __init__(self) -> None:
        self.exact = exact = Exact(weight(6, 9))
        self.c_TB = torch.empty(1, 6 * 9, dtype=torch.uint8)
        r_TD = uniform((1, 9), LATTICE)
        self.u_GTW = to_blocks(exact.product(r_TD))
        x_TD = torch.arange(9.0)[None]
        self.masked = exact.group.mask(x_TD, to_blocks(r_TD), self.c_TB, ROWS)
        c_TD = np.empty((1, 9), np.int64)
        residue_bytes.unpack(self.c_TB.numpy(), LATTICE, c_TD)
        self.z_TF = exact.product(c_TD)

    def product(self, z_TF: NDArray[np.int64]) -> Tensor:
        y_TF = torch.empty(1, 6)
        z_TB = torch.from_numpy(self.exact.pack(z_TF))
        self.exact.group.check_and_unmask(z_TB, self.u_GTW, self.masked, y_TF, "It", ROWS)
        return y_TF


def test_an_input_that_changes_in_shared_memory_changes_no_verdict() -> None:
    crossing = Crossing()
    expected = crossing.product(crossing.z_TF)
    crossing.c_TB.zero_()
    assert torch.equal(crossing.product(crossing.z_TF), expected)


def test_an_answer_that_changes_in_shared_memory_after_its_check_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    crossing = Crossing()
    expected, shared_TB = crossing.product(crossing.z_TF), crossing.exact.pack(crossing.z_TF)
    verify = lattice_kernels.verify

    def then_change(*arguments: Any) -> int:
        found = verify(*arguments)
        shared_TB[:] = 0
        return found

    monkeypatch.setattr(lattice_kernels, "verify", then_change)
    monkeypatch.setattr(crossing.exact, "pack", lambda _: shared_TB)
    assert torch.equal(crossing.product(crossing.z_TF), expected)
    assert not shared_TB.any()


def sizes(delta: int) -> list[int]:
    """Of errors: one unit, around half of Δ and Δ, multiples of the other modulus, and q - 1."""
    p = 2**31 - 1
    halves = [delta // 2 - 1, delta // 2, delta // 2 + 1, delta - 1, delta, delta + 1]
    return [1, *halves, p, 2 * p, 1000 * p, Q // 2, Q - 1]


def test_an_error_of_any_size_has_the_same_verdict_whatever_the_noise_is() -> None:
    crossing = Crossing()
    delta = crossing.exact.group.delta
    u_TF = from_blocks(crossing.u_GTW, 6)
    for noise in (0, delta // 2 - 1, 1 - delta // 2, 17):
        crossing.u_GTW = to_blocks((u_TF - noise) % Q)
        crossing.product(crossing.z_TF)
        for error in sizes(delta):
            for sign in (1, -1):
                wrong_TF = crossing.z_TF.copy()
                wrong_TF[0, 3] = (wrong_TF[0, 3] + sign * error) % Q
                with pytest.raises(IntegrityError, match="wrong product"):
                    crossing.product(wrong_TF)
