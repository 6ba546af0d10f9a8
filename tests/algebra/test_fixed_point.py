"""Integer weights and their bounds, against exact rational arithmetic."""

import math
from fractions import Fraction

import pytest
import torch

from tsqp.algebra.fixed_point import MIN_LEVELS, Bounds, quantize_rows
from tsqp.algebra.params import COMPACT, WIDE


def exact_row(row: list[float]) -> tuple[list[int], float]:
    """[P1] with fractions; only the two divisions are rounded to float32, as it says."""
    largest = max(abs(w) for w in row)
    if largest < 2.0**-100:
        return [0] * len(row), 1.0
    scale = torch.tensor(largest, dtype=torch.float32).div(127).item()
    quotients = [torch.tensor(w, dtype=torch.float32).div(scale).item() for w in row]
    return [max(-127, min(127, round(Fraction(q)))) for q in quotients], scale


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30])
def test_rows_are_rounded_half_to_even_by_their_own_scale(size: float) -> None:
    weight_FD = torch.randn(9, 33, generator=torch.Generator().manual_seed(1)) * size
    weight_FD[2] = torch.arange(33) * size / 2  # many halves
    weight_FD[3] = 0
    weight_FD[4] = 2.0**-110
    integers_FD, scale_F = quantize_rows(weight_FD)
    for row, integers, scale in zip(
        weight_FD.tolist(), integers_FD.tolist(), scale_F.tolist(), strict=True
    ):
        assert (integers, scale) == exact_row(row)


def test_blocks_of_rows_do_not_change_the_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_FD = torch.randn(50, 16, generator=torch.Generator().manual_seed(2))
    whole = quantize_rows(weight_FD)
    monkeypatch.setattr("tsqp.algebra.fixed_point.BLOCK_ELEMENTS", 48)
    for a, b in zip(whole, quantize_rows(weight_FD), strict=True):
        assert torch.equal(a, b)


def test_bounds_are_exact() -> None:
    integers_FD = torch.tensor([[127, -127, 0], [1, 2, -3], [0, 0, 0]], dtype=torch.int8)
    assert Bounds.of(integers_FD) == Bounds(l1=254, l2_squared=2 * 127**2, width=3)


def test_the_room_leaves_the_rounding_its_half_step() -> None:
    room = Bounds(l1=1000, l2_squared=20_000, width=50).room(WIDE)
    assert room + 1000 / 2 < (WIDE.p - 1) / 2
    assert room + 1000 / 2 > (WIDE.p - 1) / 2 * (1 - 2.0**-29)


def test_weights_that_add_up_to_p_are_refused() -> None:
    with pytest.raises(ValueError, match="add up to"):
        Bounds(l1=COMPACT.p - 1, l2_squared=2**40, width=131_072).room(COMPACT)


def test_a_group_that_would_keep_too_few_levels_is_refused_by_its_figure() -> None:
    width = 131_072
    deviation = 42  # of normal weights whose largest is 127
    bounds = Bounds(l1=width * 33, l2_squared=width * deviation**2, width=width)
    with pytest.raises(ValueError, match=f"levels, but {MIN_LEVELS} are needed"):
        bounds.room(COMPACT)
    assert bounds.room(WIDE) > 2**29


def test_a_typical_row_keeps_the_levels_that_are_promised() -> None:
    width, rows = 512, 2000
    generator = torch.Generator().manual_seed(3)
    bounds = Bounds.of(quantize_rows(torch.randn(64, width, generator=generator))[0])
    room = bounds.room(COMPACT)
    x_TD = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    scale_T = room / (math.sqrt(bounds.l2_squared) * x_TD.norm(dim=1))
    spans_T = (x_TD.amax(1) - x_TD.amin(1)) * scale_T
    promised = bounds._typical_levels(room)
    assert 0.7 * promised < spans_T.median() < 1.1 * promised
