"""`tsqp generate`."""

from pathlib import Path
from typing import Annotated

import typer

from tsqp.cli.app import app
from tsqp.cli.flags import (
    Debug,
    FrequencyPenalty,
    JsonOutput,
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
    is_from_command_line,
)
from tsqp.cli.open_llm import open_llm, read_sampling
from tsqp.cli.prompts import read_prompts
from tsqp.cli.with_options import with_options
from tsqp.errors import UsageError
from tsqp.runtime.options import Options


@app.command()
@with_options()
def generate(
    context: typer.Context,
    model: Model,
    options: Options,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="Prompt text, or - to read the prompt from standard input. Other users of this "
            "machine can read a prompt text in the process list, so - is safer. May be repeated."
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="File of prompts: a .txt file with one prompt a line, or a .jsonl file with one "
            "JSON object a line."
        ),
    ] = None,
    prompt_ids: Annotated[
        Path | None,
        typer.Option(
            help="JSON file with the prompt as a list of token ids, or with several prompts as a "
            "list of lists."
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Apply the model's chat template to the prompts.")
    ] = False,
    split_special: SplitSpecial = False,
    max_tokens: MaxTokens = 128,
    min_tokens: Annotated[
        int,
        typer.Option(help="Minimum number of tokens to generate before an answer may end."),
    ] = 0,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    logit_bias: LogitBias = None,
    seed: Seed = None,
    n: Annotated[
        int, typer.Option("--n", help="Number of answers to generate for each prompt.")
    ] = 1,
    stop: Stop = None,
    stop_token_ids: StopTokenId = None,
    ignore_eos: Annotated[
        bool,
        typer.Option("--ignore-eos", help="Continue after the model's end-of-sequence token."),
    ] = False,
    logprobs: Annotated[
        int | None,
        typer.Option(
            help="With --json: give the log-probability of each generated token, and of the N "
            "likeliest tokens in its place.",
            metavar="N",
        ),
    ] = None,
    prompt_logprobs: Annotated[
        int | None,
        typer.Option(
            help="With --json: give the log-probability of each prompt token, and of the N "
            "likeliest tokens in its place.",
            metavar="N",
        ),
    ] = None,
    json_output: JsonOutput = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Complete prompts, or answer them as chat messages with --chat."""
    params = read_sampling(context)
    if not json_output and (logprobs is not None or prompt_logprobs is not None):
        raise UsageError("--logprobs and --prompt-logprobs need --json, which prints them.")
    given = read_prompts(prompt, prompt_ids, prompts, chat)
    is_asked = split_special and is_from_command_line(context, "split_special")
    if is_asked and not given.are_conversations(chat):
        raise UsageError("--split-special is for conversations: add --chat, or leave it out.")
    from tsqp.cli.printing import Printer, prompt_progress

    with open_llm(model, options) as llm:
        ids = given.encode(llm, chat, split_special)
        printer = Printer(llm, prompts=len(ids), n=n, json_output=json_output)
        with prompt_progress(not json_output) as on_progress:
            completions = llm.generate(
                ids, params, on_text=printer.on_text, on_progress=on_progress
            )
        printer.finish(completions)
