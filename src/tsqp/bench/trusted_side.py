"""`tsqp bench trusted-side`: what the trusted side takes if the worker answers at once.

This is the floor that the fastest worker leaves. A replay worker gives the answers, see
`replay_backend`. A model that does not fit into memory is measured with fewer layers, at two
depths, from which the figures are extrapolated to all layers.
"""

import secrets
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from time import perf_counter, process_time

from tsqp.algebra.params import DEGREE, FIELDS, LATTICE, FieldName
from tsqp.bench.gpu_prediction import alone, device_times
from tsqp.bench.host import describe_machine
from tsqp.bench.modes import TIMEOUT_S, stock_bytes
from tsqp.bench.replay_session import ReplayModel, ReplayProcess, ReplaySession
from tsqp.bench.simulated_gpu import Gpu, find_gpu, waiting_error_s
from tsqp.bench.trusted_side_figures import Floor, Prediction, TrustedSideResult, at_depth
from tsqp.bench.zero_model import ZeroCheckpoint
from tsqp.checkpoint.footprint import trusted_bytes
from tsqp.checkpoint.memory import available_bytes
from tsqp.checkpoint.quantize import integer_bytes
from tsqp.checkpoint.weights import parse_dtype
from tsqp.errors import UsageError
from tsqp.model.config import ModelConfig, linear_groups
from tsqp.runtime.options import WORKER_HINTS, Options
from tsqp.tee.crypto.lattice import class_rows
from tsqp.tee.crypto.pad_pool import PadPool

MODES: dict[str, FieldName | None] = {  # the field of residues; None in `open`
    "open": None,
    "wide": "wide",
    "compact": "compact",
    "lattice": "lattice",
}
LATTICE_ROWS = 2 * DEGREE  # two whole batches: one is used while the other is made
CHUNK = 512  # tokens of a step, as by default
WAITS_US = (50, 200, 1000)
FREE_PART = 0.6  # of the free memory, which a model may take


@dataclass(frozen=True, slots=True)
class Setting:
    """What all modes share; see `TrustedSideResult`."""

    dtype: str
    prompt_tokens: int
    new_tokens: int
    rounds: int
    threads: int

    @property
    def forwards(self) -> int:
        """Tokens that one run feeds to the model: all but the last."""
        return self.prompt_tokens + self.new_tokens - 1


def measure_trusted_side(
    model: str,
    modes: Sequence[str],
    *,
    dtype: str,
    layers: Sequence[int] | None,
    gpu: str | None,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    threads: int,
) -> TrustedSideResult:
    """Measure each mode with a replay worker.

    Args:
        model: "random:NAME".
        modes: some of MODES.
        dtype: may be "auto".
        layers: the depths to measure: one or two. None: all layers if they fit into memory, and
            otherwise two depths that do.
        gpu: one of `simulated_gpu.GPUS`, to predict runs with it; None for the floor only.
        rounds: number of measured runs, after one that is not counted.

    Raises:
        UsageError: the setting cannot be measured.
        WorkerError: the replay worker does not start.
    """
    whole = ZeroCheckpoint.parse(model)
    predicted = None if gpu is None else find_gpu(gpu)
    name = str(parse_dtype(dtype, whole.config)).removeprefix("torch.")
    setting = Setting(name, prompt_tokens, new_tokens, rounds, threads)
    if prompt_tokens + new_tokens > whole.config.max_positions:
        raise UsageError(
            f"{prompt_tokens} prompt and {new_tokens} new tokens are more than the context of "
            f"{whole.config.max_positions} tokens; ask for fewer."
        )
    depths = _depths(whole, modes, setting) if layers is None else sorted(set(layers))
    _check_depths(depths, whole.layers)
    measured: dict[str, dict[int, Floor]] = {mode: {} for mode in modes}
    simulated: dict[str, dict[int, Floor]] = {mode: {} for mode in modes}
    for depth in depths:
        checkpoint = ZeroCheckpoint.parse(model, depth)
        with ExitStack() as stack:
            workers = [ReplayProcess(checkpoint, name, each) for each in dict.fromkeys((None, gpu))]
            for worker in workers:
                stack.callback(worker.close)
                worker.await_ready()
            for mode in modes:
                endpoints = [worker.endpoint for worker in workers]
                found = _measure(checkpoint, mode, setting, endpoints)
                measured[mode][depth], simulated[mode][depth] = found[0], found[-1]
    return TrustedSideResult(
        model=model,
        dtype=name,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
        threads=threads,
        all_layers=whole.layers,
        layers=depths,
        measured=measured,
        floors=_at_depth(measured, whole.layers),
        prediction=None
        if predicted is None
        else _predict(predicted, _at_depth(simulated, whole.layers), whole.config, setting),
        machine=describe_machine(),
    )


def _at_depth(measured: Mapping[str, Mapping[int, Floor]], layers: int) -> dict[str, Floor]:
    return {mode: at_depth(found, layers) for mode, found in measured.items()}


def _predict(
    gpu: Gpu, simulated: dict[str, Floor], config: ModelConfig, setting: Setting
) -> Prediction:
    itemsize = parse_dtype(setting.dtype, config).itemsize
    fields_of = {
        mode: None if (name := MODES[mode]) is None else FIELDS[name] for mode in simulated
    }
    return Prediction(
        gpu=gpu,
        simulated=simulated,
        device={
            mode: device_times(gpu, config, field, setting.prompt_tokens, CHUNK, itemsize)
            for mode, field in fields_of.items()
        },
        weight_bytes=integer_bytes(config),
        gpu_alone=alone(gpu, config, setting.prompt_tokens),
        waiting_errors={us: waiting_error_s(us * 1e-6) for us in WAITS_US},
    )


