"""Is it noise? Tests of what linear layers received, without knowledge of the prompt.

Each is fed the rows of one group after the other. Shape suffixes: N rows; D features.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tsqp.algebra.params import Field
from tsqp.bench.chance import (
    bin_chances,
    byte_chances,
    chi_square_tail,
    expected_repeats,
    normal_tail,
    poisson_tail,
    projection_tail,
)
from tsqp.bench.finding import Finding
from tsqp.bench.recording import Key, Recording, centred

BINS = 1000
MIN_VALUES = 20 * BINS  # fewer do not follow the chi-square distribution
BLOCK_ROWS = 512
MAX_RELATED = 4096  # rows of one width that are compared, each with each
RELATED_CHANCE = 0.001


class Uniformity:
    """Are residues uniform on [0, p)? Chi-square of 1000 equal intervals, and of every byte."""

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
        """One a test; each is uniform on [0, 1] where the residues are uniform."""
        values = int(self._counts[0].sum())
        tails = []
        for counts, chances in zip(self._counts, self._chances, strict=True):
            possible = chances > 0
            tails.append(chi_square_tail(counts[possible], values * chances[possible]))
        return tails

    def finding(self, attack: str, subject: str) -> Finding:
        values = int(self._counts[0].sum())
        if self._outside:
            note = f"{self._outside} values are no residues"
            return Finding(attack, subject, "values", self._outside, values, 0.0, 0.0, note)
        if values < MIN_VALUES:
            note = f"not applicable: {values} values, and {MIN_VALUES} are needed"
            return Finding(attack, subject, "values", note=note)
        tails = self.p_values()
        p = min(1.0, len(tails) * min(tails))
        return Finding(attack, subject, "values", of=values, p=p, note="chi-square")


class Repeats:
    """Do residues come again at the same place? Of activations, do whole rows?"""

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
    """Do two rows point the same way, as two with the same pad do?"""

    def __init__(self, field: Field | None) -> None:
        self._field = field
        self._rows: dict[int, list[Tensor]] = {}

    def add(self, rows_ND: Tensor) -> None:
        kept = self._rows.setdefault(rows_ND.shape[1], [])
        rows_ND = rows_ND[: MAX_RELATED - sum(map(len, kept))]
        numbers_ND = rows_ND if self._field is None else centred(rows_ND, self._field)
        kept.append(F.normalize(numbers_ND))

    def finding(self, attack: str, subject: str) -> Finding:
        """The p-value is that of the closest pair, times the number of pairs."""
        groups = [torch.cat(kept) for kept in self._rows.values()]
        pairs = sum(math.comb(len(unit_ND), 2) for unit_ND in groups)
        found, p = 0, 1.0
        # Cosines of noise are at most as spread as normal numbers of variance 1/D.
        deviations = _two_sided_quantile(RELATED_CHANCE / max(pairs, 1))
        for unit_ND in groups:
            width = unit_ND.shape[1]
            if width < 2:
                continue
            for cosines in _cosines(unit_ND):
                found += int((cosines > deviations / math.sqrt(width)).sum())
                p = min(p, pairs * projection_tail(float(cosines.max()) ** 2, 1, width))
        return Finding(attack, subject, "pairs", found, pairs, RELATED_CHANCE, p)


def compare(
    first: Recording, second: Recording, equal: str, correlated: str, subject: str
) -> list[Finding]:
    """Do two recordings of one prompt agree, place by place, more than noise does?"""
    field = first.field
    found = of = values = 0
    products = first_squares = second_squares = 0.0
    for key in _common(first, second):
        a_ND, b_ND = first.rows(key), second.rows(key)
        rows = min(len(a_ND), len(b_ND))
        a_ND, b_ND = a_ND[:rows], b_ND[:rows]
        same_ND = a_ND == b_ND
        found += int(same_ND.all(1).sum() if field is None else same_ND.sum())
        of += rows if field is None else a_ND.numel()
        values += a_ND.numel()
        if field is not None:
            a_ND, b_ND = centred(a_ND, field), centred(b_ND, field)
        a, b = a_ND.double().view(-1), b_ND.double().view(-1)
        products += float(a @ b)
        first_squares += float(a @ a)
        second_squares += float(b @ b)
    chance = 0.0 if field is None else of / field.p
    unit = "rows" if field is None else "values"
    scale = math.sqrt(first_squares * second_squares)
    correlation = products / scale if scale else 0.0
    return [
        Finding(equal, subject, unit, found, of, chance, poisson_tail(found, chance)),
        Finding(
            correlated,
            subject,
            "correlation",
            correlation,
            chance=0.0,
            p=normal_tail(correlation * math.sqrt(values)),
        ),
    ]


def _common(first: Recording, second: Recording) -> list[Key]:
    others = set(second.groups())
    return [key for key in first.groups() if key in others]


def _cosines(unit_ND: Tensor) -> Iterator[Tensor]:
    """|cosine| of every two rows, in blocks; 0 for a row and itself, and for pairs seen before."""
    for first in range(0, len(unit_ND), BLOCK_ROWS):
        block = unit_ND[first : first + BLOCK_ROWS]
        yield (block @ unit_ND[first:].t()).abs_().triu_(1)


def _two_sided_quantile(p: float) -> float:
    """Deviations that a standard normal number exceeds with probability p, either way."""
    return -float(torch.special.ndtri(torch.tensor(p / 2, dtype=torch.float64)))
