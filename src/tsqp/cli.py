"""The command line: parses, calls, prints.

Settings come from flags, then TSQP_* variables (and the prototype's LLAMA_* names), then the TOML
file of --config: see docs/settings.md.
"""

import logging
import math
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from typer.core import TyperGroup

from tsqp._settings import read_settings
from tsqp.errors import PromptError, RemoteError, TSQPError, UsageError

DEMO_PROMPT = "What is the capital of France? Answer in one sentence."


class _Commands(TyperGroup):
    """`tsqp bench kernels` is the command bench-kernels; `tsqp bench MODEL` is bench."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:  # typer has a click of its own
        joined = "-".join(args[:2])
        if joined in self.commands:
            args = [joined, *args[2:]]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="tsqp",
    cls=_Commands,
    help="Private LLM inference on a GPU that nobody has to trust.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str,
    typer.Argument(
        envvar=["TSQP_MODEL", "LLAMA_MODEL_PATH"],
        help="A Hugging Face directory, a .gguf file, random:NAME[:SEED], or demo.",
        show_default=False,
    ),
]
WorkerEndpoint = Annotated[
    list[str] | None,
    typer.Option(
        "--worker",
        envvar=["TSQP_WORKER", "LLAMA_IPC_PATH"],
        help="Where the worker listens: ipc:///PATH, tcp://HOST:PORT, or local (starts one). "
        "Repeated for shares.",
    ),
]
WorkerKey = Annotated[
    list[str] | None,
    typer.Option(
        "--worker-key",
        envvar="TSQP_WORKER_KEY",
        help="The public key of each --worker, in the same order, or its file: encrypts the link.",
    ),
]
Privacy = Annotated[
    str,
    typer.Option(
        envvar="TSQP_PRIVACY",
        help="pad: the worker sees uniform noise and cannot lie. shares: several workers, each of "
        "which sees uniform noise; private as long as at least one worker's host does not pass on "
        "what it receives, for all of them together could read everything. open: the worker reads "
        "everything. tee: no worker.",
    ),
]
Field = Annotated[
    str,
    typer.Option(envvar="TSQP_FIELD", help="Residues of the private modes: wide or compact."),
]
FixedPoint = Annotated[
    bool, typer.Option("--fixed-point", help="With tee: compute what pad and shares do.")
]
PadMemory = Annotated[
    float | None,
    typer.Option(min=0, envvar="TSQP_PAD_MEMORY", help="GiB for pads made ahead; 0 for none."),
]
Dtype = Annotated[
    str,
    typer.Option(
        envvar=["TSQP_DTYPE", "LLAMA_DTYPE"],
        help="float32, float16, bfloat16, or auto: the checkpoint's own.",
    ),
]
Threads = Annotated[
    int | None, typer.Option(min=1, envvar="TSQP_THREADS", help="Threads for computing.")
]
PrefillChunk = Annotated[
    int, typer.Option(min=1, envvar="TSQP_PREFILL_CHUNK", help="Prompt tokens in one step.")
]
Timeout = Annotated[
    float,
    typer.Option(min=0.1, envvar="TSQP_TIMEOUT", help="Seconds the worker may take for one call."),
]
NoShm = Annotated[bool, typer.Option("--no-shm", help="Send tensors through the socket.")]
Insecure = Annotated[
    bool,
    typer.Option("--insecure", help="Allow a link to another machine that is not encrypted."),
]
InsecureSameHost = Annotated[
    bool,
    typer.Option(
        "--insecure-same-host",
        help="For testing: let the workers of shares be on one host, over any kind of link, where "
        "they could add up what they receive.",
    ),
]
JsonOutput = Annotated[
    bool,
    typer.Option(
        "--json", envvar="TSQP_JSON", help="One JSON object as the last line of standard output."
    ),
]
Attention = Annotated[
    str, typer.Option(envvar="TSQP_ATTENTION", help="Where Q·Kᵀ and P·V run in open: tee.")
]


BenchThreads = Annotated[int | None, typer.Option(min=1, help="Threads for each side.")]
Out = Annotated[Path | None, typer.Option(help="Also write the JSON to this new file.")]


def _note_debug(context: typer.Context, value: bool) -> bool:
    context.ensure_object(dict)["debug"] = value
    return value


Debug = Annotated[
    bool,
    typer.Option(
        "--debug",
        envvar="TSQP_DEBUG",
        callback=_note_debug,
        help="Show tracebacks, the worker's included.",
    ),
]


@app.callback()
def _settings(
    config: Annotated[
        Path | None,
        typer.Option(envvar="TSQP_CONFIG", callback=read_settings, help="Settings, in TOML."),
    ] = None,
) -> None:
    pass


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
    prompts = _prompts(prompt, prompt_ids, chat)
    if privacy == "tee":  # which passes over settings for the other modes
        worker = worker if _is_from_command_line(context, "worker") else None
        worker_key = worker_key if _is_from_command_line(context, "worker_key") else None
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


@app.command()
def worker(
    model: Model,
    listen: Annotated[
        str,
        typer.Option(
            envvar=["TSQP_LISTEN", "LLAMA_IPC_PATH"], help="ipc:///PATH or tcp://HOST:PORT."
        ),
    ],
    device: Annotated[
        str,
        typer.Option(envvar=["TSQP_DEVICE", "LLAMA_GPU_DEVICE"], help="cpu, cuda or cuda:NUMBER."),
    ] = "cpu",
    serve: Annotated[
        str, typer.Option(help="What to hold weights for: private modes, open, or all.")
    ] = "all",
    dtype: Dtype = "auto",
    threads: Threads = None,
    no_shm: NoShm = False,
    keyfile: Annotated[
        Path | None,
        typer.Option(
            envvar="TSQP_KEYFILE", help="The worker.key of `tsqp keygen`: encrypted links alone."
        ),
    ] = None,
    insecure: Insecure = False,
    record: Annotated[
        Path | None,
        typer.Option(help="Write down everything that arrives, for `tsqp audit`, in this folder."),
    ] = None,
    supervised: Annotated[bool, typer.Option("--supervised", hidden=True)] = False,
    debug: Debug = False,
) -> None:
    """Serve a model's linear layers to TEE processes. Runs on the machine with the GPU."""
    from tsqp.gpu.serve import serve as serve_model

    serve_model(
        model,
        listen,
        device=device,
        serve=serve,
        dtype=dtype,
        threads=threads,
        max_shm_bytes=0 if no_shm else 2**30,
        keyfile=None
        if supervised
        else keyfile,  # a local worker inherits settings meant for others
        insecure=insecure,
        record=record,
        supervised=supervised,
    )


