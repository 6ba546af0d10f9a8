"""`tsqp bench` and its subcommands."""

import os
from pathlib import Path
from typing import Annotated

import typer

from tsqp.cli.app import app
from tsqp.cli.flags import BenchThreads, Debug, Model, Out, Quiet
from tsqp.cli.with_options import with_options


@app.command()
@with_options("dtype", "field", "device")
def bench(
    *,
    model: Model,
    modes: Annotated[
        str | None,
        typer.Option(help="Modes to compare, separated by commas. The default is all of them."),
    ] = None,
    dtype: str,
    field: str,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of each prompt, in tokens.")] = (
        1024
    ),
    new_tokens: Annotated[
        int, typer.Option(min=2, help="Number of tokens to generate for each prompt.")
    ] = 33,
    rounds: Annotated[
        int, typer.Option(min=1, help="Number of measured rounds, after a warm-up.")
    ] = 5,
    sustained: Annotated[
        int,
        typer.Option(
            min=0,
            help="Also generate this many tokens from an empty stock of pads. 0 skips this.",
        ),
    ] = 0,
    starts: Annotated[
        bool, typer.Option("--starts", help="Also measure start-up time and memory of each mode.")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="Number of prompts to run at once.")] = 1,
    device: str,
    threads: BenchThreads = None,
    out: Out = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure the modes. Also: bench accuracy, attention, kernels, scaling, serve, transport,
    trusted-side."""
    from tsqp.bench import output

    output.check_out(out)
    from tsqp.bench.compare import compare, default_modes, parse_field, parse_modes
    from tsqp.bench.mode_table import notes, tables
    from tsqp.bench.modes import Setting
    from tsqp.gpu.backends import parse_device

    setting = Setting(
        model=model,
        dtype=dtype,
        field=parse_field(field),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        threads=threads or os.cpu_count() or 1,
        device=str(parse_device(device)),
        batch=batch,
    )
    chosen = default_modes(setting.device, setting.field) if modes is None else parse_modes(modes)
    result = compare(setting, chosen, rounds=rounds, sustained=sustained, starts=starts)
    output.print_result(result.as_json(), tables(result), notes(result), out)


@app.command("bench-kernels")
def bench_kernels(
    widths: Annotated[
        str | None,
        typer.Option(
            help="Measure layers of these widths, separated by commas, with as many outputs and "
            "with four times as many, 64 tokens a call. The default is the layers of SmolLM2-135M."
        ),
    ] = None,
    out: Out = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure the TEE's masking and checking loops, on one core, per element."""
    from tsqp.bench import output

    output.check_out(out)
    from tsqp.bench.kernel_times import WIDE_TOKENS, measure_kernels, notes, parse_widths, tables

    if widths is None:
        result = measure_kernels()
    else:
        result = measure_kernels(parse_widths(widths), WIDE_TOKENS)
    output.print_result(result.as_json(), tables(result), notes(result), out)


@app.command("bench-attention")
@with_options("dtype")
def bench_attention(
    *,
    model: Model,
    dtype: str,
    sequences: Annotated[
        str, typer.Option(help="Numbers of sequences, separated by commas.")
    ] = "1,16,64",
    tokens: Annotated[
        str, typer.Option(help="Lengths of the sequences, in tokens, separated by commas.")
    ] = "128,1024,4096",
    threads: BenchThreads = None,
    out: Out = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure attention of one token over its keys and values, against the memory rate."""
    from tsqp.bench import output

    output.check_out(out)
    from tsqp.bench.attention_times import (
        MOST_SEQUENCES,
        MOST_TOKENS,
        measure_attention,
        notes,
        tables,
    )
    from tsqp.bench.numbers import parse_numbers

    result = measure_attention(
        model,
        dtype,
        parse_numbers(sequences, "--sequences", MOST_SEQUENCES),
        parse_numbers(tokens, "--tokens", MOST_TOKENS),
        threads=threads or os.cpu_count() or 1,
    )
    output.print_result(result.as_json(), tables(result), notes(result), out)


@app.command("bench-transport")
def bench_transport(
    calls: Annotated[
        int, typer.Option(min=100, help="Number of calls to make over each transport.")
    ] = 2000,
    out: Out = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure a call to a worker on this machine over every transport."""
    from tsqp.bench import output

    output.check_out(out)
    from tsqp.bench.transports import measure_transports, notes, tables

    result = measure_transports(calls)
    output.print_result(result.as_json(), tables(result), notes(result), out)


@app.command("bench-trusted-side")
@with_options("dtype")
def bench_trusted_side(
    *,
    model: Annotated[
        str, typer.Argument(help="Geometry of the model: random:NAME.", show_default=False)
    ],
    modes: Annotated[
        str, typer.Option(help="Modes to measure, separated by commas: open, or the field of pad.")
    ] = "open,wide,compact,lattice",
    dtype: str,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Measure two numbers of layers, such as 2,4, and extrapolate to all. The default "
            "is all layers if they fit into memory."
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="Also predict runs with a simulated GPU: h100-pcie, h100-sxm or h200-sxm.",
        ),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt, in tokens.")] = (
        1024
    ),
    new_tokens: Annotated[int, typer.Option(min=2, help="Number of tokens to generate.")] = 33,
    rounds: Annotated[
        int, typer.Option(min=1, help="Number of measured rounds, after a warm-up.")
    ] = 3,
    threads: BenchThreads = None,
    out: Out = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure the TEE's own time, with a replay worker that answers at once."""
    from tsqp.bench import output

    output.check_out(out)
    from tsqp.bench.numbers import parse_numbers
    from tsqp.bench.trusted_side import measure_trusted_side, parse_modes
    from tsqp.bench.trusted_side_table import notes, tables

    result = measure_trusted_side(
        model,
        parse_modes(modes),
        dtype=dtype,
        layers=None if layers is None else parse_numbers(layers, "--layers", 1000),
        gpu=gpu,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
        threads=threads or os.cpu_count() or 1,
    )
    output.print_result(result.as_json(), tables(result), notes(result), out)


