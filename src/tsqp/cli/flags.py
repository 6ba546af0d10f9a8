"""Options that several commands share, beside those of `tsqp.runtime.options`."""

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
JsonOutput = Annotated[
    bool,
    typer.Option(
        "--json", envvar="TSQP_JSON", help="One JSON object as the last line of standard output."
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