@app.command()
def prepare(
    model: Model,
    out: Annotated[
        Path, typer.Argument(help="A new file, NAME.tsqp.safetensors.", show_default=False)
    ],
    debug: Debug = False,
) -> None:
    """Write the int8 weights of the private modes, which are all that a worker needs for them."""
    from tsqp._printing import prepare_model

    prepare_model(model, out)


@app.command()
def keygen(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the two files go.")],
    debug: Debug = False,
) -> None:
    """Make a worker's key pair: worker.key for its --keyfile, worker.pub for --worker-key."""
    from tsqp.wire.keys import write_key_pair

    secret_path, public_path, public_key = write_key_pair(folder)
    print(f"{secret_path} stays with the worker; {public_path} goes to its users.", file=sys.stderr)
    print(public_key)


@app.command()
def demo(
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Download the demo model first, if need be.")
    ] = False,
    prompt: Annotated[str, typer.Option(help="What to ask.")] = DEMO_PROMPT,
    debug: Debug = False,
) -> None:
    """A real model answers through a TEE process and a worker process; then, what the GPU saw."""
    from tsqp._printing import fetch_demo_model
    from tsqp.bench.demo import run_demo

    if fetch:
        fetch_demo_model()
    run_demo(prompt)


@app.command()
def audit(
    recording: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="What `tsqp worker --record` wrote: one session."),
    ],
    model: Annotated[
        str,
        typer.Option(envvar=["TSQP_MODEL", "LLAMA_MODEL_PATH"], help="The model it served."),
    ],
    prompt_ids: Annotated[Path, typer.Option(help="The true prompt: token ids in a JSON file.")],
    again: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A second recording of the same prompt."),
    ] = None,
    shares: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="What another worker of the session saw; repeatable."),
    ] = None,
    json_output: JsonOutput = False,
    debug: Debug = False,
) -> None:
    """Attack what a worker saw; exit status 1 if anything is found that noise would not show."""
    prompts = _read_ids(prompt_ids)
    if len(prompts) != 1:
        raise PromptError(f"{prompt_ids} holds {len(prompts)} prompts; an audit takes one.")
    from tsqp.bench.audit import Auditor
    from tsqp.bench.audit_table import print_report

    report = Auditor(model).audit(recording, prompts[0], again=again, shares=shares or ())
    print_report(report, model, json_output=json_output)
    if report.leaks:
        raise typer.Exit(1)


