"""Exact products of residues with int8 weights on a CUDA device, in one launch [P9].

A kernel reads packed residues as they crossed, splits them into int8 digits, multiplies every digit
by the weights with int32 accumulators, and writes packed residues mod p. `_few_rows` puts the
digits of all tokens under each other, so that the weights are read once. `_many_rows` has one
accumulator for each digit, which wastes no row of a tile.

Where int8 is slow, the digits of a tile are multiplied as bfloat16. Their sums in float32 are
exact, as a tile is narrower than `EXACT_WIDTH`; from tile to tile they are added as int32.

Imports Triton, which needs a CUDA device, or TRITON_INTERPRET=1 for tests on a CPU.

Shape suffixes: T tokens; D input and F output features; B bytes of a row; L digits. M rows of
digits, in which token t has the rows LEVELS·t to LEVELS·t + L - 1.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tsqp.algebra.params import Field
from tsqp.gpu.backends.cuda_product import EXACT_WIDTH

FEW = 16  # tokens, up to which the weights are read once
MIN_ROWS = 16  # of a tile, see tl.dot
BFLOAT16 = tl.bfloat16


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program computes: `tokens` by `features`, `width` input features at a time."""

    tokens: int
    features: int
    width: int
    warps: int
    stages: int


def few_tile(rows: int, field: Field) -> Tile:
    """For up to FEW rows. Narrow in features, so that many programs read weights together."""
    tokens = max(triton.next_power_of_2(rows), MIN_ROWS // levels(field))
    digits = tokens * levels(field)
    # More digits at once would not fit into registers.
    width = 256 * MIN_ROWS // digits
    return Tile(tokens=tokens, features=32, width=width, warps=8 if digits > 64 else 4, stages=3)


def many_tile(field: Field) -> Tile:
    """For more rows. The sums of all digits are in registers, [64, 64] as Hopper multiplies."""
    width = 32 if field.digits > 4 else 64
    return Tile(tokens=64, features=64, width=width, warps=8, stages=3)


def levels(field: Field) -> int:
    """Rows of a token in `_few_rows`: its digits, and zeros up to a power of two."""
    return int(triton.next_power_of_2(field.digits))


def residue_product(
    c_TB: Tensor, weight_FD: Tensor, field: Field, out_TB: Tensor, *, floats: tl.dtype | None = None
) -> None:
    """Write out = Wq · c mod p.

    Args:
        c_TB, out_TB: uint8, contiguous rows of packed residues; see `tsqp.algebra.residue_bytes`.
            What is not a residue gives a wrong answer and no error.
        weight_FD: int8 in [-127, 127], contiguous, D ≤ MAX_WIDTH. All are on one device.
        floats: multiply digits in this type: BFLOAT16, or float16 in the interpreter, which cannot
            multiply bfloat16. Both hold digits and weights exactly. None: as int8.
    """
    rows, (features, width) = len(c_TB), weight_FD.shape
    is_few = rows <= FEW
    tile = few_tile(rows, field) if is_few else many_tile(field)
    grid = triton.cdiv(features, tile.features), triton.cdiv(rows, tile.tokens)
    kernel = _few_rows if is_few else _many_rows
    kernel[grid](
        as_units(c_TB, field), weight_FD, as_units(out_TB, field), rows, features, width,
        **constants(field, tile, is_few, floats), **options(tile),
    )  # fmt: skip


def constants(
    field: Field, tile: Tile, is_few: bool, floats: tl.dtype | None = None
) -> dict[str, Any]:
    """The constants of a kernel, by name."""
    assert tile.width <= EXACT_WIDTH
    found: dict[str, Any] = {
        "BYTES": field.residue_bytes,
        "BITS": field.bits,
        "GAP": field.gap,
        "LARGEST": field.largest_digits,
        "DIGITS": field.digits,
        "TOKENS": tile.tokens,
        "FEATURES": tile.features,
        "WIDTH": tile.width,
        "FLOATS": floats,
    }
    return found | {"LEVELS": levels(field)} if is_few else found


def options(tile: Tile) -> dict[str, int | bool]:
    """How a kernel is compiled. There are no floating-point operations to fuse."""
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False}


def as_units(rows_TB: Tensor, field: Field) -> Tensor:
    """The same memory in the units that kernels read: words, bytes, or halves of words.

    A row of the lattice field with an odd number of residues does not end at a whole word.
    """
    return rows_TB.view({4: torch.int32, 3: torch.uint8, 6: torch.int16}[field.residue_bytes])


