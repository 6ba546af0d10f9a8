"""`tsqp generate`."""

import math
from pathlib import Path
from typing import Annotated

import typer

from tsqp.cli.app import app
from tsqp.cli.flags import (
    Attention,
    Debug,
    Dtype,
    Field,
    FixedPoint,
    Insecure,
    InsecureSameHost,
    JsonOutput,
    Model,
    NoShm,
    PadMemory,
    PrefillChunk,
    Privacy,
    Threads,
    Timeout,
    WorkerEndpoint,
    WorkerKey,
    is_from_command_line,
)
from tsqp.cli.prompts import read_prompts
from tsqp.errors import UsageError


@app.command()
def generate(
    context: typer.Context,
    model: Model,
    privacy: Privacy = "pad",
    worker: WorkerEndpoint = None,
    worker_key: WorkerKey = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="A prompt, or - for standard input; may be repeated."),
    ] = None,
    prompt_ids: Annotated[
        Path | None,
        typer.Option(help="Token ids in a JSON file: one list, or a list of lists."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Only the k likeliest tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Only the likeliest tokens of this mass.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text.")] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after an end token.")
    ] = False,
    attention: Attention = "tee",
    field: Field = "wide",
    fixed_point: FixedPoint = False,
    pad_memory: PadMemory = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
    prefill_chunk: PrefillChunk = 512,
    timeout: Timeout = 8.0,
    no_shm: NoShm = False,
    insecure: Insecure = False,
    insecure_same_host: InsecureSameHost = False,
    json_output: JsonOutput = False,
    debug: Debug = False,
) -> None:
    """Complete prompts, or answer them with --chat."""
    from tsqp import LLM, SamplingParams
    from tsqp._printing import Printer

    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        max_tokens=max_tokens,
        seed=seed,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
    )
    prompts = read_prompts(prompt, prompt_ids, chat)
    if privacy == "tee":  # which passes over settings for the other modes
        worker = worker if is_from_command_line(context, "worker") else None
        worker_key = worker_key if is_from_command_line(context, "worker_key") else None
    with LLM(
        model,
        privacy=privacy,
        worker=worker,
        worker_key=worker_key,
        attention=attention,
        field=field,
        fixed_point=fixed_point,
        pad_memory=None if pad_memory is None else _bytes(pad_memory),
        dtype=dtype,
        threads=threads,
        prefill_chunk=prefill_chunk,
        timeout=timeout,
        shm=not no_shm,
        insecure=insecure,
        insecure_same_host=insecure_same_host,
    ) as llm:
        ids = [llm.tokenize(p, chat=chat) if isinstance(p, str) else p for p in prompts]
        printer = Printer(llm, prompts=len(ids), json_output=json_output)
        printer.finish(llm.generate(ids, params, on_text=printer.on_text))


def _bytes(gibibytes: float) -> int:
    size = gibibytes * 2**30
    if not math.isfinite(size):
        raise UsageError(f"--pad-memory is {gibibytes}; it must be a number of GiB, 0 or more.")
    return int(size)
