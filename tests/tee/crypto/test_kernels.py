"""The two trusted loops, against exact arithmetic on the same definitions."""

import numpy as np
import pytest
import torch
from crypto_helpers import (
    Layer,
    centred,
    check_product,
    exact_integers,
    integer_weights,
    product,
    rows_of_every_kind,
)

from tsqp.algebra import residue_bytes
from tsqp.algebra.params import CHECK_MODULUS, DIRECT_FIELDS, WIDE, Field
from tsqp.checkpoint.quantize import IntegerWeights
from tsqp.errors import IntegrityError, NumericalError
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.crypto.freivalds import CheckVectors
from tsqp.tee.crypto.kernels import ALL_ROWS
from tsqp.tee.crypto.row_pool import RowPool
from tsqp.tee.offload.masked import MaskedGroup

BOTH = pytest.mark.parametrize("field", DIRECT_FIELDS, ids=lambda field: field.name)


@BOTH
def test_what_goes_out_is_the_rounded_input_plus_the_pad(field: Field) -> None:
    layer = Layer(field)
    x_TD = rows_of_every_kind(layer.group.width)
    r_TD, _ = layer.pads(len(x_TD))
    _, c_TD = layer.mask(x_TD, r_TD)
    for x_D, r_D, c_D in zip(x_TD.tolist(), r_TD.tolist(), c_TD.tolist(), strict=True):
        xq_D = exact_integers(x_D, layer.weights.weight_FD, field)
        expected = [(x + r) % field.p for x, r in zip(xq_D, r_D, strict=True)]
        # The sum of squares may differ in its last bit, and with it a rounding.
        distance = [(c - e) % field.p for c, e in zip(c_D, expected, strict=True)]
        assert all(d in (0, 1, field.p - 1) for d in distance)
        assert sum(d != 0 for d in distance) <= 1


@BOTH
def test_the_answer_is_the_product_of_the_rounded_inputs(field: Field) -> None:
    layer = Layer(field)
    x_TD = rows_of_every_kind(layer.group.width)
    r_TD, u_TF = layer.pads(len(x_TD))
    masked, c_TD = layer.mask(x_TD, r_TD)
    y_TF = layer.unmask(layer.answer(c_TD), u_TF, masked)
    for t, (c_D, r_D) in enumerate(zip(c_TD.tolist(), r_TD.tolist(), strict=True)):
        xq_D = centred([c - r for c, r in zip(c_D, r_D, strict=True)], field)
        yq_F = product(layer.weights.weight_FD, xq_D)
        assert max(map(abs, yq_F)) <= field.half  # [P2]: it never overflows
        scale_F = layer.weights.scale_F.tolist()
        exact_F = [y * s * masked.unit_T[t] for y, s in zip(yq_F, scale_F, strict=True)]
        with np.errstate(over="ignore"):  # as in floating point, 127 · 3e38 is infinite
            expected_F = np.array(exact_F).astype(np.float32).tolist()
        assert y_TF[t].tolist() == expected_F


@BOTH
def test_the_scale_never_overflows_on_a_row_aligned_with_a_weight_row(field: Field) -> None:
    layer = Layer(field, features=6, width=2048)
    weight_FD = layer.weights.weight_FD
    aligned_TD = torch.cat([weight_FD.float(), weight_FD.sign().float(), -weight_FD.float() * 1e9])
    r_TD = np.zeros(tuple(aligned_TD.shape), np.int32)
    _, c_TD = layer.mask(aligned_TD.contiguous(), r_TD)
    largest = 0
    for c_D in c_TD.tolist():
        yq_F = product(weight_FD, centred(c_D, field))
        largest = max(largest, *map(abs, yq_F))
    assert 0.99 * field.half < largest <= field.half


@BOTH
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (39, 36), (20, 17)])
def test_an_input_that_is_not_finite_is_refused_by_its_layer(
    field: Field, value: float, place: tuple[int, int]
) -> None:
    layer = Layer(field)
    x_TD = torch.ones(40, layer.group.width)
    x_TD[place] = value
    with pytest.raises(NumericalError, match="group qkv of layer 3 holds NaN or infinity"):
        layer.mask(x_TD, layer.pads(40)[0])


