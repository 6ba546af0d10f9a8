"""Tables of `tsqp bench trusted-side`."""

from collections.abc import Iterator

from rich.table import Table

from tsqp.bench.output import new_table
from tsqp.bench.trusted_side import TrustedSideResult

US = 1e-6
MS = 1e-3


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
            f"{floor.prefill_s:.3f}",
            f"{floor.prefill_cpu_s:.3f}",
            f"{floor.decode_s / MS:.2f}",
            f"{floor.decode_cpu_s / MS:.2f}",
            f"{floor.calls:.0f}",
            f"{floor.decode_s / floor.calls / US:.0f}",
            f"{floor.decode_wait_s / floor.calls / US:.0f}",
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
                f"{floor.masks_s / MS:.2f}",
                f"{floor.masks_cpu_s / MS:.2f}",
                f"{floor.prefill_s + result.prompt_tokens * floor.masks_s:.3f}",
                f"{(floor.decode_s + floor.masks_s) / MS:.2f}",
            )
    yield table


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
            f"number of layers on a straight line to all {result.all_layers}."
        )
