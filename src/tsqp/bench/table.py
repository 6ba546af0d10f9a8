"""The result of a benchmark: a table for people, then one JSON line for machines."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tsqp.bench.compare import Figure, Result


def print_result(result: Result, *, command: str, out: Path | None) -> None:
    """Print the table to standard error and the JSON to standard output, and write `out`."""
    table = Table(title=f"{result.model}, {result.dtype}, {result.threads} threads a side")
    for column in ("", "transformers", "tee", "open", "tee/transformers", "open/tee"):
        table.add_column(column, justify="right")
    for label, seconds, ratios in (
        (f"prefill {result.prompt_tokens} tokens, s", result.prefill_s, result.prefill_ratio),
        ("decode, s per token", result.decode_s_per_token, result.decode_ratio),
    ):
        modes = [_show(seconds[mode], 4) for mode in ("transformers", "tee", "open")]
        compared = [_show(ratios[pair], 2) for pair in ("tee/transformers", "open/tee")]
        table.add_row(label, *modes, *compared)
    table.caption = (
        f"medians of {result.rounds} rounds (least to most); ratios are taken round by round. "
        f"Ceilings of this machine: {result.ceilings.matmul_flops / 1e9:.0f} GFLOP/s and "
        f"{result.ceilings.read_bytes_per_s / 1e9:.1f} GB/s, hence at best "
        f"{result.prefill_floor_s:.3f} s and {result.decode_floor_s:.4f} s."
    )
    Console(stderr=True, width=140).print(table)
    line = json.dumps({"command": command, **result.as_json()})
    print(line, flush=True)  # first: should the file fail, the figures are not lost
    if out is not None:
        out.write_text(line + "\n")


def _show(figure: Figure, digits: int) -> str:
    return f"{figure.median:.{digits}f} ({figure.least:.{digits}f}–{figure.most:.{digits}f})"
