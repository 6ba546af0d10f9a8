"""The ring R_q = Z_q[X] / (X^N + 1), in its transform domain [P10], [P11], [P14].

A polynomial a is held as its values a(x_j) at the N roots of X^N + 1, x_j = ψ^(2·brv(j) + 1), where
ψ is a primitive 2N-th root of unity mod q and brv reverses the log2 N bits of j. Sums and products
of polynomials are then those of the values. `ClassTransform` gives the coefficients of a product.

Coefficient t of a product is row t of a batch of masks. Rows t ≡ i (mod k) are class i: with
N = k·M they are the coefficients of P_i in p(X) = Σ_i X^i · P_i(X^k), and P_i(y) is the mean of
x^-i · p(x) over the k roots x with x^k = y, which lie side by side. So one class at a time needs
memory for M rows only, and no hints of its own.

Shape suffixes: N roots; M rows of a class; G blocks of BLOCK features; D features; Y bytes of a
row.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsqp.algebra.modular import MAX_BITS, canonical, multiply, ones, reduce
from tsqp.algebra.native import compiled, inlined
from tsqp.algebra.residue_bytes import Bytes, high_words, low_words

Float64 = NDArray[np.float64]
UInt32 = NDArray[np.uint32]
UInt16 = NDArray[np.uint16]

BLOCK = 32  # features that lie side by side: one row of them is four vectors of 64 bytes
CHUNK = 64  # rows that stay in the first-level cache, 64 · 32 · 8 bytes; a power of 4


@dataclass(frozen=True, slots=True)
class Ring:
    """R_q for a prime q ≡ 1 (mod 2N), where N = `degree` is a power of two.

    Attributes:
        root: ψ = g^((q - 1) / 2N) for the smallest g ≥ 2 that is no square mod q.
    """

    q: int
    degree: int
    root: int

    @classmethod
    def of(cls, q: int, degree: int) -> "Ring":
        assert q < 1 << MAX_BITS
        assert degree & (degree - 1) == 0 and (q - 1) % (2 * degree) == 0
        g = next(g for g in range(2, q) if pow(g, (q - 1) // 2, q) == q - 1)
        return cls(q, degree, pow(g, (q - 1) // (2 * degree), q))

    def roots(self) -> list[int]:
        """x_j for each place j of the transform domain."""
        bits = self.degree.bit_length() - 1
        return [pow(self.root, 2 * _reversed(j, bits) + 1, self.q) for j in range(self.degree)]


def _reversed(value: int, bits: int) -> int:
    """The number with these bits in the opposite order."""
    return int(format(value, f"0{bits}b")[::-1], 2) if bits else 0


@dataclass(frozen=True, slots=True)
class ClassTransform:
    """From products in the transform domain to one class of their coefficients.

    Attributes:
        factors_kN: x_j^-i · N^-1 for each class i, centred: what a secret is multiplied by before
            the products of class i.
        twiddles_M: centred powers of ψ^-k, in the order in which the inverse transform of M points
            uses them.
    """

    ring: Ring
    classes: int
    factors_kN: Float64
    twiddles_M: Float64

    @classmethod
    @cache
    def of(cls, ring: Ring, classes: int = 1) -> "ClassTransform":
        """For k = `classes`, a power of two, at most N / 4."""
        q, degree = ring.q, ring.degree
        assert classes & (classes - 1) == 0 and 4 * classes <= degree
        rows = degree // classes
        inverse_degree = pow(degree, -1, q)
        inverses = [pow(x, -1, q) for x in ring.roots()]
        factors, powers = [], [inverse_degree] * degree
        for _ in range(classes):
            factors.append(powers)
            powers = [power * inverse % q for power, inverse in zip(powers, inverses, strict=True)]
        inverse_root = pow(ring.root, -classes, q)
        bits = rows.bit_length() - 1
        twiddles = [pow(inverse_root, _reversed(i, bits), q) for i in range(rows)]
        return cls(ring, classes, _centred(factors, q), _centred(twiddles, q))

    @property
    def rows(self) -> int:
        """M, rows of a class."""
        return self.ring.degree // self.classes

    def secret(self, s_N: NDArray[np.int64], row_class: int) -> Float64:
        """A secret for the products of one class: s · x^-i / N, centred.

        Args:
            s_N: residues in [0, q), in the transform domain.
        """
        secret_N, copy_N = np.empty(self.ring.degree), s_N.astype(np.float64)
        _scale(copy_N, self.factors_kN[row_class], float(self.ring.q), secret_N)
        copy_N[:] = 0  # the caller erases the others
        return secret_N


def _centred(values: object, q: int) -> Float64:
    exact = np.array(values, dtype=np.int64)
    return np.where(exact > q // 2, exact - q, exact).astype(np.float64)


def work_space(rows: int) -> Float64:
    """Memory for `products_of_class`, one array a thread. It ends up holding secrets."""
    return np.zeros((rows + max(rows // CHUNK, 2), BLOCK))


def products_of_class(
    low_GNB: UInt32,
    high_GNB: UInt16,
    secret_N: Float64,
    transform: ClassTransform,
    noise_GMB: UInt32,
    work: Float64,
    out_MY: Bytes,
    first: int,
    stop: int,
) -> None:
    """Coefficients of h_d · s + e_d for polynomials h_d, one class of rows, in [0, q).

    Args:
        low_GNB, high_GNB: the values of h_d in [0, q), the lower 32 and the upper 16 bits apart;
            features in blocks, zeros after the last one.
        secret_N: from `ClassTransform.secret`.
        noise_GMB: 32 uniform bits for each coefficient, of which e is the number of ones among the
            lower 16 minus that among the upper 16, for the blocks from `first` on; an array of no
            blocks for e = 0.
        work: from `work_space`.
        out_MY: receives rows of coefficients, as `residue_bytes` has them.
        first, stop: the blocks of features to do.
    """
    _products_of_class(
        low_GNB,
        high_GNB,
        secret_N,
        transform.twiddles_M,
        float(transform.ring.q),
        noise_GMB,
        work,
        out_MY,
        first,
        stop,
    )


def prepare() -> None:
    """Compile the loops."""
    _scale.compile()
    _products_of_class.compile()


@compiled("void(float64[::1], float64[::1], float64, float64[::1])")
def _scale(s_N: Float64, factors_N: Float64, q: float, out_N: Float64) -> None:
    one_over_q = 1.0 / q
    for j in range(s_N.size):
        product = multiply(s_N[j], factors_N[j], factors_N[j] * one_over_q, q)
        out_N[j] = reduce(product, q, one_over_q)


@inlined
def _value(low: int, high: int) -> float:
    return np.float64(low) + np.float64(high) * 4294967296.0


@inlined
def _pointwise(
    low_NB: UInt32, high_NB: UInt16, secret_N: Float64, first: int, k: int, q: float, out_B: Float64
) -> None:
    """Σ h(x) · s(x) over k roots from `first` on; |out| ≤ 0.52 q."""
    one_over_q = 1.0 / q
    for b in range(BLOCK):
        out_B[b] = 0.0
    for j in range(first, first + k):
        s = secret_N[j]
        s_over_q = s * one_over_q
        for b in range(BLOCK):
            product = multiply(_value(low_NB[j, b], high_NB[j, b]), s, s_over_q, q)
            out_B[b] = reduce(out_B[b] + product, q, one_over_q)


@inlined
def _butterfly2(u: float, v: float, w: float, w_over_q: float, q: float) -> Any:
    """One stage of the inverse transform; the first output is at most |u| + |v|."""
    return u + v, multiply(u - v, w, w_over_q, q)


@inlined
def _butterfly4(
    x0: float,
    x1: float,
    x2: float,
    x3: float,
    w0: float,
    w1: float,
    w2: float,
    q: float,
) -> Any:
    """Two stages. For |x| ≤ 2^50: the outputs are at most 4 · max|x|, and below 2^52."""
    one_over_q = 1.0 / q
    s0, d0 = _butterfly2(x0, x1, w0, w0 * one_over_q, q)
    s1, d1 = _butterfly2(x2, x3, w1, w1 * one_over_q, q)
    y0, y2 = _butterfly2(s0, s1, w2, w2 * one_over_q, q)
    y1, y3 = _butterfly2(d0, d1, w2, w2 * one_over_q, q)
    return y0, y1, y2, y3


@inlined
def _first_stages(
    low_NB: UInt32,
    high_NB: UInt16,
    secret_N: Float64,
    w_M: Float64,
    row: int,
    q: float,
    a_RB: Float64,
) -> None:
    """Products with the secret at four roots from `row` on, and the first two stages on them."""
    one_over_q = 1.0 / q
    half = w_M.size >> 1
    w0, w1, w2 = w_M[half + (row >> 1)], w_M[half + (row >> 1) + 1], w_M[(half >> 1) + (row >> 2)]
    s0, s1, s2, s3 = secret_N[row], secret_N[row + 1], secret_N[row + 2], secret_N[row + 3]
    low_4B, high_4B = low_NB[row : row + 4], high_NB[row : row + 4]
    for b in range(BLOCK):
        x0 = multiply(_value(low_4B[0, b], high_4B[0, b]), s0, s0 * one_over_q, q)
        x1 = multiply(_value(low_4B[1, b], high_4B[1, b]), s1, s1 * one_over_q, q)
        x2 = multiply(_value(low_4B[2, b], high_4B[2, b]), s2, s2 * one_over_q, q)
        x3 = multiply(_value(low_4B[3, b], high_4B[3, b]), s3, s3 * one_over_q, q)
        a_RB[0, b], a_RB[1, b], a_RB[2, b], a_RB[3, b] = _butterfly4(x0, x1, x2, x3, w0, w1, w2, q)


@inlined
def _stages(a_RB: Float64, w_M: Float64, points: int, place: int, stride: int, q: float) -> None:
    """The stages of stride `stride` and above, two at a time, on R = stride · 4^n ≤ 64 rows.

    Sums at most double in a stage: rows that began with |a| ≤ 0.52 q end below 64 · 0.52 q < 2^52.

    Args:
        points: of the transform whose stages these are, where they have stride 1.
        place: of these rows, in units of R.
    """
    rows = a_RB.shape[0]
    while stride < rows:
        groups = rows // (4 * stride)
        half = points // (2 * stride)
        for i in range(groups):
            at = place * groups + i
            w0, w1, w2 = w_M[half + 2 * at], w_M[half + 2 * at + 1], w_M[(half >> 1) + at]
            for j in range(4 * stride * i, 4 * stride * i + stride):
                for b in range(BLOCK):
                    x0, x1 = a_RB[j, b], a_RB[j + stride, b]
                    x2, x3 = a_RB[j + 2 * stride, b], a_RB[j + 3 * stride, b]
                    (
                        a_RB[j, b],
                        a_RB[j + stride, b],
                        a_RB[j + 2 * stride, b],
                        a_RB[j + 3 * stride, b],
                    ) = _butterfly4(x0, x1, x2, x3, w0, w1, w2, q)
        stride <<= 2


@inlined
def _load_column(a_MB: Float64, j: int, chunk: int, q: float, column_RB: Float64) -> None:
    one_over_q = 1.0 / q
    for r in range(column_RB.shape[0]):
        for b in range(BLOCK):
            column_RB[r, b] = reduce(a_MB[j + r * chunk, b], q, one_over_q)


@inlined
def _load_column_with_a_stage(
    a_MB: Float64, j: int, chunk: int, w_M: Float64, q: float, column_RB: Float64
) -> None:
    one_over_q = 1.0 / q
    half = column_RB.shape[0] >> 1
    for r in range(half):
        w = w_M[half + r]
        w_over_q = w * one_over_q
        for b in range(BLOCK):
            u = reduce(a_MB[j + 2 * r * chunk, b], q, one_over_q)
            v = reduce(a_MB[j + (2 * r + 1) * chunk, b], q, one_over_q)
            column_RB[2 * r, b], column_RB[2 * r + 1, b] = _butterfly2(u, v, w, w_over_q, q)


@compiled(
    "void(uint32[:, :, ::1], uint16[:, :, ::1], float64[::1], float64[::1], float64,"
    " uint32[:, :, ::1], float64[:, ::1], uint8[:, ::1], int64, int64)"
)
def _products_of_class(
    low_GNB: UInt32,
    high_GNB: UInt16,
    secret_N: Float64,
    w_M: Float64,
    q: float,
    noise_GMB: UInt32,
    work: Float64,
    out_MY: Bytes,
    first: int,
    stop: int,
) -> None:
    rows, features = out_MY.shape[0], out_MY.shape[1] // 6
    k = secret_N.size // rows
    chunk = CHUNK
    while chunk > rows:
        chunk >>= 2
    chunks = rows // chunk
    odd = 0
    while (1 << odd) < chunks:
        odd += 1
    odd &= 1
    a_MB, column_RB = work[:rows], work[rows : rows + chunks]
    for g in range(first, stop):
        low_NB, high_NB = low_GNB[g], high_GNB[g]
        for place in range(chunks):
            a_RB = a_MB[place * chunk : (place + 1) * chunk]
            if k == 1:
                for row in range(0, chunk, 4):
                    _first_stages(
                        low_NB, high_NB, secret_N, w_M, place * chunk + row, q, a_RB[row : row + 4]
                    )
                _stages(a_RB, w_M, rows, place, 4, q)
            else:
                for row in range(chunk):
                    first_root = (place * chunk + row) * k
                    _pointwise(low_NB, high_NB, secret_N, first_root, k, q, a_RB[row])
                _stages(a_RB, w_M, rows, place, 1, q)
        begin = g * BLOCK
        end = min(begin + BLOCK, features)
        for j in range(chunk):
            if odd:
                _load_column_with_a_stage(a_MB, j, chunk, w_M, q, column_RB)
            else:
                _load_column(a_MB, j, chunk, q, column_RB)
            _stages(column_RB, w_M, chunks, 0, 1 + odd, q)
            for r in range(chunks):
                t = j + r * chunk
                low_B = low_words(out_MY[t], features)[begin:end]
                high_B = high_words(out_MY[t], features)[begin:end]
                _finish(column_RB[r], noise_GMB, g - first, t, q, low_B, high_B)


@inlined
def _finish(
    a_B: Float64,
    noise_GMB: UInt32,
    g: int,
    t: int,
    q: float,
    low_B: UInt32,
    high_B: UInt16,
) -> None:
    """Reduce, add the noise, and write residues in [0, q) of the features that there are.

    A loop over BLOCK would be unrolled, as it is short, and then not vectorised.
    """
    one_over_q = 1.0 / q
    if noise_GMB.shape[0] > 0:
        noise_B = noise_GMB[g, t]
        for b in range(low_B.size):
            bits = noise_B[b]
            e = np.float64(
                np.int32(ones(bits & np.uint32(0xFFFF))) - np.int32(ones(bits >> np.uint32(16)))
            )
            value = np.int64(canonical(reduce(a_B[b], q, one_over_q) + e, q))
            low_B[b] = np.uint32(value)
            high_B[b] = np.uint16(value >> np.int64(32))
    else:
        for b in range(low_B.size):
            value = np.int64(canonical(reduce(a_B[b], q, one_over_q), q))
            low_B[b] = np.uint32(value)
            high_B[b] = np.uint16(value >> np.int64(32))
