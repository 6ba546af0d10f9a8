"""`tsqp bench scaling`: how the TEE's work per token grows with the width d of a model.

The linear layers take O(d²) operations per token. The TEE computes them in `tee`; in `pad` it needs
only O(d) operations for each product, plus O(d²) to make a pad or O(d) to make lattice masks. The
slope of log(time) over log(d) shows the exponent.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from safetensors.torch import save_file

from tsqp.algebra.params import FieldName
from tsqp.bench.figures import Figure
from tsqp.bench.host import describe_machine
from tsqp.bench.modes import MODES, LatticeStock, LlmRunner, Sample, Setting
from tsqp.bench.numbers import parse_numbers
from tsqp.bench.output import new_table
from tsqp.errors import UsageError
from tsqp.model.config import tensor_shapes
from tsqp.model.hf_config import from_hf

LAYERS, HEAD_DIM, VOCABULARY = 2, 64, 512
COMPARED: dict[str, tuple[str, str, FieldName]] = {  # name: (mode, dtype, field)
    "tee": ("tee", "float32", "wide"),
    "tee bfloat16": ("tee", "bfloat16", "wide"),
    "pad": ("pad", "float32", "wide"),
    "lattice": ("pad", "float32", "lattice"),
}
MADE_AHEAD = {"pad": "pads", "lattice": "lattice masks"}
NAMES = [*COMPARED, *MADE_AHEAD.values(), *(f"{name} in all" for name in MADE_AHEAD)]
NEW_TOKENS = 2


@dataclass(frozen=True, slots=True)
class ScalingResult:
    """CPU seconds of the TEE per prompt token, for models of different widths.

    Attributes:
        cpu_s_per_token: by name and width. Each name of COMPARED is without the work done ahead;
            that work has a name of its own, and "… in all" is the sum of both.
        lattice_stock: how lattice masks are made, by width.
        slopes: slope of log(time) over log(width), by least squares, for each name.
    """

    widths: list[int]
    prompt_tokens: int
    threads: int
    rounds: int
    cpu_s_per_token: dict[str, dict[int, Figure]]
    slopes: dict[str, float]
    lattice_stock: dict[int, LatticeStock]
    machine: dict[str, str]

    def as_json(self) -> dict[str, object]:
        """Ready for JSON."""
        return asdict(self)


def parse_widths(text: str) -> list[int]:
    """Parse widths such as "256,512".

    Raises:
        UsageError: there are fewer than two, or one is not a multiple of HEAD_DIM.
    """
    widths = parse_numbers(text, "--widths", 2**14)
    if len(widths) < 2 or any(width % HEAD_DIM for width in widths):
        raise UsageError(f"--widths takes two multiples of {HEAD_DIM} or more.")
    return widths


def measure_scaling(
    widths: Sequence[int], prompt_tokens: int, *, rounds: int, threads: int
) -> ScalingResult:
    """Run a prompt through models of two layers, of each width, in each mode."""
    found: dict[str, dict[int, Figure]] = {name: {} for name in NAMES}
    stocks: dict[int, LatticeStock] = {}
    for width in widths:
        samples, stocks[width] = _samples(width, prompt_tokens, rounds, threads)
        for name in COMPARED:
            times = [sample[name].prefill_cpu_s_per_token for sample in samples]
            found[name][width] = Figure.of(times)
            if name in MADE_AHEAD:
                ahead = [sample[name].pads_cpu_s_per_token for sample in samples]
                both = [time + more for time, more in zip(times, ahead, strict=True)]
                found[MADE_AHEAD[name]][width] = Figure.of(ahead)
                found[f"{name} in all"][width] = Figure.of(both)
    return ScalingResult(
        widths=list(widths),
        prompt_tokens=prompt_tokens,
        threads=threads,
        rounds=rounds,
        cpu_s_per_token=found,
        slopes={name: slope(figures) for name, figures in found.items()},
        lattice_stock=stocks,
        machine=describe_machine(),
    )


def slope(figures: dict[int, Figure]) -> float:
    """The slope of log(median) over log(width), by least squares."""
    logs = np.log([[width, figure.median] for width, figure in figures.items()])
    return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])


def tables(result: ScalingResult) -> Iterator[Table]:
    """One row for each width, then the slopes."""
    table = new_table("TEE processor time for a token, µs", "d", *result.cpu_s_per_token)
    for width in result.widths:
        cells = [figures[width] for figures in result.cpu_s_per_token.values()]
        table.add_row(str(width), *map(_cell, cells))
    table.add_row("slope", *(f"{slope:.2f}" for slope in result.slopes.values()))
    yield table


def notes(result: ScalingResult) -> Iterator[str]:
    """How to read the table."""
    yield (
        f"{LAYERS} layers, {result.prompt_tokens} prompt tokens; medians of {result.rounds} rounds "
        "with least and most. Slope: of log time over log d; work that grows as a product does has "
        "2, as a vector does 1. Attention, norms and activation are in all modes alike. Where "
        "nothing else is said, the dtype is float32."
    )


def draw(result: ScalingResult, path: Path) -> None:
    """Write a plot of the result as SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure as Plot

    mpl.rcdefaults()  # ignore a matplotlibrc in the working folder
    figure = Plot(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for (name, figures), marker in zip(result.cpu_s_per_token.items(), cycle("os^v"), strict=False):
        medians = [1e6 * figures[width].median for width in result.widths]
        label = f"{name}: slope {result.slopes[name]:.2f}"
        axes.loglog(result.widths, medians, marker=marker, label=label)
    axes.set_xticks(result.widths, [str(width) for width in result.widths])
    axes.minorticks_off()
    axes.set_xlabel("hidden size d")
    axes.set_ylabel("TEE processor time for a token, µs")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(path, format="svg")


def _cell(figure: Figure) -> str:
    return f"{1e6 * figure.median:.0f} ({1e6 * figure.least:.0f}–{1e6 * figure.most:.0f})"


def _samples(
    width: int, prompt_tokens: int, rounds: int, threads: int
) -> tuple[list[dict[str, Sample]], LatticeStock]:
    """A sample of each mode for each round, without the warm-up round, and the lattice masks."""
    lattice_stock: LatticeStock | None = None
    prompt_ids = [n % VOCABULARY for n in range(prompt_tokens)]
    samples: list[dict[str, Sample]] = [{} for _ in range(rounds + 1)]
    with tempfile.TemporaryDirectory(prefix="tsqp-bench-") as folder:
        _write_model(Path(folder), width, prompt_tokens + NEW_TOKENS)
        for name, (mode, dtype, field) in COMPARED.items():
            setting = Setting(folder, dtype, field, prompt_tokens, NEW_TOKENS, threads)
            # One at a time: several wide models would not fit in memory together.
            with closing(MODES[mode](setting)) as runner:
                for sample in samples:
                    sample[name] = runner.run(prompt_ids, NEW_TOKENS)
                if isinstance(runner, LlmRunner) and runner.lattice_stock is not None:
                    lattice_stock = runner.lattice_stock
    assert lattice_stock is not None  # COMPARED has lattice masks
    return samples[1:], lattice_stock


def _write_model(folder: Path, width: int, positions: int) -> None:
    """Write a checkpoint of this width with random weights."""
    config = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": width // HEAD_DIM,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": positions,
        "tie_word_embeddings": True,
    }
    generator = torch.Generator().manual_seed(width)
    tensors = {
        name: torch.ones(shape)
        if len(shape) == 1
        else 0.02 * torch.randn(shape, generator=generator)
        for name, shape in tensor_shapes(from_hf(config, None)).items()
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").touch()
