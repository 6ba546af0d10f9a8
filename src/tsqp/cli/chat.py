"""`tsqp chat`."""

import sys
from contextlib import suppress
from typing import Annotated

import typer

from tsqp.cli.app import app
from tsqp.cli.flags import (
    Debug,
    FrequencyPenalty,
    LogitBias,
    MaxTokens,
    MinP,
    Model,
    PresencePenalty,
    Quiet,
    RepetitionPenalty,
    Seed,
    SplitSpecial,
    Stop,
    StopTokenId,
    Temperature,
    TopK,
    TopP,
)
from tsqp.cli.open_llm import open_llm, read_sampling
from tsqp.cli.with_options import with_options
from tsqp.runtime.options import Options


@app.command()
@with_options()
def chat(
    context: typer.Context,
    model: Model,
    options: Options,
    system: Annotated[
        str, typer.Option(help="System message. /system changes it during the chat.")
    ] = "",
    split_special: SplitSpecial = False,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    logit_bias: LogitBias = None,
    seed: Seed = None,
    stop: Stop = None,
    stop_token_ids: StopTokenId = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Chat with a model. Each line is a message, and /help lists the commands."""
    params = read_sampling(context)
    from tsqp.checkpoint.checkpoint import check_exists
    from tsqp.cli.printing import note
    from tsqp.cli.repl import Repl
    from tsqp.tee.text.tokenizer import Tokenizer

    check_exists(model)  # a model that is not there has no tokenizer either
    tokenizer = Tokenizer(model)
    tokenizer.check_chat()  # before a worker is started needlessly
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    with open_llm(model, options, tokenizer) as llm:
        if interactive:
            with suppress(ImportError):  # line editing, if Python has it; no history file
                import readline  # noqa: F401
            note("/help lists the commands, and Ctrl-D ends the chat.")
        repl = Repl(
            llm, params, system=system, split_special=split_special, interactive=interactive
        )
        repl.run()