def parse_modes(text: str) -> list[str]:
    """Parse the names of modes, such as "open,wide".

    Raises:
        UsageError: a mode does not exist, or none is given.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names or any(name not in MODES for name in names):
        raise UsageError(f"--modes takes some of {', '.join(MODES)}, separated by commas.")
    return names


def _check_depths(depths: Sequence[int], all_layers: int) -> None:
    if len(depths) > 2 or (len(depths) == 1 and depths[0] != all_layers):
        raise UsageError(
            f"--layers takes two different numbers of layers, or all {all_layers} layers."
        )


def _depths(whole: ZeroCheckpoint, modes: Sequence[str], setting: Setting) -> list[int]:
    """All layers if they fit into memory; otherwise the most that fit, and half as many."""
    room = FREE_PART * available_bytes()
    for depth in range(whole.layers, 1, -1):
        config = ZeroCheckpoint(whole.random, depth).config
        if max(_bytes(config, mode, setting) for mode in modes) <= room:
            return [depth] if depth == whole.layers else [max(1, depth // 2), depth]
    raise UsageError(
        "There is not enough memory for two layers of this model; ask for fewer prompt tokens."
    )


def _bytes(config: ModelConfig, mode: str, setting: Setting) -> int:
    """What the trusted side needs at least, with masks ahead for one run."""
    field, dtype = MODES[mode], parse_dtype(setting.dtype, config)
    if field is None:
        return 0
    weights = trusted_bytes(config, dtype, "pad", lattice=field == LATTICE.name)
    return weights + stock_bytes(config, stocked_rows(field, setting.forwards), field)


def stocked_rows(field: FieldName, rows: int) -> int:
    """The rows of the smallest stock that is never without a mask in a run of `rows` tokens.

    Lattice masks are stocked in whole classes, of which two fit.
    """
    if field != LATTICE.name:
        return rows
    of_a_class = class_rows(rows)
    return max(2 * of_a_class, -(-rows // of_a_class) * of_a_class)


def _measure(
    checkpoint: ZeroCheckpoint, mode: str, setting: Setting, endpoints: Sequence[str]
) -> list[Floor]:
    """The figures with each of some replay workers."""
    model = ReplayModel(checkpoint, _options(checkpoint.config, mode, setting, endpoints))
    prompt_ids = [secrets.randbelow(checkpoint.config.vocab_size)] * setting.prompt_tokens
    floors: list[Floor] = []
    masks = 0.0, 0.0
    for number in range(len(endpoints)):
        with model.session(number) as session:
            if session.pads is not None:
                session.pads.hold()
            runs = [
                _run(session, prompt_ids, setting.new_tokens) for _ in range(setting.rounds + 1)
            ]
            if number == 0:  # they are the same with any worker
                masks = _masks(session.pads, checkpoint.config)
        floor = Floor.median(runs[1:])
        floors.append(replace(floor, masks_s=masks[0], masks_cpu_s=masks[1]))
    return floors


def _options(config: ModelConfig, mode: str, setting: Setting, endpoints: Sequence[str]) -> Options:
    common = Options(
        privacy="open",
        worker=tuple(endpoints),
        prefill_chunk=CHUNK,
        dtype=setting.dtype,
        threads=setting.threads,
        timeout=TIMEOUT_S,
    )
    field = MODES[mode]
    if field is None:
        return common
    rows, is_lattice = stocked_rows(field, setting.forwards), field == LATTICE.name
    most = stock_bytes(config, max(rows, LATTICE_ROWS) if is_lattice else rows, field)
    return replace(
        common,
        privacy="pad",
        field=field,
        pad_memory=max(stock_bytes(config, rows, field), min(most, available_bytes() // 3)),
        hints=WORKER_HINTS if is_lattice else None,
    )


def _run(session: ReplaySession, prompt_ids: Sequence[int], new_tokens: int) -> Floor:
    """One run from a full stock, which is held: no mask is made meanwhile.

    Raises:
        UsageError: the stock was too small for it.
    """
    made_rows = 0
    if session.pads is not None:
        session.pads.fill()
        made_rows = session.pads.stats.made_rows
    stats = session.stats
    stats.reset()
    wait_s, calls = 0.0, 0

    def note() -> None:
        nonlocal wait_s, calls
        wait_s, calls = stats.wait_s, session.calls()

    session.run(prompt_ids, new_tokens, note)
    if session.pads is not None and session.pads.stats.made_rows != made_rows:
        raise UsageError(
            "Memory is too short for the masks of one run, so some were made during it; ask for "
            "fewer tokens or layers."
        )
    new = new_tokens - 1
    return Floor(
        prefill_s=stats.prefill_s,
        prefill_wait_s=wait_s,
        prefill_cpu_s=stats.prefill_cpu_s,
        decode_s=stats.decode_s / new,
        decode_wait_s=(stats.wait_s - wait_s) / new,
        decode_cpu_s=stats.decode_cpu_s / new,
        masks_s=0.0,
        masks_cpu_s=0.0,
        calls=(session.calls() - calls) / new,
    )


def _masks(pads: PadPool | None, config: ModelConfig) -> tuple[float, float]:
    """Wall and processor seconds to make one row of every group, in a stock that was full before.

    This thread makes all of them. The stock was full, because memory that is used for the first
    time costs more.
    """
    if pads is None:
        return 0.0, 0.0
    pads.fill()
    made = pads.stats.made_rows
    pads.discard()
    began, cpu_began = perf_counter(), process_time()
    pads.fill()
    wall_s, cpu_s = perf_counter() - began, process_time() - cpu_began
    per_row = len(linear_groups(config)) / (pads.stats.made_rows - made)
    return wall_s * per_row, cpu_s * per_row
