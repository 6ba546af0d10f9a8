"""The ring R_q = Z_q[X] / (X^N + 1), in its transform domain [P10], [P11], [P14].

A polynomial a is held as its values a(x_j) at the N roots of X^N + 1, x_j = ψ^(2·brv(j) + 1), where
ψ is a primitive 2N-th root of unity mod q and brv reverses the log2 N bits of j. Sums and products
of polynomials are then those of the values. `ClassTransform` gives the coefficients of a product.

Coefficient t of a product is row t of a batch of masks. Rows t ≡ i (mod k) are class i: with
N = k·M they are the coefficients of P_i in p(X) = Σ_i X^i · P_i(X^k), and P_i(y) is the mean of
x^-i · p(x) over the k roots x with x^k = y, which lie side by side. So one class at a time needs
memory for M rows only, and no hints of its own.

Shape suffixes: N roots; M rows of a class; G blocks of BLOCK features; D features; R rows of the
memory for coefficients; W words of a block.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from tsqp.algebra.modular import MAX_BITS, canonical, multiply, ones, reduce
from tsqp.algebra.native import compiled, inlined
from tsqp.algebra.residue_blocks import BLOCK, WORDS, halves, residue

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
UInt32 = NDArray[np.uint32]
UInt16 = NDArray[np.uint16]

LAZY = 64  # products, each at most 0.52 q, that are added up before the sum is reduced


@dataclass(frozen=True, slots=True)
class Ring:
    """R_q for a prime q ≡ 1 (mod 2N), where N = `degree` is a power of two.

    Attributes:
        root: ψ = g^((q - 1) / 2N) for the smallest g ≥ 2 that is not a square mod q.
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
        try:
            _scale(copy_N, self.factors_kN[row_class], float(self.ring.q), secret_N)
        except BaseException:
            secret_N[:] = 0
            raise
        finally:
            copy_N[:] = 0  # the caller erases the others
        return secret_N


