"""The tails of noise, against sums, simulation, and known values."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from audit_helpers import COMPACT, LATTICE, WIDE, farthest_from_uniform, uniform

from tsqp.algebra.params import Field
from tsqp.audit import p_values as chance

FIELDS = pytest.mark.parametrize("field", [WIDE, COMPACT, LATTICE])


@pytest.mark.parametrize(("count", "mean"), [(1, 0.001), (3, 0.2), (7, 2.5), (40, 30.0)])
def test_the_poisson_tail_is_the_sum_of_its_terms(count: int, mean: float) -> None:
    below = sum(math.exp(-mean) * mean**k / math.factorial(k) for k in range(count))
    assert chance.poisson_tail(count, mean) == pytest.approx(1 - below, rel=1e-6)


def test_nothing_found_is_no_surprise_and_anything_is_where_nothing_can_be() -> None:
    assert chance.poisson_tail(0, 0.0) == 1.0
    assert chance.poisson_tail(1, 0.0) == 0.0


@pytest.mark.parametrize(
    ("counts", "expected", "p"),
    [([5, 15], [10, 10], 0.025347), ([44, 56], [50, 50], 0.230139), ([3, 8, 19], [10] * 3, 9e-4)],
)
def test_the_chi_square_tail_has_the_values_of_tables(
    counts: list[int], expected: list[int], p: float
) -> None:
    found = chance.chi_square_tail(torch.tensor(counts), torch.tensor(expected).double())
    if len(counts) == 3:
        p = math.exp(-((49 + 4 + 81) / 10) / 2)  # two degrees of freedom: exponential
    assert found == pytest.approx(p, rel=1e-4)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 0.999999])
def test_the_projection_on_a_plane_in_four_dimensions_is_uniform(share: float) -> None:
    assert chance.projection_tail(share, 2, 4) == pytest.approx(1 - share, rel=1e-3)


def test_the_cosine_in_three_dimensions_is_uniform() -> None:
    assert chance.projection_tail(0.64, 1, 3) == pytest.approx(0.2, rel=1e-4)


def test_the_projection_tail_has_its_ends() -> None:
    assert chance.projection_tail(0.0, 5, 64) == pytest.approx(1.0, rel=1e-4)
    assert chance.projection_tail(1.0, 5, 64) == 0.0
    assert chance.projection_tail(1.0001, 5, 64) == 0.0


def test_projections_of_random_rows_have_the_tail_of_theory() -> None:
    generator = torch.Generator().manual_seed(1)
    tails = []
    for _ in range(400):
        rows = torch.rand(20, 64, generator=generator, dtype=torch.float64) - 0.5
        basis = torch.linalg.qr(rows.t()).Q
        vector = torch.randn(64, generator=generator, dtype=torch.float64)
        share = float((basis.t() @ (vector / vector.norm())).square().sum())
        tails.append(chance.projection_tail(share, 20, 64))
    assert farthest_from_uniform(tails) < 1.95


@FIELDS
def test_byte_and_bin_chances_are_those_of_every_residue_counted(field: Field) -> None:
    small = Field(field.name, bits=17, gap=1, digits=3, residue_bytes=3)
    values = torch.arange(small.p)
    for byte in range(3):
        counted = (values >> 8 * byte & 255).bincount(minlength=256) / small.p
        torch.testing.assert_close(
            chance.byte_chances(small, byte), counted.double(), atol=1e-9, rtol=1e-6
        )
    counted = (values * 1000 // small.p).bincount(minlength=1000) / small.p
    torch.testing.assert_close(
        chance.bin_chances(small, 1000), counted.double(), atol=1e-9, rtol=1e-6
    )
    for byte in range(field.residue_bytes):
        assert float(chance.byte_chances(field, byte).sum()) == pytest.approx(1, abs=1e-12)


def test_repeats_come_as_often_as_expected() -> None:
    tiny = Field("wide", bits=10, gap=3, digits=2, residue_bytes=2)
    generator = torch.Generator().manual_seed(2)
    rows = uniform(generator, (50, 20_000), tiny).sort(dim=0).values
    found = float((rows[1:] == rows[:-1]).sum(0).double().mean())
    expected = chance.expected_repeats(50, tiny)
    assert found == pytest.approx(expected, abs=4 * math.sqrt(expected / 20_000))
    assert chance.expected_repeats(3, WIDE) == pytest.approx(3 / WIDE.p, rel=1e-3)


def test_an_audit_without_scipy_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text("[1, 2, 3]")
    code = "import sys; sys.modules['scipy'] = None; from tsqp.cli import main; main()"
    command = [sys.executable, "-c", code, "audit", "seen", "--model", "random:tiny"]
    ended = subprocess.run(
        [*command, "--prompt-ids", "ids.json"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert ended.returncode == 2
    assert ended.stderr == "error: The audit needs SciPy: run pip install 'tsqp[audit]'.\n"
