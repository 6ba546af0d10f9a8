"""Products of settings, cut down to what shows whether any two of them disturb each other."""

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

import pytest


def pairs(*axes: Sequence[Any]) -> list[Any]:
    """The product of `axes` for `pytest.mark.parametrize`.

    Some rows together hold every pair of values of two axes. The other rows are marked slow.
    """
    numbers = list(product(*(range(len(axis)) for axis in axes)))
    missing = {pair for row in numbers for pair in _pairs(row)}
    chosen = set()
    while missing:
        best = max(numbers, key=lambda row: len(_pairs(row) & missing))
        missing -= _pairs(best)
        chosen.add(best)
    return [
        pytest.param(
            *(axis[number] for axis, number in zip(axes, row, strict=True)),
            marks=() if row in chosen else pytest.mark.slow,
        )
        for row in numbers
    ]


def _pairs(row: Sequence[int]) -> set[tuple[tuple[int, int], ...]]:
    """The pairs of values in a row, each as the number of its axis and its number there."""
    return set(combinations(enumerate(row), 2))
