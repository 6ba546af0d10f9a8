"""Arithmetic mod q in float64 and the transform, against Python's integers."""

import hashlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mask_blocks import from_blocks
from tsqp.algebra import modular, ring
from tsqp.algebra.native import compiled
from tsqp.algebra.residue_blocks import BLOCK, WORDS
from tsqp.algebra.ring import ClassTransform, Ring

Q = 2**46 - 110_591
SMALL_Q = 2**40 - 36_863
EXTREMES = (0, 1, 2, Q // 2 - 1, Q // 2, Q // 2 + 1, Q - 2, Q - 1)
LARGEST = 2**52  # of a lazy sum


@compiled("void(float64[::1], float64[::1], float64, float64[::1])")
def _multiply(
    x_N: NDArray[np.float64], w_N: NDArray[np.float64], q: float, out_N: NDArray[np.float64]
) -> None:
    for i in range(x_N.size):
        out_N[i] = modular.multiply(x_N[i], w_N[i], w_N[i] * (1.0 / q), q)


@compiled("void(float64[::1], float64, float64[::1])")
def _reduce(x_N: NDArray[np.float64], q: float, out_N: NDArray[np.float64]) -> None:
    for i in range(x_N.size):
        out_N[i] = modular.canonical(modular.reduce(x_N[i], q, 1.0 / q), q)


def product(x: int, w: int, q: int) -> int:
    out_N = np.empty(1)
    _multiply(np.array([float(x)]), np.array([float(w)]), float(q), out_N)
    return int(out_N[0])


MODULI = pytest.mark.parametrize("q", [Q, SMALL_Q])


@MODULI
@settings(max_examples=300)
@given(data=st.data())
def test_a_product_is_exact_and_as_small_as_stated(q: int, data: st.DataObject) -> None:
    x = data.draw(st.integers(-LARGEST, LARGEST) | st.integers(-q, q))
    w = data.draw(st.integers(-(q // 2), q // 2))
    found = product(x, w, q)
    assert (found - x * w) % q == 0
    assert abs(found) <= (0.5 + 0.75 * 2**-52 * abs(x)) * q


@MODULI
def test_products_at_the_extremes_are_exact(q: int) -> None:
    numbers = [0, 1, 2, q // 2, q - 1, q, q + 1, 2**46, 2**51 + 1, LARGEST - 1, LARGEST]
    for x in (sign * number for number in numbers for sign in (1, -1)):
        for w in (0, 1, -1, q // 2, -(q // 2), q // 2 - 1):
            assert (product(x, w, q) - x * w) % q == 0, (x, w)


@settings(max_examples=300)
@given(st.integers(-LARGEST, LARGEST))
def test_reduced_sums_are_the_residues(x: int) -> None:
    out_N = np.empty(1)
    _reduce(np.array([float(x)]), float(Q), out_N)
    assert out_N[0] == x % Q


@MODULI
def test_the_root_has_order_2n_and_the_roots_are_those_of_the_ring(q: int) -> None:
    of = Ring.of(q, 2048)
    assert pow(of.root, 2048, q) == q - 1
    roots = of.roots()
    assert len(set(roots)) == 2048
    assert all(pow(x, 2048, q) == q - 1 for x in roots[:40])


def residues(of: Ring, count: int, draw: Callable[[], int]) -> NDArray[np.int64]:
    """`count` polynomials in the transform domain, [N, count]."""
    return np.array([[draw() for _ in range(count)] for _ in range(of.degree)], dtype=np.int64)


def parts(values_ND: NDArray[np.int64]) -> tuple[Any, Any]:
    """Values as the transform reads them: blocks of features, in two parts."""
    degree, width = values_ND.shape
    blocks = -(-width // BLOCK)
    padded = np.pad(values_ND, ((0, 0), (0, blocks * BLOCK - width)))
    values_GNB = np.ascontiguousarray(padded.reshape(degree, blocks, BLOCK).transpose(1, 0, 2))
    return (values_GNB & 0xFFFFFFFF).astype(np.uint32), (values_GNB >> 32).astype(np.uint16)


def of_class(
    transform: ClassTransform,
    values_ND: NDArray[np.int64],
    s_N: NDArray[np.int64],
    row_class: int,
    noise_GMB: NDArray[np.uint32],
) -> NDArray[np.int64]:
    """The rows of one class, [M, D]."""
    low_GNB, high_GNB = parts(values_ND)
    width = values_ND.shape[1]
    places_M = np.random.default_rng(0).permutation(transform.rows + 3)[: transform.rows]
    out_GRW = np.zeros((len(low_GNB), transform.rows + 3, WORDS), np.uint32)
    ring.products_of_class(
        low_GNB,
        high_GNB,
        transform.secret(s_N, row_class),
        transform,
        noise_GMB,
        ring.work_space(transform.rows),
        out_GRW,
        places_M,
        0,
        len(low_GNB),
    )
    others = np.setdiff1d(np.arange(transform.rows + 3), places_M)
    assert not out_GRW[:, others].any()
    return from_blocks(out_GRW, width)[places_M]


def no_noise(transform: ClassTransform) -> NDArray[np.uint32]:
    return np.empty((0, transform.rows, BLOCK), np.uint32)


def coefficient(of: Ring, values_N: list[int], t: int) -> int:
    """The coefficient of X^t, by evaluating at every root: slow, and obviously right."""
    total = sum(value * pow(x, -t, of.q) for value, x in zip(values_N, of.roots(), strict=True))
    return total * pow(of.degree, -1, of.q) % of.q


@pytest.mark.parametrize("draw", ["uniform", "extreme"])
@pytest.mark.parametrize(
    ("degree", "classes"),
    [(4, 1), (8, 2), (16, 1), (32, 4), (64, 1), (128, 1), (256, 2), (256, 64)],
)
def test_the_transform_is_direct_evaluation(degree: int, classes: int, draw: str) -> None:
    generator = random.Random(degree)
    if draw == "uniform":
        pick = lambda: generator.randrange(Q)  # noqa: E731
    else:
        pick = lambda: generator.choice(EXTREMES)  # noqa: E731
    of = Ring.of(Q, degree)
    transform = ClassTransform.of(of, classes)
    values_ND, s_N = residues(of, 2, pick), residues(of, 1, pick)[:, 0]
    for row_class in {0, classes // 2, classes - 1}:
        rows_MD = of_class(transform, values_ND, s_N, row_class, no_noise(transform))
        for d in range(2):
            products = [int(v) * int(s) % Q for v, s in zip(values_ND[:, d], s_N, strict=True)]
            for m in {0, 1, transform.rows // 2, transform.rows - 1}:
                expected = coefficient(of, products, row_class + classes * m)
                assert rows_MD[m, d] == expected, (row_class, m, d)


def test_products_are_those_of_polynomials_mod_x_to_the_n_plus_one() -> None:
    generator = random.Random(5)
    of = Ring.of(Q, 16)
    h, s = ([generator.randrange(Q) for _ in range(16)] for _ in range(2))
    at_roots = [
        np.array([sum(c * pow(x, t, Q) for t, c in enumerate(each)) % Q for x in of.roots()])
        for each in (h, s)
    ]
    transform = ClassTransform.of(of)
    found_MD = of_class(transform, at_roots[0][:, None], at_roots[1], 0, no_noise(transform))
    expected = [0] * 16
    for i, a in enumerate(h):
        for j, b in enumerate(s):
            expected[(i + j) % 16] += a * b if i + j < 16 else -a * b
    assert found_MD[:, 0].tolist() == [value % Q for value in expected]


@pytest.mark.parametrize("classes", [2, 4, 8, 16, 32, 64, 512])
def test_the_classes_together_are_the_whole_transform(classes: int) -> None:
    generator = np.random.default_rng(classes)
    of = Ring.of(Q, 2048)
    values_ND, s_N = generator.integers(0, Q, (2048, 5)), generator.integers(0, Q, 2048)
    whole = ClassTransform.of(of)
    every_ND = of_class(whole, values_ND, s_N, 0, no_noise(whole))
    transform = ClassTransform.of(of, classes)
    for row_class in range(classes):
        rows_MD = of_class(transform, values_ND, s_N, row_class, no_noise(transform))
        np.testing.assert_array_equal(rows_MD, every_ND[row_class::classes])


def test_the_largest_lazy_sums_are_exact() -> None:
    # Equal values at every root keep the sums of all stages as large as they get.
    of = Ring.of(Q, 2048)
    transform = ClassTransform.of(of)
    for value in EXTREMES:
        values_ND = np.full((2048, 1), value, np.int64)
        s_N = np.full(2048, Q // 2, np.int64)
        found_MD = of_class(transform, values_ND, s_N, 0, no_noise(transform))
        assert found_MD[0, 0] == value * (Q // 2) % Q
        assert not found_MD[1:].any()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sum_of_products_before_a_reduction_is_exact(sign: int) -> None:
    """`ring.LAZY` products, each of the largest size: the secret is given as the class needs it."""
    transform = ClassTransform.of(Ring.of(Q, 2048), ring.LAZY)
    largest = sign * (Q // 2)
    values_ND = np.full((2048, 1), largest * pow(Q // 2, -1, Q) % Q, np.int64)
    low_GNB, high_GNB = parts(values_ND)
    out_GMW = np.zeros((1, transform.rows, WORDS), np.uint32)
    ring.products_of_class(
        low_GNB,
        high_GNB,
        np.full(2048, float(Q // 2)),
        transform,
        no_noise(transform),
        ring.work_space(transform.rows),
        out_GMW,
        np.arange(transform.rows),
        0,
        1,
    )
    rows_MD = from_blocks(out_GMW, 1)
    assert rows_MD[0, 0] == largest * ring.LAZY * transform.rows % Q
    assert not rows_MD[1:].any()


def test_the_noise_is_the_difference_of_the_numbers_of_ones() -> None:
    of = Ring.of(Q, 64)
    transform = ClassTransform.of(of)
    generator = np.random.default_rng(1)
    noise_GMB = generator.integers(0, 2**32, (2, 64, BLOCK), dtype=np.uint32)
    noise_GMB[0, :4, 0] = (0, 0xFFFF, 0xFFFF0000, 0xFFFFFFFF)
    rows_MD = of_class(
        transform, np.zeros((64, 33), np.int64), np.zeros(64, np.int64), 0, noise_GMB
    )
    assert rows_MD[:4, 0].tolist() == [0, 16, Q - 16, 0]
    for m in range(64):
        for d in range(33):
            bits = int(noise_GMB[d // BLOCK, m, d % BLOCK])
            assert rows_MD[m, d] == ((bits & 0xFFFF).bit_count() - (bits >> 16).bit_count()) % Q


def test_features_after_the_last_are_not_written() -> None:
    of = Ring.of(Q, 64)
    transform = ClassTransform.of(of)
    generator = np.random.default_rng(2)
    values_ND, s_N = generator.integers(0, Q, (64, 40)), generator.integers(0, Q, 64)
    rows_MD = of_class(transform, values_ND, s_N, 0, no_noise(transform))
    each = [
        of_class(transform, values_ND[:, d : d + 1], s_N, 0, no_noise(transform))[:, 0]
        for d in range(40)
    ]
    np.testing.assert_array_equal(rows_MD, np.stack(each, axis=1))


def test_known_answers_of_the_transform() -> None:
    of = Ring.of(Q, 2048)
    assert of.root == 14_965_858_835_146
    values_ND = (np.arange(2048 * 2, dtype=np.int64).reshape(2048, 2) * 17_179_869_143) % Q
    s_N = (np.arange(2048, dtype=np.int64) * 8_589_934_583) % Q
    transform = ClassTransform.of(of)
    rows_MD = of_class(transform, values_ND, s_N, 0, no_noise(transform))
    assert (
        hashlib.sha256(rows_MD.astype("<i8").tobytes()).hexdigest()
        == "b1a02115b6e8d61b24c2cdab0abbc3f8188e8155d846c72b5f232d83a91716f4"
    )


@pytest.mark.parametrize("wrong", ["place", "negative place", "places", "work", "stop", "noise"])
def test_a_transform_refuses_arrays_that_it_would_leave(wrong: str) -> None:
    of = Ring.of(Q, 16)
    transform = ClassTransform.of(of)
    low_GNB, high_GNB = parts(np.zeros((16, 33), np.int64))
    places_M = np.arange(16)
    places_M[3] = {"place": 16, "negative place": -1}.get(wrong, 3)
    with pytest.raises(ValueError, match="do not fit together"):
        ring.products_of_class(
            low_GNB,
            high_GNB,
            np.zeros(16),
            transform,
            np.empty((1 if wrong == "noise" else 0, 16, BLOCK), np.uint32),
            ring.work_space(8 if wrong == "work" else 16),
            np.zeros((2, 16, WORDS), np.uint32),
            places_M[:8] if wrong == "places" else places_M,
            0,
            3 if wrong == "stop" else 2,
        )