@app.command("bench-scaling")
def bench_scaling(
    widths: Annotated[
        str, typer.Option(help="Hidden sizes of the models, separated by commas.")
    ] = "256,512,1024,2048",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt, in tokens.")] = (
        256
    ),
    rounds: Annotated[
        int, typer.Option(min=1, help="Number of measured rounds, after a warm-up.")
    ] = 5,
    threads: BenchThreads = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw the results in this new SVG file.")
    ] = None,
    out: Out = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure how the TEE's own time grows with model width, in tee and in pad."""
    from tsqp.bench import output

    output.check_out(out)
    output.check_out(plot, "--plot")
    from tsqp.bench.scaling import draw, measure_scaling, notes, parse_widths, tables

    count = threads or os.cpu_count() or 1
    result = measure_scaling(parse_widths(widths), prompt_tokens, rounds=rounds, threads=count)
    output.print_result(result.as_json(), tables(result), notes(result), out)
    if plot is not None:
        draw(result, plot)


@app.command("bench-accuracy")
def bench_accuracy(
    model: Model,
    text: Annotated[Path, typer.Option(help="A UTF-8 text file to score.", show_default=False)],
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Score only this many tokens from the start.")
    ] = None,
    chunk: Annotated[
        int,
        typer.Option(min=1, help="Number of tokens whose logits are held in memory at once."),
    ] = 256,
    threads: BenchThreads = None,
    out: Out = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare the perplexity of float32, fixed point and pad."""
    from tsqp.bench import output

    output.check_out(out)
    from tsqp.bench.accuracy import measure_accuracy, notes, tables

    threads = threads or os.cpu_count() or 1
    result = measure_accuracy(model, text, max_tokens=max_tokens, chunk=chunk, threads=threads)
    output.print_result(result.as_json(), tables(result), notes(result), out)


@app.command("bench-serve")
def bench_serve(
    url: Annotated[str, typer.Option(help="Address of a running server.")] = (
        "http://127.0.0.1:8000"
    ),
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with the API key to use, if the server has any.")
    ] = None,
    streams: Annotated[
        str, typer.Option(help="Numbers of answers at the same time, separated by commas.")
    ] = "1,16",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of each prompt, in tokens.")] = (
        64
    ),
    new_tokens: Annotated[
        int, typer.Option(min=2, help="Number of tokens to generate for each prompt.")
    ] = 64,
    long_tokens: Annotated[
        int,
        typer.Option(
            min=0,
            help="Also measure a short prompt beside a prompt of this many tokens. 0 skips this.",
        ),
    ] = 1000,
    rounds: Annotated[
        int, typer.Option(min=1, help="Number of measured rounds, after a warm-up.")
    ] = 3,
    out: Out = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure a running `tsqp serve`: throughput, latency, and what HTTP costs."""
    from tsqp.bench import output

    output.check_out(out)
    from tsqp.bench.numbers import parse_numbers
    from tsqp.bench.server_load import MOST_STREAMS, Target, measure_server, notes, tables
    from tsqp.serve.options import read_api_keys

    keys = read_api_keys((), api_key_file)
    result = measure_server(
        Target(url, keys[0] if keys else None),
        parse_numbers(streams, "--streams", MOST_STREAMS),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        long_tokens=long_tokens,
        rounds=rounds,
    )
    output.print_result(result.as_json(), tables(result), notes(result), out)