@BOTH
@pytest.mark.parametrize("wrong", [1, 2, -1, 2**20, 12345])
def test_a_single_wrong_entry_is_noticed_wherever_it_is(field: Field, wrong: int) -> None:
    layer = Layer(field)
    x_TD = torch.randn(3, layer.group.width)
    r_TD, u_TF = layer.pads(3)
    masked, c_TD = layer.mask(x_TD, r_TD)
    right_TF = np.array(
        [[v % field.p for v in product(layer.weights.weight_FD, row)] for row in c_TD.tolist()],
        np.int32,
    )
    layer.unmask(layer.to_bytes(right_TF), u_TF, masked)
    for place in np.ndindex(*right_TF.shape):
        wrong_TF = right_TF.copy()
        wrong_TF[place] = (int(wrong_TF[place]) + wrong) % field.p
        with pytest.raises(IntegrityError, match="wrong product for group qkv of layer 3"):
            layer.unmask(layer.to_bytes(wrong_TF), u_TF, masked)


# A check multiplies two entries at once, and four in a round; an input in blocks of 256.
SHAPES = [(1, 1), (1, 2), (2, 1), (2, 3), (3, 2), (3, 3), (5, 255), (6, 256), (7, 257), (9, 515)]


@BOTH
@pytest.mark.parametrize(("features", "width"), SHAPES)
def test_rows_of_any_width_are_computed_and_every_entry_of_them_is_checked(
    features: int, width: int, field: Field
) -> None:
    layer = Layer(field, features, width)
    weight_FD = layer.weights.weight_FD
    x_TD = torch.randn(3, width, generator=torch.Generator().manual_seed(width))
    r_TD, u_TF = layer.pads(3)
    masked, c_TD = layer.mask(x_TD, r_TD)
    right_TB = layer.answer(c_TD)
    y_TF = layer.unmask(right_TB, u_TF, masked)
    for t, (c_D, r_D) in enumerate(zip(c_TD.tolist(), r_TD.tolist(), strict=True)):
        xq_D = centred([c - r for c, r in zip(c_D, r_D, strict=True)], field)
        yq_F = product(weight_FD, xq_D)
        expected_F = [
            y * s * masked.unit_T[t]
            for y, s in zip(yq_F, layer.weights.scale_F.tolist(), strict=True)
        ]
        assert y_TF[t].tolist() == np.array(expected_F).astype(np.float32).tolist()
    z_TF = np.empty((3, features), np.int32)
    residue_bytes.unpack(right_TB.numpy(), field, z_TF)
    for place in np.ndindex(*z_TF.shape):
        wrong_TF = z_TF.copy()
        wrong_TF[place] = (int(wrong_TF[place]) + 1) % field.p
        with pytest.raises(IntegrityError):
            layer.unmask(layer.to_bytes(wrong_TF), u_TF, masked)


