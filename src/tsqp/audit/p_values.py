"""p-values of the attacks, and exact distributions of uniform residues."""

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
    """P(X ≥ count) for a Poisson variable X with mean `expected`."""
    return float(special.gammainc(count, expected)) if count > 0 else 1.0


def chi_square_tail(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """p-value of Pearson's chi-square test of `counts` against their `expected` values."""
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return float(special.chdtrc(len(counts) - 1, statistic))


def normal_tail(z: float) -> float:
    """P(|X| ≥ |z|) for a standard normal X."""
    return float(special.erfc(abs(z) / math.sqrt(2)))


def projection_tail(share: float, dimensions: int, width: int) -> float:
    """P that a random subspace keeps at least `share` of a vector's squared length.

    For a uniformly random subspace with 0 < dimensions < width, the share has the distribution
    Beta(dimensions / 2, (width - dimensions) / 2). With one dimension it is the squared cosine of
    two random vectors.
    """
    share = min(max(share, 0.0), 1.0)
    return float(special.betaincc(dimensions / 2, (width - dimensions) / 2, share))


def byte_chances(field: Field, byte: int) -> torch.Tensor:
    """Exact probabilities of the 256 values of byte `byte` of a uniform residue."""
    unit = 1 << 8 * byte
    cycles, rest = divmod(field.p, 256 * unit)
    counts = [cycles * unit + min(max(rest - value * unit, 0), unit) for value in range(256)]
    return torch.tensor(counts, dtype=torch.float64) / field.p


def bin_chances(field: Field, bins: int) -> torch.Tensor:
    """Exact probabilities of the values of c · bins // p for a uniform residue c."""
    edges = [-(-value * field.p // bins) for value in range(bins + 1)]
    counts = [end - start for start, end in pairwise(edges)]
    return torch.tensor(counts, dtype=torch.float64) / field.p


def expected_repeats(rows: int, field: Field) -> float:
    """The expected number of `rows` uniform residues that equal an earlier one."""
    p = field.p
    return rows + p * math.expm1(rows * math.log1p(-1 / p))
