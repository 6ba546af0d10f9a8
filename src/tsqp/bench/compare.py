"""`tsqp bench MODEL`: prefill and decode speed. Each round runs every mode once."""

import secrets
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tsqp.algebra.params import FIELDS, LATTICE, FieldName
from tsqp.bench.figures import Figure, ratios
from tsqp.bench.hardware_limits import (
    DeviceLimits,
    HardwareLimits,
    measure_device_limits,
    measure_limits,
)
from tsqp.bench.host import describe_machine
from tsqp.bench.lower_bounds import LowerBound, lower_bound
from tsqp.bench.modes import MODES, LatticeStock, LlmRunner, Runner, Sample, Setting
from tsqp.bench.startup import Start, measure_starts
from tsqp.bench.sustained import Sustained, sustain
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.checkpoint.weights import parse_dtype
from tsqp.errors import UsageError
from tsqp.model.config import ModelConfig

Samples = dict[str, list[Sample]]  # by mode


@dataclass(frozen=True, slots=True)
class Result:
    """All figures of one benchmark run, in seconds and bytes; ratios have no unit.

    Attributes:
        figures: for each quantity of `Sample`, its figure by mode.
        stock_rows: pads of each group in stock before a run, for each mode that has a stock.
        lattice_stock: how lattice masks are made, for each mode that has them.
        device_ceilings: None if the workers compute on the CPU.
    """

    setting: Setting
    rounds: int
    figures: dict[str, dict[str, Figure]]
    prefill_ratio: dict[str, Figure]
    decode_ratio: dict[str, Figure]
    stock_rows: dict[str, int]
    lattice_stock: dict[str, LatticeStock]
    sustained: dict[str, Sustained]
    starts: list[Start]
    ceilings: HardwareLimits
    device_ceilings: DeviceLimits | None
    floors: dict[str, LowerBound]
    machine: dict[str, str]

    def as_json(self) -> dict[str, object]:
        """A dict for JSON: the setting is merged into the top level, and paths are left out."""
        values = asdict(self)
        setting = values.pop("setting") | {"model": Path(self.setting.model).name}
        return {**setting, **values.pop("figures"), **values}


def compare(
    setting: Setting, modes: list[str], *, rounds: int, sustained: int, starts: bool
) -> Result:
    """Measure the modes.

    Args:
        setting: its dtype may be "auto".
        modes: some of MODES.
        rounds: number of rounds, after one warm-up round that is not counted.
        sustained: number of tokens to generate from an empty stock of pads; 0 for none.
        starts: whether to measure start-up too, in a new process for each mode.

    Raises:
        UsageError: the setting or a mode cannot be measured.
        ModelError: the checkpoint cannot be used.
    """
    if setting.field == LATTICE.name and "shares" in modes:
        raise UsageError(
            "The mode shares has no --field lattice, as it needs no masks; leave one of them out."
        )
    torch.set_num_threads(setting.threads)
    checkpoint = open_checkpoint(setting.model)
    checkpoint.close()
    config = checkpoint.config
    _check(setting, config)
    dtype = parse_dtype(setting.dtype, config)
    spelled_out = {**asdict(setting), "dtype": str(dtype).removeprefix("torch.")}
    setting = Setting(**spelled_out)
    with ExitStack() as stack:
        runners: dict[str, Runner] = {}
        for mode in modes:
            runners[mode] = MODES[mode](setting)
            stack.callback(runners[mode].close)
        samples = _rounds(runners, setting, config, rounds)
        with_stock = {
            mode: runner
            for mode, runner in runners.items()
            if isinstance(runner, LlmRunner) and runner.stock_rows
        }
        stock_rows = {mode: runner.stock_rows for mode, runner in with_stock.items()}
        lattice_stock = {
            mode: runner.lattice_stock
            for mode, runner in runners.items()
            if isinstance(runner, LlmRunner) and runner.lattice_stock is not None
        }
        going_on = {
            mode: sustain(runner, sustained) for mode, runner in with_stock.items() if sustained
        }
    limits = measure_limits(dtype)
    device = None
    if setting.device != "cpu":
        device = measure_device_limits(torch.device(setting.device), dtype)
    return Result(
        setting=setting,
        rounds=rounds,
        figures=_figures(samples),
        prefill_ratio=ratios(_values(samples, "prefill_s")),
        decode_ratio=ratios(_values(samples, "decode_s_per_token")),
        stock_rows=stock_rows,
        lattice_stock=lattice_stock,
        sustained=going_on,
        starts=list(measure_starts(modes, setting)) if starts else [],
        ceilings=limits,
        device_ceilings=device,
        floors={mode: lower_bound(mode, config, setting, limits, device) for mode in modes},
        machine=describe_machine(),
    )


def default_modes(device: str, field: FieldName) -> list[str]:
    """All modes of a field. Workers on a CPU need no transformers run of their own."""
    left_out = {"transformers-worker"} if device == "cpu" else set()
    left_out |= {"shares"} if field == LATTICE.name else set()
    return [mode for mode in MODES if mode not in left_out]


def parse_modes(text: str) -> list[str]:
    """Parse the names of modes, such as "tee,pad".

    Raises:
        UsageError: a mode does not exist, or none is given.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in MODES:
            raise UsageError(f"There is no such mode to compare; choose {', '.join(MODES)}.")
    if not names:
        raise UsageError(f"--modes names nothing to compare; choose {', '.join(MODES)}.")
    return names


def parse_field(name: str) -> FieldName:
    """Check the name of a field. `auto` is refused: the results of one run are for one field.

    Raises:
        UsageError: there is no such field.
    """
    if name not in FIELDS:
        *names, last = FIELDS
        raise UsageError(f"`tsqp bench` measures one field; choose {', '.join(names)} or {last}.")
    return FIELDS[name].name


def _check(setting: Setting, config: ModelConfig) -> None:
    if setting.prompt_tokens + setting.new_tokens > config.max_positions:
        raise UsageError(
            f"{setting.prompt_tokens} prompt and {setting.new_tokens} new tokens are more than the "
            f"context of {config.max_positions} tokens; ask for fewer."
        )


def _rounds(
    runners: dict[str, Runner], setting: Setting, config: ModelConfig, rounds: int
) -> Samples:
    prompt_ids = [secrets.randbelow(config.vocab_size) for _ in range(setting.prompt_tokens)]
    samples: Samples = {mode: [] for mode in runners}
    for number in range(rounds + 1):
        for mode, runner in runners.items():
            sample = runner.run(prompt_ids, setting.new_tokens)
            if number > 0:
                samples[mode].append(sample)
    return samples


def _figures(samples: Samples) -> dict[str, dict[str, Figure]]:
    names = Sample.__dataclass_fields__
    return {
        name: {mode: Figure.of(values) for mode, values in _values(samples, name).items()}
        for name in names
    }


def _values(samples: Samples, name: str) -> dict[str, list[float]]:
    return {mode: [asdict(sample)[name] for sample in some] for mode, some in samples.items()}