@app.command()
def bench(
    model: Model,
    modes: Annotated[
        str | None,
        typer.Option(help="Which to compare, with commas between; all, unless given."),
    ] = None,
    dtype: Dtype = "auto",
    field: Field = "wide",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 1024,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 33,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count, after a warm-up.")] = 5,
    sustained: Annotated[
        int, typer.Option(min=0, help="Tokens to generate after the stock of pads is used up.")
    ] = 0,
    starts: Annotated[
        bool, typer.Option("--starts", help="Time the start of each mode, and its memory.")
    ] = False,
    threads: BenchThreads = None,
    out: Out = None,
    debug: Debug = False,
) -> None:
    """Time all modes in turn, on this machine's CPU. Also: bench kernels, bench accuracy."""
    from tsqp.bench import output

    output.check_out(out)
    from tsqp.bench.compare import compare, parse_field, parse_modes
    from tsqp.bench.modes import MODES, Setting
    from tsqp.bench.table import notes, tables

    setting = Setting(
        model=model,
        dtype=dtype,
        field=parse_field(field),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        threads=threads or os.cpu_count() or 1,
    )
    chosen = list(MODES) if modes is None else parse_modes(modes)
    result = compare(setting, chosen, rounds=rounds, sustained=sustained, starts=starts)
    output.print_result(result.as_json(), tables(result), notes(result), out)


@app.command("bench-kernels")
def bench_kernels(out: Out = None, debug: Debug = False) -> None:
    """Time the loops of the trusted side on one core, for each element."""
    from tsqp.bench import output

    output.check_out(out)
    from tsqp.bench.kernels import measure_kernels, notes, tables

    result = measure_kernels()
    output.print_result(result.as_json(), tables(result), notes(result), out)


@app.command("bench-accuracy")
def bench_accuracy(
    model: Model,
    text: Annotated[Path, typer.Option(help="A text to score, in UTF-8.", show_default=False)],
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Score only the beginning of the text.")
    ] = None,
    chunk: Annotated[
        int, typer.Option(min=1, help="Tokens whose logits are in memory at once.")
    ] = 256,
    threads: BenchThreads = None,
    out: Out = None,
    debug: Debug = False,
) -> None:
    """Compare the perplexity of float32, fixed point and pad."""
    from tsqp.bench import output

    output.check_out(out)
    from tsqp.bench.accuracy import measure_accuracy, notes, tables

    threads = threads or os.cpu_count() or 1
    result = measure_accuracy(model, text, max_tokens=max_tokens, chunk=chunk, threads=threads)
    output.print_result(result.as_json(), tables(result), notes(result), out)


def _is_from_command_line(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _bytes(gibibytes: float) -> int:
    size = gibibytes * 2**30
    if not math.isfinite(size):
        raise UsageError(f"--pad-memory is {gibibytes}; it must be a number of GiB, 0 or more.")
    return int(size)


def _prompts(
    texts: list[str] | None, ids_file: Path | None, chat: bool
) -> list[str] | list[list[int]]:
    if bool(texts) == bool(ids_file):
        raise UsageError("Give either --prompt or --prompt-ids.")
    if texts:
        return [_read_stdin() if text == "-" else text for text in texts]
    if chat:
        raise UsageError("--chat goes with --prompt; ids are taken as they are.")
    assert ids_file is not None
    return _read_ids(ids_file)


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as exc:
        raise PromptError("Standard input is not valid UTF-8; convert the prompt first.") from exc


def _read_ids(path: Path) -> list[list[int]]:
    try:
        ids = msgspec.json.decode(path.read_bytes(), type=list[int | list[int]])
    except (OSError, msgspec.DecodeError) as exc:
        raise PromptError(f"Cannot read token ids from {path}: {exc}.") from exc
    several = [each for each in ids if isinstance(each, list)]
    if several and len(several) < len(ids):
        raise PromptError(f"{path} mixes token ids and lists of them; give one list, or lists.")
    return several or [[each for each in ids if isinstance(each, int)]]


def main() -> None:
    """Run the command line; exit status 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("tsqp").setLevel(logging.INFO)
    state: dict[str, bool] = {}
    try:
        app(obj=state, auto_envvar_prefix="TSQP")
    except TSQPError as exc:
        if state.get("debug"):
            traceback.print_exc()
            if isinstance(exc, RemoteError) and exc.remote_traceback:
                print(f"The worker's traceback:\n{exc.remote_traceback}", file=sys.stderr)
        print(f"error: {exc}", file=sys.stderr)
        sys.exit(2 if isinstance(exc, UsageError) else 1)
    except Exception as exc:
        if state.get("debug"):
            traceback.print_exc()
        kind = type(exc).__name__
        print(f"error: Unexpected {kind}; run again with --debug, and report it.", file=sys.stderr)
        sys.exit(1)
