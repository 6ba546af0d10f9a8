"""Tables of `tsqp bench trusted-side`."""

import math
from collections.abc import Iterator

from rich.table import Table

from tsqp.bench.output import new_table
from tsqp.bench.trusted_side_figures import Prediction, TrustedSideResult

US = 1e-6
MS = 1e-3


def _cell(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def tables(result: TrustedSideResult) -> Iterator[Table]:
    """For all layers of the geometry: the times of both phases, and those of masks."""
    table = new_table(
        f"Trusted side of {result.model}, {result.dtype}, {result.threads} threads; a replay "
        "worker answers at once",
        "", f"prefill of {result.prompt_tokens} tokens, s", "processor, s",
        "decode, ms a token", "processor, ms", "calls", "µs a call", "of it waiting",
    )  # fmt: skip
    for mode, floor in result.floors.items():
        table.add_row(
            mode,
            _cell(floor.prefill_s, 3),
            _cell(floor.prefill_cpu_s, 3),
            _cell(floor.decode_s / MS, 2),
            _cell(floor.decode_cpu_s / MS, 2),
            _cell(floor.calls, 0),
            _cell(floor.decode_s / floor.calls / US, 0),
            _cell(floor.decode_wait_s / floor.calls / US, 0),
        )
    yield table
    table = new_table(
        "Masks, and the same including them",
        "", "masks, ms a token", "processor, ms", "prefill, s", "decode, ms a token",
    )  # fmt: skip
    for mode, floor in result.floors.items():
        if floor.masks_s:
            table.add_row(
                mode,
                _cell(floor.masks_s / MS, 2),
                _cell(floor.masks_cpu_s / MS, 2),
                _cell(floor.prefill_s + result.prompt_tokens * floor.masks_s, 3),
                _cell((floor.decode_s + floor.masks_s) / MS, 2),
            )
    yield table
    if result.prediction is not None:
        yield _predicted(result, result.prediction)


def _predicted(result: TrustedSideResult, prediction: Prediction) -> Table:
    table = new_table(
        f"Predicted with a simulated {prediction.gpu.name}, and {result.threads} threads here",
        "", "prefill, s", "by the formula, s", "tokens a second", "by the formula",
        "with making masks",
    )  # fmt: skip
    for mode, simulated in prediction.simulated.items():
        floor, device = result.floors[mode], prediction.device[mode]
        longest = max(floor.prefill_s, device.prefill_s)
        masks_s = floor.masks_s
        table.add_row(
            mode,
            _cell(simulated.prefill_s, 3),
            f"{_cell(longest, 3)} to {_cell(floor.prefill_s + device.prefill_s, 3)}",
            _cell(1 / simulated.decode_s, 1),
            _cell(1 / (floor.decode_s + device.decode_s), 1),
            _cell(1 / (simulated.decode_s + masks_s), 1) if masks_s else "",
        )
    alone = prediction.gpu_alone
    table.add_row("GPU alone", "", _cell(alone.prefill_s, 3), "", _cell(1 / alone.decode_s, 1), "")
    return table


def notes(result: TrustedSideResult) -> Iterator[str]:
    """How it was measured, and what was assumed."""
    yield (
        f"Medians of {result.rounds} rounds on {result.machine['cpu']}. The weights are zeros, so "
        "that zeros are the right answers; masks and checks are as always. Masks are made ahead "
        "of a run; while a run takes them, new ones may be made on the same cores. The second "
        "table adds the time to make the masks of every token when nothing else runs."
    )
    if result.is_extrapolated:
        few, many = result.layers
        yield (
            f"Assumption: {few} and {many} layers were measured, and every figure grows with the "
            f"number of layers on a straight line to all {result.all_layers}. A figure that does "
            "not grow from one depth to the other is left out: measure depths farther apart."
        )
    if (prediction := result.prediction) is not None:
        gpu = prediction.gpu
        yield (
            f"A prediction, no measurement of a GPU: {gpu.name} with {gpu.efficiency:.0%} of "
            f"{gpu.read_bytes_per_s / 1e12:.2f} TB/s of memory, {gpu.int8_ops / 1e12:.0f} Top/s of "
            f"int8, {gpu.bf16_flops / 1e12:.0f} TFLOP/s of bfloat16 and "
            f"{gpu.link_bytes_per_s / 1e9:.0f} GB/s of the link, and {gpu.call_s / US:.0f} µs a "
            "call. The formula adds the GPU's times to the floor above; its first figure for "
            'prefill is if both overlap completely. "GPU alone": products only, in bfloat16.'
        )
        errors = (
            f"{wait} µs by {median / US:.0f} ({worst / US:.0f})"
            for wait, (median, worst) in prediction.waiting_errors.items()
        )
        if prediction.weight_bytes > gpu.memory_bytes:
            yield (
                f"The int8 weights take {prediction.weight_bytes / 1e9:.0f} GB, and those of "
                f"`open` twice as much, but this GPU has {gpu.memory_bytes / 1e9:.0f} GB."
            )
        elif 2 * prediction.weight_bytes > gpu.memory_bytes:
            yield (
                f"The weights of `open` take {2 * prediction.weight_bytes / 1e9:.0f} GB, but this "
                f"GPU has {gpu.memory_bytes / 1e9:.0f} GB; the int8 weights fit."
            )
        yield (
            "Simulated waits sleep, and are too long here, in the median (and the largest of 100), "
            f"for {', '.join(errors)} µs. A replay worker polls on one of these cores."
        )