@triton.jit(do_not_specialize=["rows"])  # not compiled anew for one row, or 16
def _few_rows(
    c_units, weight_FD, out_units, rows, features, width,
    BYTES: tl.constexpr, BITS: tl.constexpr, GAP: tl.constexpr, LARGEST: tl.constexpr,
    DIGITS: tl.constexpr, LEVELS: tl.constexpr,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr, WIDTH: tl.constexpr,
    FLOATS: tl.constexpr,
):  # fmt: skip
    rows_M: tl.constexpr = TOKENS * LEVELS
    m = tl.arange(0, rows_M)
    level_M = m % LEVELS
    token_M = tl.program_id(1) * TOKENS + m // LEVELS
    feature_F = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    sums_MF = tl.zeros((rows_M, FEATURES), tl.int32)
    for first in range(0, width, WIDTH):
        d = first + tl.arange(0, WIDTH)
        is_digit_MD = ((token_M < rows) & (level_M < DIGITS))[:, None] & (d < width)[None, :]
        c_MD = _read(c_units, token_M, d, width, is_digit_MD, BYTES)
        shifted_MD = _shift(c_MD, BITS, GAP, LARGEST, DIGITS)
        digits_MD = _digit(shifted_MD, level_M[:, None])
        digits_MD = tl.where(is_digit_MD, digits_MD, 0).to(tl.int8)
        weight_DF = _read_weights(weight_FD, feature_F, d, features, width)
        sums_MF = _add_product(sums_MF, digits_MD, weight_DF, FLOATS)
    parts_MF = sums_MF.to(tl.int64)
    for level in tl.static_range(1, DIGITS):  # Σ 256^l · sums, reduced after each factor
        parts_MF = tl.where(level_M[:, None] >= level, _fold(parts_MF * 256, BITS, GAP), parts_MF)
    z_TF = tl.sum(tl.reshape(parts_MF, (TOKENS, LEVELS, FEATURES)), axis=1)
    token_T = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    _write(out_units, token_T, feature_F, rows, features, _residue(z_TF, BITS, GAP), BYTES)


@triton.jit(do_not_specialize=["rows"])
def _many_rows(
    c_units, weight_FD, out_units, rows, features, width,
    BYTES: tl.constexpr, BITS: tl.constexpr, GAP: tl.constexpr, LARGEST: tl.constexpr,
    DIGITS: tl.constexpr,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr, WIDTH: tl.constexpr,
    FLOATS: tl.constexpr,
):  # fmt: skip
    token_T = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    feature_F = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    s0_TF = tl.zeros((TOKENS, FEATURES), tl.int32)
    s1_TF = tl.zeros((TOKENS, FEATURES), tl.int32)
    s2_TF = tl.zeros((TOKENS, FEATURES), tl.int32)
    s3_TF = tl.zeros((TOKENS, FEATURES), tl.int32)
    s4_TF = tl.zeros((TOKENS, FEATURES), tl.int32)
    s5_TF = tl.zeros((TOKENS, FEATURES), tl.int32)
    for first in range(0, width, WIDTH):
        d = first + tl.arange(0, WIDTH)
        is_there_TD = (token_T < rows)[:, None] & (d < width)[None, :]
        c_TD = _read(c_units, token_T, d, width, is_there_TD, BYTES)
        shifted_TD = _shift(c_TD, BITS, GAP, LARGEST, DIGITS)
        weight_DF = _read_weights(weight_FD, feature_F, d, features, width)
        s0_TF = _add_product(s0_TF, _digit(shifted_TD, 0), weight_DF, FLOATS)
        s1_TF = _add_product(s1_TF, _digit(shifted_TD, 1), weight_DF, FLOATS)
        s2_TF = _add_product(s2_TF, _digit(shifted_TD, 2), weight_DF, FLOATS)
        if DIGITS > 3:
            s3_TF = _add_product(s3_TF, _digit(shifted_TD, 3), weight_DF, FLOATS)
        if DIGITS > 4:
            s4_TF = _add_product(s4_TF, _digit(shifted_TD, 4), weight_DF, FLOATS)
            s5_TF = _add_product(s5_TF, _digit(shifted_TD, 5), weight_DF, FLOATS)
    z_TF = tl.zeros((TOKENS, FEATURES), tl.int64)  # Horner's rule from the highest digit
    if DIGITS > 4:
        z_TF = _fold(s5_TF.to(tl.int64) * 256 + s4_TF, BITS, GAP) * 256
    if DIGITS > 3:
        z_TF = _fold(z_TF + s3_TF, BITS, GAP) * 256
    z_TF = _fold(z_TF + s2_TF, BITS, GAP) * 256
    z_TF = _fold(z_TF + s1_TF, BITS, GAP) * 256 + s0_TF
    _write(out_units, token_T, feature_F, rows, features, _residue(z_TF, BITS, GAP), BYTES)


