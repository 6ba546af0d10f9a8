"""How likely noise alone would give a result: the tails of a few distributions, in float64."""

import math
from itertools import pairwise

import torch

from tsqp.algebra.params import Field

STEPS = 20_000


def poisson_tail(count: float, expected: float) -> float:
    """P(X ≥ count) for a Poisson X: of rare independent events, at least so many."""
    if count <= 0:
        return 1.0
    return float(torch.special.gammainc(_double(count), _double(expected)))


def chi_square_tail(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """P that counts of `expected` means differ from them at least as much (Pearson)."""
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(_double((len(counts) - 1) / 2), statistic / 2))


def normal_tail(z: float) -> float:
    """P(|X| ≥ |z|) for a standard normal X."""
    return math.erfc(abs(z) / math.sqrt(2))


def projection_tail(share: float, dimensions: int, width: int) -> float:
    """P that a random subspace keeps at least `share` of a vector's squared length.

    What it keeps is Beta(dimensions / 2, (width - dimensions) / 2) for a subspace without a
    preferred direction, and 0 < dimensions < width. With one dimension it is the square of the
    cosine of two random vectors.
    """
    a, b = dimensions / 2, (width - dimensions) / 2
    # With share = sin², the density has no poles: 2 sin^(2a-1) cos^(2b-1) / B(a, b).
    first = math.asin(math.sqrt(min(max(share, 0.0), 1.0)))
    angles = torch.linspace(first, math.pi / 2, STEPS + 1, dtype=torch.float64)
    step = (math.pi / 2 - first) / STEPS
    middle = angles[:-1] + step / 2
    log_density = (2 * a - 1) * middle.sin().log() + (2 * b - 1) * middle.cos().log()
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    log_tail = float(log_density.logsumexp(0)) + math.log(2 * step) if step else -math.inf
    return min(1.0, math.exp(min(log_tail - log_beta, 0.0)))


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


def _double(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)