def _centred(values: object, q: int) -> Float64:
    exact = np.array(values, dtype=np.int64)
    return np.where(exact > q // 2, exact - q, exact).astype(np.float64)


def work_space(rows: int) -> Float64:
    """Memory for `products_of_class`, one array a thread. It ends up holding secrets."""
    return np.zeros((rows, BLOCK))


def products_of_class(
    low_GNB: UInt32,
    high_GNB: UInt16,
    secret_N: Float64,
    transform: ClassTransform,
    noise_GMB: UInt32,
    work_MB: Float64,
    out_GRW: UInt32,
    places_M: Int64,
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
        work_MB: from `work_space`.
        out_GRW: receives the coefficients, as `residue_blocks` has them; any number of rows R.
        places_M: which row of `out_GRW` is that of each coefficient, in [0, R).
        first, stop: the blocks of features to do.
    """
    # The loops do not check bounds.
    if not (
        0 <= first <= stop <= min(len(low_GNB), len(high_GNB), len(out_GRW))
        and len(noise_GMB) in (0, stop - first)
        and len(places_M) == len(work_MB) == transform.rows
        and 0 <= places_M.min() <= places_M.max() < out_GRW.shape[1]
        and out_GRW.shape[2] == WORDS
    ):
        raise ValueError("A transform was given arrays that do not fit together.")
    _products_of_class(
        low_GNB,
        high_GNB,
        secret_N,
        transform.twiddles_M,
        float(transform.ring.q),
        noise_GMB,
        work_MB,
        out_GRW,
        halves(out_GRW),
        places_M,
        first,
        stop,
    )


def compile_loops() -> None:
    """Compile the loops."""
    _scale.compile()
    _products_of_class.compile()


@compiled("void(float64[::1], float64[::1], float64, float64[::1])")
def _scale(s_N: Float64, factors_N: Float64, q: float, out_N: Float64) -> None:
    one_over_q = 1.0 / q
    for j in range(s_N.size):
        product = multiply(s_N[j], factors_N[j], factors_N[j] * one_over_q, q)
        out_N[j] = reduce(product, q, one_over_q)


# The inner loops run over `a_MB.shape[1]`, which is BLOCK: LLVM unrolls short loops whose length it
# knows, and then does not vectorise them.


@inlined
def _first_stage(
    low_NB: UInt32, high_NB: UInt16, secret_N: Float64, w_M: Float64, q: float, a_MB: Float64
) -> None:
    """The products with the secret at all roots, and the first stage on them; |a| ≤ 1.04 q."""
    one_over_q = 1.0 / q
    half = a_MB.shape[0] >> 1
    for i in range(half):
        w, s0, s1 = w_M[half + i], secret_N[2 * i], secret_N[2 * i + 1]
        w_over_q, s0_over_q, s1_over_q = w * one_over_q, s0 * one_over_q, s1 * one_over_q
        for b in range(a_MB.shape[1]):
            u = multiply(residue(low_NB[2 * i, b], high_NB[2 * i, b]), s0, s0_over_q, q)
            v = multiply(residue(low_NB[2 * i + 1, b], high_NB[2 * i + 1, b]), s1, s1_over_q, q)
            a_MB[2 * i, b] = u + v
            a_MB[2 * i + 1, b] = multiply(u - v, w, w_over_q, q)


@inlined
def _sums_of_products(
    low_NB: UInt32, high_NB: UInt16, secret_N: Float64, q: float, a_MB: Float64
) -> None:
    """The sums of the products with the secret at k roots that lie side by side; |a| ≤ 0.52 q."""
    one_over_q = 1.0 / q
    k = secret_N.size // a_MB.shape[0]
    for m in range(a_MB.shape[0]):
        for b in range(a_MB.shape[1]):
            a_MB[m, b] = 0.0
        for begin in range(m * k, m * k + k, LAZY):
            for j in range(begin, min(begin + LAZY, m * k + k)):
                s = secret_N[j]
                s_over_q = s * one_over_q
                for b in range(a_MB.shape[1]):
                    a_MB[m, b] += multiply(residue(low_NB[j, b], high_NB[j, b]), s, s_over_q, q)
            for b in range(a_MB.shape[1]):
                a_MB[m, b] = reduce(a_MB[m, b], q, one_over_q)


@inlined
def _one_stage(w_M: Float64, q: float, a_MB: Float64) -> None:
    """The first stage, on |a| ≤ 0.52 q; then |a| ≤ 1.04 q."""
    one_over_q = 1.0 / q
    half = a_MB.shape[0] >> 1
    for i in range(half):
        w = w_M[half + i]
        w_over_q = w * one_over_q
        for b in range(a_MB.shape[1]):
            u, v = a_MB[2 * i, b], a_MB[2 * i + 1, b]
            a_MB[2 * i, b] = u + v
            a_MB[2 * i + 1, b] = multiply(u - v, w, w_over_q, q)


@inlined
def _two_stages(stride: int, w_M: Float64, q: float, a_MB: Float64) -> None:
    """The stages of `stride` and twice that.

    Sums grow fourfold before they are reduced: for |a| ≤ 1.04 q, all stay below 2^52, and the
    results are |a| ≤ 0.55 q.
    """
    one_over_q = 1.0 / q
    half = a_MB.shape[0] // (2 * stride)
    for i in range(half >> 1):
        w0, w1, w2 = w_M[half + 2 * i], w_M[half + 2 * i + 1], w_M[(half >> 1) + i]
        w0_over_q, w1_over_q, w2_over_q = w0 * one_over_q, w1 * one_over_q, w2 * one_over_q
        for j in range(4 * stride * i, 4 * stride * i + stride):
            for b in range(a_MB.shape[1]):
                x0, x1 = a_MB[j, b], a_MB[j + stride, b]
                x2, x3 = a_MB[j + 2 * stride, b], a_MB[j + 3 * stride, b]
                s0, d0 = x0 + x1, multiply(x0 - x1, w0, w0_over_q, q)
                s1, d1 = x2 + x3, multiply(x2 - x3, w1, w1_over_q, q)
                a_MB[j, b] = reduce(s0 + s1, q, one_over_q)
                a_MB[j + stride, b] = reduce(d0 + d1, q, one_over_q)
                a_MB[j + 2 * stride, b] = multiply(s0 - s1, w2, w2_over_q, q)
                a_MB[j + 3 * stride, b] = multiply(d0 - d1, w2, w2_over_q, q)


@inlined
def _write_with_noise(
    a_MB: Float64,
    noise_MB: UInt32,
    q: float,
    places_M: Int64,
    words_RW: UInt32,
    halves_RH: UInt16,
) -> None:
    """Add e, and write residues in [0, q), for |a| ≤ 0.55 q."""
    block = a_MB.shape[1]
    for m in range(a_MB.shape[0]):
        row = places_M[m]
        for b in range(block):
            # The ones among the bits, with the upper half of them inverted, less 16.
            e = np.int32(ones(noise_MB[m, b] ^ np.uint32(0xFFFF0000))) - np.int32(16)
            value = np.int64(canonical(a_MB[m, b] + np.float64(e), q))
            words_RW[row, b] = np.uint32(value)
            halves_RH[row, 2 * block + b] = np.uint16(value >> np.int64(32))


@inlined
def _write(a_MB: Float64, q: float, places_M: Int64, words_RW: UInt32, halves_RH: UInt16) -> None:
    """Write residues in [0, q), for |a| ≤ 0.55 q."""
    block = a_MB.shape[1]
    for m in range(a_MB.shape[0]):
        row = places_M[m]
        for b in range(block):
            value = np.int64(canonical(a_MB[m, b], q))
            words_RW[row, b] = np.uint32(value)
            halves_RH[row, 2 * block + b] = np.uint16(value >> np.int64(32))


@compiled(
    "void(uint32[:, :, ::1], uint16[:, :, ::1], float64[::1], float64[::1], float64,"
    " uint32[:, :, ::1], float64[:, ::1], uint32[:, :, ::1], uint16[:, :, ::1], int64[::1], int64,"
    " int64)"
)
def _products_of_class(
    low_GNB: UInt32,
    high_GNB: UInt16,
    secret_N: Float64,
    w_M: Float64,
    q: float,
    noise_GMB: UInt32,
    a_MB: Float64,
    words_GRW: UInt32,
    halves_GRH: UInt16,
    places_M: Int64,
    first: int,
    stop: int,
) -> None:
    rows = a_MB.shape[0]
    stages = 0
    while (1 << stages) < rows:
        stages += 1
    for g in range(first, stop):
        if secret_N.size == rows and stages & 1:
            _first_stage(low_GNB[g], high_GNB[g], secret_N, w_M, q, a_MB)
        else:
            _sums_of_products(low_GNB[g], high_GNB[g], secret_N, q, a_MB)
            if stages & 1:
                _one_stage(w_M, q, a_MB)
        stride = 1 << (stages & 1)
        while stride < rows:
            _two_stages(stride, w_M, q, a_MB)
            stride <<= 2
        words_RW, halves_RH = words_GRW[g], halves_GRH[g]
        if noise_GMB.shape[0] > 0:
            _write_with_noise(a_MB, noise_GMB[g - first], q, places_M, words_RW, halves_RH)
        else:
            _write(a_MB, q, places_M, words_RW, halves_RH)
