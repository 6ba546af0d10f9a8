"""Products of settings, cut down: to each pair of values, or to each value."""

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


def turns(many: Sequence[Any], few: Sequence[Any]) -> list[Any]:
    """The product of two axes for `pytest.mark.parametrize`.

    Each of `many` comes with one of `few`, in turn. The other rows are marked slow.
    """
    return [
        pytest.param(one, other, marks=() if number % len(few) == place else pytest.mark.slow)
        for number, one in enumerate(many)
        for place, other in enumerate(few)
    ]


def _pairs(row: Sequence[int]) -> set[tuple[tuple[int, int], ...]]:
    """The pairs of values in a row, each as the number of its axis and its number there."""
    return set(combinations(enumerate(row), 2))