@triton.jit
def _add_product(sums, digits, weights, FLOATS: tl.constexpr):
    """sums + digits · weights, in int32."""
    if FLOATS is not None:
        products = tl.dot(digits.to(FLOATS), weights.to(FLOATS), out_dtype=tl.float32)
        return sums + products.to(tl.int32)
    return tl.dot(digits, weights, sums, out_dtype=tl.int32)


@triton.jit
def _read(c_units, token_M, d, width, is_there_MD, BYTES: tl.constexpr):
    """The residues of these tokens as int64; 0 where there is none."""
    row_M = token_M.to(tl.int64) * width
    if BYTES == 4:
        c_MD = tl.load(c_units + row_M[:, None] + d[None, :], is_there_MD, 0).to(tl.int64)
    elif BYTES == 3:
        low = c_units + 3 * row_M[:, None] + d[None, :]
        c_MD = tl.load(low, is_there_MD, 0).to(tl.int64)
        c_MD += tl.load(low + width, is_there_MD, 0).to(tl.int64) << 8
        c_MD += tl.load(low + 2 * width, is_there_MD, 0).to(tl.int64) << 16
    else:
        row = c_units + 3 * row_M[:, None]
        low = row + 2 * d[None, :]
        c_MD = tl.load(low, is_there_MD, 0).to(tl.int64) & 0xFFFF
        c_MD += (tl.load(low + 1, is_there_MD, 0).to(tl.int64) & 0xFFFF) << 16
        high = row + 2 * width + d[None, :]
        c_MD += (tl.load(high, is_there_MD, 0).to(tl.int64) & 0xFFFF) << 32
    return c_MD


@triton.jit
def _shift(c, BITS: tl.constexpr, GAP: tl.constexpr, LARGEST: tl.constexpr, DIGITS: tl.constexpr):
    """c' + 128 · Σ 256^l, whose bytes are the balanced digits of c' plus 128."""
    centred = tl.where(c > LARGEST, c - ((1 << BITS) - GAP), c)
    return centred + (0x808080808080 >> (8 * (6 - DIGITS)))


@triton.jit
def _digit(shifted, level):
    return (((shifted >> (8 * level)) & 255) - 128).to(tl.int8)


@triton.jit
def _read_weights(weight_FD, feature_F, d, features, width):
    """The transposed tile of the weights; 0 outside."""
    row_F = feature_F.to(tl.int64) * width
    is_there_DF = (d < width)[:, None] & (feature_F < features)[None, :]
    return tl.load(weight_FD + row_F[None, :] + d[:, None], is_there_DF, 0)


@triton.jit
def _fold(value, BITS: tl.constexpr, GAP: tl.constexpr):
    """A number ≡ value mod p, in [-2^26, 2^BITS + 2^26) for |value| < 2^(BITS + 9)."""
    return (value >> BITS) * GAP + (value & ((1 << BITS) - 1))


@triton.jit
def _residue(value, BITS: tl.constexpr, GAP: tl.constexpr):
    """value mod p, in [0, p), for the sums above."""
    p: tl.constexpr = (1 << BITS) - GAP
    value = _fold(_fold(value, BITS, GAP), BITS, GAP)
    value = tl.where(value < 0, value + p, value)
    return tl.where(value >= p, value - p, value)


@triton.jit
def _write(out_units, token_T, feature_F, rows, features, z_TF, BYTES: tl.constexpr):
    is_there_TF = (token_T < rows)[:, None] & (feature_F < features)[None, :]
    row_T = token_T.to(tl.int64) * features
    if BYTES == 4:
        tl.store(out_units + row_T[:, None] + feature_F[None, :], z_TF.to(tl.int32), is_there_TF)
    elif BYTES == 3:
        low = out_units + 3 * row_T[:, None] + feature_F[None, :]
        tl.store(low, (z_TF & 255).to(tl.uint8), is_there_TF)
        tl.store(low + features, ((z_TF >> 8) & 255).to(tl.uint8), is_there_TF)
        tl.store(low + 2 * features, (z_TF >> 16).to(tl.uint8), is_there_TF)
    else:
        row = out_units + 3 * row_T[:, None]
        low = row + 2 * feature_F[None, :]
        tl.store(low, (z_TF & 0xFFFF).to(tl.int16), is_there_TF)
        tl.store(low + 1, ((z_TF >> 16) & 0xFFFF).to(tl.int16), is_there_TF)
        tl.store(row + 2 * features + feature_F[None, :], (z_TF >> 32).to(tl.int16), is_there_TF)