@BOTH
@pytest.mark.parametrize(("features", "width"), SHAPES)
def test_what_an_answer_must_give_is_computed_as_with_big_integers(
    features: int, width: int, field: Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[CheckVectors] = []
    draw = CheckVectors.draw

    def noting(weight_FD: torch.Tensor) -> CheckVectors:
        drawn.append(draw(weight_FD))
        return drawn[-1]

    monkeypatch.setattr(CheckVectors, "draw", noting)
    layer = Layer(field, features, width)
    [checks] = drawn
    x_TD = torch.randn(3, width, generator=torch.Generator().manual_seed(width))
    masked, c_TD = layer.mask(x_TD, np.zeros((3, width), np.int32))
    for c_D, expected_2 in zip(c_TD.tolist(), masked.expected_T2.tolist(), strict=True):
        xq_D = centred(c_D, field)
        assert expected_2 == [
            sum(k * x for k, x in zip(kw_D.tolist(), xq_D, strict=True)) % CHECK_MODULUS
            for kw_D in checks.kw_2D
        ]


@BOTH
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_of_the_largest_numbers_do_not_overflow(
    sign: int, field: Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, most = 1027, CHECK_MODULUS - 1
    # Every xq and every yq is as large as any can be; so is k, once on either side of Wq.
    weights = IntegerWeights(127 * torch.eye(size, dtype=torch.int8), torch.ones(size))
    inverse = most * pow(127, -1, CHECK_MODULUS) % CHECK_MODULUS
    k_2F = np.repeat(np.array([[most], [inverse]], np.int32), size, axis=1)
    kw_2D = np.repeat(np.array([[most * 127 % CHECK_MODULUS], [most]], np.int32), size, axis=1)
    monkeypatch.setattr(CheckVectors, "draw", lambda _: CheckVectors(k_2F, kw_2D))
    group = MaskedGroup(LinearGroup(0, "o", size, size), weights, None, field)
    pool = RowPool(1)
    x_TD = sign * torch.ones(1, size)
    c_TB = torch.empty(1, field.residue_bytes * size).byte()
    masked = group.mask(x_TD, np.zeros((1, size), np.int32), c_TB, pool)
    c_TD = np.empty((1, size), np.int32)
    residue_bytes.unpack(c_TB.numpy(), field, c_TD)
    [xq] = set(centred(c_TD[0].tolist(), field))
    assert 0.99 * field.half < 127 * xq * sign <= field.half
    assert masked.expected_T2.tolist() == [
        [size * xq * kw % CHECK_MODULUS for kw in kw_2D[:, 0].tolist()]
    ]
    z_TB = torch.empty(1, field.residue_bytes * size).byte()
    residue_bytes.pack(np.full((1, size), 127 * xq % field.p, np.int32), field, z_TB.numpy())
    y_TF = torch.empty(1, size)
    group.check_and_unmask(z_TB, np.zeros((1, size), np.int32), masked, y_TF, "The worker", pool)
    assert set(y_TF[0].tolist()) == {float(np.float32(127 * xq * masked.unit_T[0]))}


@BOTH
def test_a_residue_plus_p_is_refused(field: Field) -> None:
    layer = Layer(field)
    x_TD = torch.randn(1, layer.group.width)
    r_TD, u_TF = layer.pads(1)
    masked, c_TD = layer.mask(x_TD, r_TD)
    z_TF = np.array([[0] * layer.group.features], np.int32)
    residue_bytes.unpack(layer.answer(c_TD).numpy(), field, z_TF)
    z_TF[0, 4] = field.p + z_TF[0, 4] if field.residue_bytes == 3 else -(2**31) + z_TF[0, 4]
    with pytest.raises(IntegrityError):
        layer.unmask(layer.to_bytes(z_TF), u_TF, masked)


def test_a_wrong_pad_product_is_noticed() -> None:
    layer = Layer(WIDE)
    r_TD, u_TF = layer.pads(2)
    masked, c_TD = layer.mask(torch.randn(2, layer.group.width), r_TD)
    u_TF[1, 3] ^= 1
    with pytest.raises(IntegrityError):
        layer.unmask(layer.answer(c_TD), u_TF, masked)


@pytest.mark.parametrize("features", [1, 3, 12, 70_000])
def test_check_vectors_are_the_products_of_big_integers(features: int) -> None:
    weight_FD = integer_weights(features, 5).weight_FD
    checks = CheckVectors.draw(weight_FD)
    assert checks.k_2F.shape == (2, features)
    for k_F, kw_D in zip(checks.k_2F, checks.kw_2D, strict=True):
        assert kw_D.tolist() == check_product(k_F, weight_FD)
        assert 0 <= k_F.min() <= k_F.max() < CHECK_MODULUS


def test_rows_are_shared_out_without_gaps_and_the_first_fault_is_told() -> None:
    pool = RowPool(3)
    for rows in (1, 15, 16, 48, 1000):
        seen = np.zeros(rows, np.int64)

        def kernel(first: int, stop: int, seen: np.ndarray = seen) -> int:
            seen[first:stop] += 1
            return ALL_ROWS

        assert pool.run(rows, kernel) == ALL_ROWS
        assert (seen == 1).all()
    assert pool.run(90, lambda first, stop: first + 5 if first >= 30 else ALL_ROWS) == 35
    pool.close()
