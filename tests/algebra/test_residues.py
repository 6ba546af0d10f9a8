"""Digits, products and bytes of residues, against Python's big integers."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tsqp.algebra import digits, int8_product, residue_bytes
from tsqp.algebra.params import CHECK_MODULUS, COMPACT, LATTICE, MAX_WIDTH, WIDE, Field

EVERY = (WIDE, COMPACT, LATTICE)
EACH = pytest.mark.parametrize("field", EVERY, ids=[field.name for field in EVERY])
INT32 = st.integers(-(2**31), 2**31 - 1)


def value_of(digits_LN: NDArray[np.int8]) -> list[int]:
    rows = digits_LN.tolist()
    return [
        sum(256**level * d for level, d in enumerate(column)) for column in zip(*rows, strict=True)
    ]


def split(residues: list[int] | NDArray[np.int32], field: Field) -> NDArray[np.int8]:
    residues_N = np.asarray(residues, field.dtype)
    digits_LN = np.empty((field.digits, residues_N.size), np.int8)
    digits.split(residues_N, field, digits_LN)
    return digits_LN


def is_prime(n: int) -> bool:
    divisors = torch.arange(3, int(n**0.5) + 1, 2)
    return n == 2 or (n % 2 == 1 and bool((n % divisors).all()))


@EACH
def test_p_is_prime(field: Field) -> None:
    assert is_prime(field.p)


def test_the_check_modulus_is_prime_and_no_smaller_than_the_fields_that_it_checks() -> None:
    assert is_prime(CHECK_MODULUS)
    assert max(WIDE.p, COMPACT.p) <= CHECK_MODULUS


def test_the_lattice_field_has_roots_of_unity_for_its_transform() -> None:
    assert (LATTICE.p - 1) % (2 * 2048) == 0


@EACH
def test_the_largest_digits_are_those_of_the_protocol(field: Field) -> None:
    assert (
        field.largest_digits
        == {
            "wide": 2_139_062_143,
            "compact": 8_355_711,
            "lattice": 127 * (256**6 - 1) // 255,
        }[field.name]
    )


def test_every_compact_residue_is_its_digits() -> None:
    residues_N = np.arange(COMPACT.p, dtype=np.int32)
    digits_LN = split(residues_N, COMPACT).astype(np.int64)
    values_N = digits_LN[0] + 256 * digits_LN[1] + 65536 * digits_LN[2]
    expected_N = np.where(residues_N <= COMPACT.largest_digits, residues_N, residues_N - COMPACT.p)
    assert (values_N == expected_N).all()


@EACH
def test_residues_around_every_edge_are_their_digits(field: Field) -> None:
    edges = [0, field.largest_digits, field.half, field.p - 1]
    edges += [byte << 8 * level for level in range(field.digits) for byte in (1, 127, 128, 255)]
    residues = sorted({e + d for e in edges for d in range(-300, 301) if 0 <= e + d < field.p})
    for value, residue in zip(value_of(split(residues, field)), residues, strict=True):
        expected = residue if residue <= field.largest_digits else residue - field.p
        assert value == expected


@EACH
@given(data=st.data())
@settings(max_examples=200)
def test_joined_products_are_the_sum_mod_p(field: Field, data: st.DataObject) -> None:
    columns = data.draw(
        st.lists(st.lists(INT32, min_size=field.digits, max_size=field.digits), min_size=1)
    )
    products_LN = np.ascontiguousarray(np.array(columns, np.int32).T)
    residues_N = np.empty(len(columns), field.dtype)
    digits.join(products_LN, field, residues_N)
    assert residues_N.tolist() == [
        sum(256**level * p for level, p in enumerate(column)) % field.p for column in columns
    ]


@EACH
def test_the_most_extreme_products_are_joined(field: Field) -> None:
    for extreme in (-(2**31), 2**31 - 1):
        products_LN = np.full((field.digits, 40), extreme, np.int32)
        residues_N = np.empty(40, field.dtype)
        digits.join(products_LN, field, residues_N)
        expected = extreme * sum(256**level for level in range(field.digits)) % field.p
        assert set(residues_N.tolist()) == {expected}


def big_product(c: list[int], weights: list[list[int]], p: int) -> list[int]:
    return [sum(w * x for w, x in zip(row, c, strict=True)) % p for row in weights]


@EACH
@pytest.mark.parametrize("rows", [1, 3, 130])
@pytest.mark.parametrize("shape", [(5, 7), (64, 576), (40, 1536), (5, 1), (1, 7), (1, 1)])
def test_products_of_residues_are_those_of_big_integers(
    field: Field, rows: int, shape: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight_FD = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    size = (rows, shape[1])
    dtype = torch.int32 if field.dtype == np.int32 else torch.int64
    c_TD = torch.randint(0, field.p, size, generator=generator, dtype=dtype)
    z_TF = torch.empty(rows, shape[0], dtype=dtype)
    int8_product.residue_product(c_TD, weight_FD, field, z_TF)
    for t in {0, rows // 2, rows - 1}:
        assert z_TF[t].tolist() == big_product(c_TD[t].tolist(), weight_FD.tolist(), field.p)


@EACH
@pytest.mark.parametrize("weight", [127, -127])
def test_the_widest_product_does_not_overflow(field: Field, weight: int) -> None:
    # The residue whose every digit is -128, the largest in size.
    worst = -128 * sum(256**level for level in range(field.digits)) % field.p
    digits_of_worst = set(split([worst], field).reshape(-1).tolist())
    dtype = torch.int32 if field.dtype == np.int32 else torch.int64
    c_TD = torch.full((1, MAX_WIDTH), worst, dtype=dtype)
    weight_FD = torch.full((2, MAX_WIDTH), weight, dtype=torch.int8)
    z_TF = torch.empty(1, 2, dtype=dtype)
    int8_product.residue_product(c_TD, weight_FD, field, z_TF)
    assert z_TF.tolist() == [[weight * worst * MAX_WIDTH % field.p] * 2]
    assert digits_of_worst


@pytest.mark.parametrize("by_columns", [False, True])
def test_products_of_tiny_matrices_are_exact(by_columns: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, width, features in itertools.product((1, 2, 3, 17, 33), repeat=3):
        a_MD = torch.randint(-128, 128, (rows, width), generator=generator)
        b_DF = torch.randint(-127, 128, (width, features), generator=generator)
        b = b_DF.t().to(torch.int8).t() if by_columns else b_DF.to(torch.int8)
        found_MF = int8_product.int8_product(a_MD.to(torch.int8), b)
        assert torch.equal(found_MF.long(), a_MD @ b_DF), (rows, width, features)


def test_the_fallback_is_as_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    a_MD = torch.full((3, MAX_WIDTH), -128, dtype=torch.int8)
    b_DF = torch.full((MAX_WIDTH, 2), 127, dtype=torch.int8)
    monkeypatch.setattr(int8_product, "fast_product_is_exact", lambda: False)
    assert int8_product.int8_product(a_MD, b_DF).tolist() == [[-128 * 127 * MAX_WIDTH] * 2] * 3


def test_a_product_that_saturates_fails_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(a_MD: torch.Tensor, b_DF: torch.Tensor) -> torch.Tensor:
        """Without VNNI: bytes made unsigned, and two products added in 16 bits."""
        unsigned_MD, b_DF = a_MD.int() + 128, b_DF.int()
        pairs = [
            (unsigned_MD[:, i : i + 2] @ b_DF[i : i + 2]).clamp(-32768, 32767)
            for i in range(0, a_MD.shape[1], 2)
        ]
        return torch.stack(pairs).sum(0).int() - 128 * b_DF.sum(0)

    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert not int8_product.fast_product_is_exact.__wrapped__()


@pytest.mark.parametrize(
    "wrong_for",
    [
        lambda a_MD, b_DF: b_DF.is_contiguous(),
        lambda a_MD, b_DF: b_DF.t().is_contiguous(),
        lambda a_MD, b_DF: len(a_MD) == 1,
        lambda a_MD, b_DF: len(a_MD) > 16,
    ],
    ids=["by-rows", "by-columns", "one-row", "many-rows"],
)
def test_a_product_that_is_wrong_for_one_kind_of_operands_fails_the_self_test(
    wrong_for: Callable[[torch.Tensor, torch.Tensor], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def off_by_one(a_MD: torch.Tensor, b_DF: torch.Tensor) -> torch.Tensor:
        return (a_MD.double() @ b_DF.double()).int() + wrong_for(a_MD, b_DF)

    monkeypatch.setattr(torch, "_int_mm", off_by_one)
    assert not int8_product.fast_product_is_exact.__wrapped__()


def test_an_exact_product_passes_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    def exact(a_MD: torch.Tensor, b_DF: torch.Tensor) -> torch.Tensor:
        return (a_MD.double() @ b_DF.double()).int()

    monkeypatch.setattr(torch, "_int_mm", exact)
    assert int8_product.fast_product_is_exact.__wrapped__()


@EACH
def test_bytes_come_back_as_they_were(field: Field) -> None:
    residues_TN = np.array([[0, 1, 255], [256, field.p - 1, field.half]], field.dtype)
    bytes_TB = np.empty((2, 3 * field.residue_bytes), np.uint8)
    back_TN = np.empty_like(residues_TN)
    residue_bytes.pack(residues_TN, field, bytes_TB)
    residue_bytes.unpack(bytes_TB, field, back_TN)
    assert (back_TN == residues_TN).all()


def test_compact_rows_are_three_planes_of_bytes() -> None:
    bytes_TB = np.empty((1, 6), np.uint8)
    residue_bytes.pack(np.array([[0x010203, 0x040506]], np.int32), COMPACT, bytes_TB)
    assert bytes_TB.tolist() == [[3, 6, 2, 5, 1, 4]]


def test_lattice_rows_are_low_words_and_then_high_halves() -> None:
    bytes_TB = np.empty((1, 12), np.uint8)
    residue_bytes.pack(np.array([[0x010203040506, 0x0708090A0B0C]], np.int64), LATTICE, bytes_TB)
    assert bytes_TB.tolist() == [[6, 5, 4, 3, 12, 11, 10, 9, 2, 1, 8, 7]]
