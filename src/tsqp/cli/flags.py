"""The options that several commands share, each defined once."""

from pathlib import Path
from typing import Annotated

import typer

from tsqp.runtime.quiet import set_quiet

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
Device = Annotated[
    str,
    typer.Option(
        envvar=["TSQP_DEVICE", "LLAMA_GPU_DEVICE"],
        help="Where a worker computes: cpu, cuda, cuda:NUMBER, or auto: CUDA if there is any.",
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
ExpectModel = Annotated[
    str | None,
    typer.Option(
        envvar="TSQP_EXPECT_MODEL",
        metavar="DIGEST",
        help="Refuse a model that does not have this digest, as `tsqp digest` prints it.",
    ),
]
JsonOutput = Annotated[
    bool,
    typer.Option(
        "--json", envvar="TSQP_JSON", help="One JSON object as the last line of standard output."
    ),
]
RpcLog = Annotated[
    Path | None,
    typer.Option(help="A new file for where the time of every call went; see `tsqp report`."),
]
Attention = Annotated[
    str | None,
    typer.Option(
        envvar="TSQP_ATTENTION",
        help="Where Q·Kᵀ and P·V run in open: tee (the default) or gpu, the softmax in the TEE.",
    ),
]
Fuse = Annotated[
    str,
    typer.Option(
        envvar="TSQP_FUSE", help="layer: the worker of open runs whole layers, one call each."
    ),
]

MaxTokens = Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token.")]
TopK = Annotated[int, typer.Option(help="Only the k likeliest tokens; 0 for all.")]
TopP = Annotated[float, typer.Option(help="Only the likeliest tokens of this mass.")]
MinP = Annotated[
    float, typer.Option(help="Only tokens at least this times as likely as the likeliest.")
]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Above 1: less of the tokens of prompt and answer.")
]
PresencePenalty = Annotated[
    float, typer.Option(help="Above 0: less of the tokens that are in the answer.")
]
FrequencyPenalty = Annotated[
    float, typer.Option(help="Likewise, once for each time that they are there.")
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(metavar="TOKEN_ID=BIAS", help="Added to a token's logit; may be repeated."),
]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
SplitSpecial = Annotated[
    bool,
    typer.Option(
        "--split-special",
        help="Treat control tokens in messages, such as <|im_end|>, as plain text.",
    ),
]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")]
StopTokenId = Annotated[
    list[int] | None,
    typer.Option("--stop-token-id", min=0, help="End with this token; may be repeated."),
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


def _note_quiet(value: bool) -> bool:
    set_quiet(value)
    return value


Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        envvar="TSQP_QUIET",
        callback=_note_quiet,
        help="Print results, warnings and errors only: no progress, notes or statistics.",
    ),
]


def is_from_command_line(context: typer.Context, name: str) -> bool:
    """Whether an option was given there, and not by a setting."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
