"""Tables of `tsqp bench MODEL`, with one row for each mode."""

from collections.abc import Iterator

from rich.table import Table

from tsqp.bench.compare import Result
from tsqp.bench.output import new_table, show

MS = 1e-3
MB = 1e6


def tables(result: Result) -> Iterator[Table]:
    """A table for each part of the benchmark that was run."""
    yield _times(result)
    if result.prefill_ratio:
        yield _ratios(result)
    yield _work(result)
    if result.sustained:
        yield _sustained(result)
    if result.starts:
        yield _starts(result)


def notes(result: Result) -> Iterator[str]:
    """The meaning of the columns, and how they were measured."""
    c = result.ceilings
    yield (
        f"Medians of {result.rounds} rounds (lowest to highest); ratios are taken within a round. "
        f"Best rates of this machine: {c.matmul_flops / 1e9:.0f} GFLOP/s, "
        f"{c.int8_ops / 1e9:.0f} Gop/s of int8, {c.read_bytes_per_s / 1e9:.1f} GB/s read, "
        f'{c.copy_bytes_per_s / 1e9:.1f} GB/s copied; "at best" is what these rates allow.'
    )
    if (d := result.device_ceilings) is not None:
        yield (
            f"Best rates of {d.name}: {d.matmul_flops / 1e12:.0f} TFLOP/s, "
            f"{d.int8_ops / 1e12:.0f} Top/s of int8, {d.read_bytes_per_s / 1e9:.0f} GB/s read, "
            f"{d.copy_bytes_per_s / 1e9:.1f} GB/s to it or from it."
        )
    for mode, rows in result.stock_rows.items():
        yield f"{mode}: pads for {rows} tokens are ready before each run."
        if rows < result.setting.forwards:
            yield f"A run takes {result.setting.forwards}: there was not enough memory for more."
    for mode, stock in result.lattice_stock.items():
        yield (
            f"{mode}: lattice masks are made in {stock.classes} classes, for a stock of "
            f"{stock.pad_memory / MB:.0f} MB."
        )


def _times(result: Result) -> Table:
    s = result.setting
    several = f"{s.batch} × " if s.batch > 1 else ""
    table = new_table(
        f"{s.model}, {s.dtype}, {s.field}, {s.threads} threads a side, workers: {s.device}",
        "", f"prefill {several}{s.prompt_tokens} tokens, s", "at best",
        "decode, ms a token", "at best",
    )  # fmt: skip
    prefill, decode = result.figures["prefill_s"], result.figures["decode_s_per_token"]
    for mode, bound in result.floors.items():
        table.add_row(
            mode,
            show(prefill[mode], 3),
            f"{bound.prefill_s:.3f}",
            show(decode[mode], 1, MS),
            f"{bound.decode_s / MS:.1f}",
        )
    return table


def _ratios(result: Result) -> Table:
    table = new_table("Ratios", "", "prefill", "decode")
    for pair, prefill in result.prefill_ratio.items():
        table.add_row(pair, show(prefill, 2), show(result.decode_ratio[pair], 2))
    return table


def _work(result: Result) -> Table:
    table = new_table(
        "Processor time of the TEE, and traffic",
        "", "ms per prompt token", "ms per new token", "pads, ms per token", "workers, s per run",
        "calls per forward", "MB per run", "socket kB",
    )  # fmt: skip
    figures = result.figures
    for mode in result.floors:
        table.add_row(
            mode,
            show(figures["prefill_cpu_s_per_token"][mode], 2, MS),
            show(figures["decode_cpu_s_per_token"][mode], 1, MS),
            show(figures["pads_cpu_s_per_token"][mode], 2, MS),
            f"{figures['worker_s'][mode].median:.2f}",
            f"{figures['calls_per_forward'][mode].median:.0f}",
            f"{figures['tensor_bytes'][mode].median / MB:.0f}",
            f"{figures['socket_bytes'][mode].median / 1e3:.0f}",
        )
    return table


def _sustained(result: Result) -> Table:
    table = new_table(
        "Pads made meanwhile, from an empty stock",
        "", "tokens", "tokens per second", "processor, ms per token", "of it pads", "pads ahead",
        "stock, tokens",
    )  # fmt: skip
    for mode, found in result.sustained.items():
        table.add_row(
            mode,
            f"{found.tokens:,}",
            f"{1 / found.seconds_per_token:.2f}",
            f"{found.cpu_s_per_token / MS:.1f}",
            f"{found.pads_cpu_s_per_token / MS:.1f}",
            f"{found.ahead:.0%}",
            f"{found.stock_rows_before:.0f} → {found.stock_rows_after:.0f}",
        )
    return table


def _starts(result: Result) -> Table:
    table = new_table(
        "Starts, each in a separate process",
        "", "cache", "ready after, s", "of it loading", "stock of pads, s", "peak MB",
        "peak MB of workers",
    )  # fmt: skip
    for start in result.starts:
        table.add_row(
            start.mode,
            start.cache,
            f"{start.process_s:.1f}",
            f"{start.load_s:.1f}",
            f"{start.stock_s:.1f}",
            f"{start.tee_bytes / MB:.0f}",
            " ".join(f"{each / MB:.0f}" for each in start.workers_bytes),
        )
    return table
