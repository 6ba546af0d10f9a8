"""Tests whether the inputs of linear layers look like noise, without knowledge of the prompt.

Each test receives the rows of one group after another. Shape suffixes: N rows; D features.
"""

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tsqp.algebra.params import Field
from tsqp.audit.finding import Finding
from tsqp.audit.p_values import (
    bin_chances,
    byte_chances,
    chi_square_tail,
    expected_repeats,
    normal_tail,
    poisson_tail,
)
from tsqp.audit.recording import centred

BINS = 256
MIN_VALUES = 20 * BINS  # with fewer values the chi-square approximation is poor
BLOCK_ROWS = 512
MAX_RELATED = 4096  # maximum rows of one width that are compared in pairs
RELATED_CHANCE = 0.001


class Uniformity:
    """Whether residues are uniform on [0, p): chi-square tests of 256 bins and of each byte."""

    def __init__(self, field: Field) -> None:
        self._field = field
        self._chances = [bin_chances(field, BINS)]
        self._chances += [byte_chances(field, byte) for byte in range(field.residue_bytes)]
        self._counts = [torch.zeros(len(each), dtype=torch.int64) for each in self._chances]
        self._outside = 0

    def add(self, residues: Tensor) -> None:
        values = residues.reshape(-1).long()
        inside = (values >= 0) & (values < self._field.p)
        self._outside += int((~inside).sum())
        values = values[inside]
        intervals, *bytes_ = self._counts
        intervals += (values * BINS // self._field.p).bincount(minlength=BINS)
        for byte, counts in enumerate(bytes_):
            counts += (values >> 8 * byte & 255).bincount(minlength=256)

    def p_values(self) -> list[float]:
        """One p-value per test, each uniform on [0, 1] if the residues are uniform."""
        values = int(self._counts[0].sum())
        tails = []
        for counts, chances in zip(self._counts, self._chances, strict=True):
            possible = chances > 0
            tails.append(chi_square_tail(counts[possible], values * chances[possible]))
        return tails

    def finding(self, attack: str, subject: str) -> Finding:
        values = int(self._counts[0].sum())
        if self._outside:
            note = f"{self._outside} values are outside [0, p)"
            return Finding(attack, subject, "values", self._outside, values, 0.0, 0.0, note)
        if values < MIN_VALUES:
            note = f"not applicable: {values} values, and {MIN_VALUES} are needed"
            return Finding(attack, subject, "values", note=note)
        tails = self.p_values()
        p = min(1.0, len(tails) * min(tails))
        return Finding(attack, subject, "values", of=values, p=p, note="chi-square")


class Repeats:
    """Whether a residue occurs twice in the same column; for activations, whether a row repeats."""

    def __init__(self, field: Field | None) -> None:
        self._field = field
        self._found = self._of = 0
        self._expected = 0.0

    def add(self, rows_ND: Tensor) -> None:
        rows, width = rows_ND.shape
        if self._field is None:
            self._of += rows
            self._found += rows - len(np.unique(rows_ND.numpy(), axis=0))
            return
        self._of += rows * width
        ordered_ND = rows_ND.sort(dim=0).values
        self._found += int((ordered_ND[1:] == ordered_ND[:-1]).sum())
        self._expected += width * expected_repeats(rows, self._field)

    def finding(self, attack: str, subject: str) -> Finding:
        unit = "rows" if self._field is None else "values"
        p = poisson_tail(self._found, self._expected)
        return Finding(attack, subject, unit, self._found, self._of, self._expected, p)


class Related:
    """Whether two rows have similar directions, as two rows with the same pad do."""

    def __init__(self, field: Field | None) -> None:
        self._field = field
        self._rows: dict[int, list[Tensor]] = {}

    def add(self, rows_ND: Tensor) -> None:
        kept = self._rows.setdefault(rows_ND.shape[1], [])
        kept.append(_directions(rows_ND[: MAX_RELATED - sum(map(len, kept))], self._field))

    def finding(self, attack: str, subject: str) -> Finding:
        """The p-value is that of the closest pair, times the number of pairs."""
        groups = [torch.cat(kept) for kept in self._rows.values()]
        pairs = sum(math.comb(len(unit_ND), 2) for unit_ND in groups)
        found, p = _beyond_noise((z for unit_ND in groups for z in _deviations(unit_ND)), pairs)
        return Finding(attack, subject, "pairs", found, pairs, RELATED_CHANCE, p)


class Agreement:
    """Whether two recordings of one prompt agree, element by element."""

    def __init__(self, field: Field | None) -> None:
        self._field = field
        self._equal = self._of = self._values = 0
        self._products = self._first_squares = self._second_squares = 0.0
        self._deviations: list[Tensor] = []  # between each row and its counterpart

    def add(self, a_ND: Tensor, b_ND: Tensor) -> None:
        rows = min(len(a_ND), len(b_ND))
        a_ND, b_ND = a_ND[:rows], b_ND[:rows]
        same_ND = a_ND == b_ND
        self._equal += int(same_ND.all(1).sum() if self._field is None else same_ND.sum())
        self._of += rows if self._field is None else a_ND.numel()
        first, second = _directions(a_ND, self._field), _directions(b_ND, self._field)
        self._deviations.append((first * second).sum(1).abs() * math.sqrt(first.shape[1]))
        if self._field is not None:
            a_ND, b_ND = centred(a_ND, self._field), centred(b_ND, self._field)
        a, b = a_ND.double().view(-1), b_ND.double().view(-1)
        self._values += len(a)
        self._products += float(a @ b)
        self._first_squares += float(a @ a)
        self._second_squares += float(b @ b)

    def equal(self, attack: str, subject: str) -> Finding:
        """Count values that are equal in both; for activations, count equal rows."""
        unit = "rows" if self._field is None else "values"
        chance = 0.0 if self._field is None else self._of / self._field.p
        p = poisson_tail(self._equal, chance)
        return Finding(attack, subject, unit, self._equal, self._of, chance, p)

    def correlation(self, attack: str, subject: str) -> Finding:
        """Correlation over all values: finds a small leak in every value."""
        scale = math.sqrt(self._first_squares * self._second_squares)
        found = self._products / scale if scale else 0.0
        p = normal_tail(found * math.sqrt(self._values))
        return Finding(attack, subject, "correlation", found, chance=0.0, p=p)

    def related(self, attack: str, subject: str) -> Finding:
        """Similarity of each row with its counterpart: finds a large leak in a few rows."""
        rows = sum(map(len, self._deviations))
        found, p = _beyond_noise(self._deviations, rows)
        return Finding(attack, subject, "rows", found, rows, RELATED_CHANCE, p)


def _directions(rows_ND: Tensor, field: Field | None) -> Tensor:
    """Unit rows whose dot product measures how close two rows are.

    A residue becomes a point on a circle, so that a difference that is small mod p stays small
    after a wrap-around. The dot product of two rows of noise is then a mean of cosines of uniform
    angles, which varies at most as much as a normal variable of variance 1 / width.
    """
    if field is None:
        return F.normalize(rows_ND)
    angles_ND = rows_ND.double() * (2 * math.pi / field.p)
    points = torch.cat((angles_ND.cos(), angles_ND.sin()), dim=1).float()
    return points / math.sqrt(rows_ND.shape[1])


def _deviations(unit_ND: Tensor) -> Iterator[Tensor]:
    """The dot product of every two rows, in standard deviations of noise, in blocks.

    A row with itself, and a pair that was in an earlier block, counts as 0.
    """
    for first in range(0, len(unit_ND), BLOCK_ROWS):
        block = unit_ND[first : first + BLOCK_ROWS]
        yield (block @ unit_ND[first:].t()).abs_().triu_(1) * math.sqrt(unit_ND.shape[1])


def _beyond_noise(blocks: Iterable[Tensor], number: int) -> tuple[int, float]:
    """How many deviations are beyond those of noise, and the p-value of the largest.

    Args:
        number: number of all deviations.
    """
    tail = torch.tensor(RELATED_CHANCE / max(number, 1) / 2, dtype=torch.float64)
    limit = -float(torch.special.ndtri(tail))
    found, largest = 0, 0.0
    for block in blocks:
        found += int((block > limit).sum())
        largest = max(largest, float(block.max()))
    return found, min(1.0, number * normal_tail(largest))
