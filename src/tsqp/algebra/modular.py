"""Exact arithmetic mod a prime q < 2^46 in float64, for loops that numba vectorises.

A product of two residues has 92 bits. `h = x·w` keeps the upper 53 of them and `l = fma(x, w, -h)`
is exactly the rest; subtracting b·q from both, for an integer b near x·w/q, leaves a small exact
remainder. That takes six vector operations and no integer multiplication (the method of FLINT's
fft_small). All values are integers; every step states the range of what it takes and gives.
"""

from typing import Any

from tsqp.algebra.native import Instruction, inlined

MAX_BITS = 46  # bits of q: sums of 64 residues stay below 2^52

# a · b + c, rounded once
_fma = Instruction(
    "float64(float64, float64, float64)", lambda builder, arguments: builder.fma(*arguments)
)
# the nearest integer, ties to even
_nearest = Instruction(
    "float64(float64)",
    lambda builder, arguments: builder.call(
        builder.module.declare_intrinsic("llvm.nearbyint", [arguments[0].type]), arguments
    ),
)
# how many bits of a 32-bit word are one
ones = Instruction("uint32(uint32)", lambda builder, arguments: builder.ctpop(*arguments))


@inlined
def multiply(x: float, w: float, w_over_q: float, q: float) -> Any:
    """r ≡ x · w (mod q).

    Args:
        x: |x| ≤ 2^52.
        w: |w| ≤ q / 2.
        w_over_q: w · (1 / q) in float64.

    Returns:
        |r| ≤ (1/2 + 3/4 · 2^-52 · |x|) q, which is 0.52 q for |x| ≤ 2^46 and 1.25 q at most: the
        quotient is at most |x| / 2, and rounded three times.
    """
    h = x * w
    low = _fma(x, w, -h)
    b = _nearest(x * w_over_q)
    return _fma(-b, q, h) + low


@inlined
def reduce(x: float, q: float, one_over_q: float) -> Any:
    """r ≡ x (mod q), |r| ≤ (1/2 + 2^-40) q, for |x| ≤ 2^52 and q > 2^39."""
    return _fma(-_nearest(x * one_over_q), q, x)


@inlined
def canonical(x: float, q: float) -> Any:
    """The residue in [0, q), for |x| < q."""
    return x + q if x < 0.0 else x
