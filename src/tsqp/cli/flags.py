"""Options that several commands share, besides those of `tsqp.runtime.options`."""

from pathlib import Path
from typing import Annotated

import typer

from tsqp.cli.streams import show_native_messages
from tsqp.runtime.quiet import set_quiet

Model = Annotated[
    str,
    typer.Argument(
        envvar=["TSQP_MODEL", "LLAMA_MODEL_PATH"],
        help="Model: a Hugging Face directory, a .gguf file, random:NAME[:SEED], or demo.",
        show_default=False,
    ),
]
JsonOutput = Annotated[
    bool,
    typer.Option(
        "--json",
        envvar="TSQP_JSON",
        help="Print a JSON object as the last line of standard output.",
    ),
]

MaxTokens = Annotated[
    int, typer.Option(min=1, help="Maximum number of tokens to generate for each answer.")
]
Temperature = Annotated[
    float,
    typer.Option(
        help="Randomness of sampling. 0 always picks the likeliest token; higher values are more "
        "random."
    ),
]
TopK = Annotated[
    int, typer.Option(help="Sample only from the k likeliest tokens. 0 considers all tokens.")
]
TopP = Annotated[
    float,
    typer.Option(
        help="Sample only from the fewest likeliest tokens whose probabilities add up to this "
        "value. 1 considers all tokens."
    ),
]
MinP = Annotated[
    float,
    typer.Option(
        help="Sample only from tokens whose probability is at least this fraction of the "
        "likeliest token's. 0 considers all tokens."
    ),
]
RepetitionPenalty = Annotated[
    float,
    typer.Option(
        help="Penalise tokens that appear in the prompt or in the answer so far. Values above 1 "
        "make them less likely; 1 is off."
    ),
]
PresencePenalty = Annotated[
    float,
    typer.Option(
        help="Penalise tokens that appear in the answer so far. Values above 0 make them less "
        "likely; 0 is off."
    ),
]
FrequencyPenalty = Annotated[
    float,
    typer.Option(
        help="Penalise tokens by how often they appear in the answer so far. Values above 0 make "
        "them less likely; 0 is off."
    ),
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TOKEN_ID=BIAS", help="Add BIAS to the logit of a token. May be repeated."
    ),
]
Seed = Annotated[
    int | None, typer.Option(help="Random seed. The same seed gives the same answer again.")
]
SplitSpecial = Annotated[
    bool,
    typer.Option(
        "--split-special",
        help="Treat control tokens in messages, such as <|im_end|>, as plain text.",
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="End the answer before this text. May be repeated."),
]
StopTokenId = Annotated[
    list[int] | None,
    typer.Option(
        "--stop-token-id", min=0, help="End the answer after this token. May be repeated."
    ),
]

BenchThreads = Annotated[
    int | None, typer.Option(min=1, help="Number of compute threads for each side.")
]
Out = Annotated[Path | None, typer.Option(help="Also write the JSON result to this new file.")]


def _note_debug(context: typer.Context, value: bool) -> bool:
    context.ensure_object(dict)["debug"] = value
    if value:
        show_native_messages()
    return value


Debug = Annotated[
    bool,
    typer.Option(
        "--debug",
        envvar="TSQP_DEBUG",
        callback=_note_debug,
        help="Show tracebacks of errors, including those of the worker.",
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
        help="Print only results, warnings and errors; no progress, notes or statistics.",
    ),
]


def is_from_command_line(context: typer.Context, name: str) -> bool:
    """Whether an option was given on the command line, not by a variable or a settings file."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
