"""`tsqp chat`."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tsqp.cli.app import app
from tsqp.cli.flags import (
    Debug,
    FrequencyPenalty,
    LogitBias,
    MaxTokens,
    MinP,
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
from tsqp.cli.with_options import with_options
from tsqp.errors import UsageError
from tsqp.runtime.options import Options

if TYPE_CHECKING:
    from tsqp.cli.repl import Answerer
    from tsqp.tee.sampling import SamplingParams


def _check_given(context: typer.Context, model: str | None) -> str | None:
    if model is None and context.params.get("url") is None:
        raise UsageError("MODEL is missing: name a model, or a server with --url.")
    return model


@app.command()
@with_options(unless="url")
def chat(
    context: typer.Context,
    *,
    model: Annotated[
        str | None,
        typer.Argument(
            envvar=["TSQP_MODEL", "LLAMA_MODEL_PATH"],
            help="Model: a Hugging Face directory, a .gguf file, random:NAME[:SEED], or demo. With "
            "--url, the server's name of a model; the default is its first one.",
            show_default=False,
            callback=_check_given,
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            is_eager=True,  # `_check_given` reads it
            help="Talk to a running `tsqp serve`, or another OpenAI-compatible server, at this "
            "address, such as http://127.0.0.1:8000.",
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="TSQP_API_KEY",
            help="With --url: key to send. Other users of this machine can read it in the process "
            "list, so the variable or --api-key-file is safer.",
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="With --url: file with the key to send.")
    ] = None,
    cacert: Annotated[
        Path | None,
        typer.Option(
            help="With --url: PEM file of the certificate authorities to trust, instead of the "
            "system's."
        ),
    ] = None,
    options: Options | None,
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
    """Chat with a model or a server. Each line is a message, and /help lists the commands."""
    params = read_sampling(context)
    if url is not None:
        wanted = model if is_from_command_line(context, "model") else None
        _chat_with_server(url, api_key, api_key_file, cacert, wanted, params, system, split_special)
        return
    assert model is not None and options is not None
    for name in ("api_key", "api_key_file", "cacert"):
        if is_from_command_line(context, name):
            raise UsageError(f"--{name.replace('_', '-')} is for --url only; leave it out.")
    from tsqp.checkpoint.checkpoint import check_exists
    from tsqp.checkpoint.model_key import read_model_key
    from tsqp.tee.text.tokenizer import Tokenizer

    check_exists(model)  # a model that is not there has no tokenizer either
    key_file = options.model_key_file
    tokenizer = Tokenizer(model, key=None if key_file is None else read_model_key(key_file))
    tokenizer.check_chat()  # before a worker is started needlessly
    with open_llm(model, options, tokenizer) as llm:
        from tsqp.cli.local_chat import LocalModel

        _talk(LocalModel(llm, split_special=split_special), params, system)


def _chat_with_server(
    url: str,
    api_key: str | None,
    api_key_file: Path | None,
    cacert: Path | None,
    model: str | None,
    params: "SamplingParams",
    system: str,
    split_special: bool,
) -> None:
    try:
        from tsqp.cli.remote_chat import RemoteModel, choose_model, open_server, read_api_key
    except ModuleNotFoundError as exc:
        raise UsageError(
            f"--url needs the package {exc.name}: pip install 'tsqp[client]'."
        ) from None
    from tsqp.cli.console import note

    with open_server(url, read_api_key(api_key, api_key_file), cacert) as server:
        chosen = choose_model(server, model)
        note(f"talking to {chosen}")
        _talk(RemoteModel(server, chosen, split_special=split_special), params, system)


def _talk(answerer: "Answerer", params: "SamplingParams", system: str) -> None:
    from tsqp.cli.console import note
    from tsqp.cli.repl import Repl

    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        with suppress(ImportError):  # line editing, if Python has it; no history file
            import readline  # noqa: F401
        note("/help lists the commands, and Ctrl-D ends the chat.")
    Repl(answerer, params, system=system, interactive=interactive).run()
