"""Slopes are those of the powers they come from, and a real run has figures for every width."""

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tsqp.bench.figures import Figure
from tsqp.bench.scaling import NAMES, draw, measure_scaling, parse_widths, slope
from tsqp.errors import UsageError


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0, 2.5])
def test_the_slope_of_a_power_is_its_exponent(power: float) -> None:
    figures = {width: Figure.of([3e-6 * width**power]) for width in (256, 512, 2048)}
    assert slope(figures) == pytest.approx(power)


@pytest.mark.parametrize("text", ["", "256", "256,256", "256,100", "256,x", "0,64", "256,1000000"])
def test_widths_that_cannot_be_measured_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--widths"):
        parse_widths(text)


def test_widths_are_sorted() -> None:
    assert parse_widths("512, 64") == [64, 512]


DRAW = """
from pathlib import Path
from tsqp.bench.figures import Figure
from tsqp.report.plots import _draw
from tsqp.bench.scaling import ScalingResult, draw
figures = {width: Figure.of([1e-6 * width]) for width in (64, 128)}
modes = ("tee", "pad", "lattice", "pads", "lattice masks")
times, slopes = dict.fromkeys(modes, figures), dict.fromkeys(modes, 1.0)
draw(ScalingResult([64, 128], 1, 1, 1, times, slopes, {}, {}), Path("plot.svg"))
print(Path("plot.svg").read_text(), _draw("x", 2.0, lambda axes: axes.plot([1, 2])))
"""


def test_settings_of_plots_in_the_working_folder_have_no_effect(tmp_path: Path) -> None:
    colour = "#123456"
    names = ("axes.facecolor", "figure.facecolor", "savefig.facecolor", "xtick.color")
    lines = [f"{name}: {colour[1:]}" for name in names]
    (tmp_path / "matplotlibrc").write_text("\n".join([*lines, "backend: module://no_module"]))
    drawn = subprocess.run(
        [sys.executable, "-c", DRAW], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert drawn.stdout.count("<svg") == 2
    assert colour not in drawn.stdout


@pytest.mark.slow
def test_a_real_run_has_figures_for_every_width_and_a_plot(tmp_path: Path) -> None:
    result = measure_scaling([64, 128], 32, rounds=1, threads=1)
    assert list(result.cpu_s_per_token) == NAMES
    for figures in result.cpu_s_per_token.values():
        assert all(figures[width].least > 0 for width in (64, 128))
    # Two batches of 2,048 rows of two layers of d and 4d, in 6 bytes a residue.
    assert {width: stock.pad_memory for width, stock in result.lattice_stock.items()} == {
        width: 4096 * 6 * (2 * (4 * width + 2 * width + 9 * width + 5 * width) + width + 512)
        for width in (64, 128)
    }
    assert {stock.classes for stock in result.lattice_stock.values()} == {1}
    draw(result, tmp_path / "plot.svg")
    assert ElementTree.parse(tmp_path / "plot.svg").getroot().tag.endswith("svg")
