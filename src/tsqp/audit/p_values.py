"""How likely noise alone would give a result: p-values, and what uniform residues look like."""

import math
from itertools import pairwise

import torch

from tsqp.algebra.params import Field
from tsqp.errors import UsageError

try:
    from scipy import special
except ModuleNotFoundError as exc:
    raise UsageError("The audit needs SciPy: run pip install 'tsqp[audit]'.") from exc


def poisson_tail(count: float, expected: float) -> float:
    """P(X ≥ count) for a Poisson X: of rare independent events, at least so many."""
    return float(special.gammainc(count, expected)) if count > 0 else 1.0


def chi_square_tail(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """P that counts of `expected` means differ from them at least as much (Pearson)."""
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return float(special.chdtrc(len(counts) - 1, statistic))


def normal_tail(z: float) -> float:
    """P(|X| ≥ |z|) for a standard normal X."""
    return float(special.erfc(abs(z) / math.sqrt(2)))


def projection_tail(share: float, dimensions: int, width: int) -> float:
    """P that a random subspace keeps at least `share` of a vector's squared length.

    What it keeps is Beta(dimensions / 2, (width - dimensions) / 2) for a subspace without a
    preferred direction, and 0 < dimensions < width. With one dimension it is the square of the
    cosine of two random vectors.
    """
    share = min(max(share, 0.0), 1.0)
    return float(special.betaincc(dimensions / 2, (width - dimensions) / 2, share))


def byte_chances(field: Field, byte: int) -> torch.Tensor:
    """How often byte number `byte` of a uniform residue has each of 256 values; exact."""
    unit = 1 << 8 * byte
    cycles, rest = divmod(field.p, 256 * unit)
    counts = [cycles * unit + min(max(rest - value * unit, 0), unit) for value in range(256)]
    return torch.tensor(counts, dtype=torch.float64) / field.p


def bin_chances(field: Field, bins: int) -> torch.Tensor:
    """How often c · bins // p of a uniform residue c has each value; exact."""
    edges = [-(-value * field.p // bins) for value in range(bins + 1)]
    counts = [end - start for start, end in pairwise(edges)]
    return torch.tensor(counts, dtype=torch.float64) / field.p


def expected_repeats(rows: int, field: Field) -> float:
    """How many of so many uniform residues equal one before them, on average."""
    p = field.p
    return rows + p * math.expm1(rows * math.log1p(-1 / p))
