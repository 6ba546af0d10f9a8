"""`tsqp serve`."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from tsqp.cli.app import app
from tsqp.cli.flags import Debug, Model, Quiet
from tsqp.cli.with_options import with_options
from tsqp.errors import UsageError
from tsqp.runtime.environment import keep_known
from tsqp.runtime.options import Options
from tsqp.tee.attest.provider import AUTO, CHOICES


class _Serve(TyperCommand):
    """`--attest` may stand without a value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = []
        for place, each in enumerate(args):
            given.append(each)
            if each == "--attest" and args[place + 1 : place + 2] not in ([one] for one in CHOICES):
                given.append(AUTO)
        return super().parse_args(ctx, given)


def _clear_environment(attest: str | None) -> str | None:
    """Remove unknown variables before libraries such as torch are loaded, which may read them."""
    if attest is not None:
        keep_known(os.environ)
    return attest


@app.command(cls=_Serve)
@with_options()
def serve(
    context: typer.Context,
    model: Model,
    options: Options,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on. 0 chooses a free one.")
    ] = 8000,
    uds: Annotated[
        Path | None, typer.Option(help="Unix socket to listen on instead of a port.")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="TSQP_API_KEY",
            help="Key that clients must send. Other users of this machine can read it in the "
            "process list, so the variable or --api-key-file is safer. May be repeated.",
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File of keys that clients may send, one a line.")
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            help="Name of the model in requests and answers. May be repeated; answers have the "
            "first one. The default is MODEL as it was given."
        ),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Maximum number of tokens of a prompt and its answer together. The default is "
            "the model's own.",
        ),
    ] = None,
    max_num_seqs: Annotated[
        int, typer.Option(min=1, help="Maximum number of answers that are computed together.")
    ] = 64,
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="vLLM's name for --prefill-chunk.", show_default=False),
    ] = None,
    max_num_queued_reqs: Annotated[
        int,
        typer.Option(
            min=0, help="Maximum number of answers that wait. More are refused with status 503."
        ),
    ] = 256,
    max_connections: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum number of connections. More are closed. The default is 512, or more if "
            "more answers may run and wait.",
        ),
    ] = None,
    tool_call_parser: Annotated[
        str | None,
        typer.Option(
            help="How the model writes tool calls: granite, hermes, llama3_json, mistral or "
            "phi4_mini_json. The default is what its chat template shows."
        ),
    ] = None,
    ssl_certfile: Annotated[
        Path | None, typer.Option(help="Certificate for TLS, a PEM file.")
    ] = None,
    ssl_keyfile: Annotated[
        Path | None, typer.Option(help="Private key for TLS, a PEM file.")
    ] = None,
    attest: Annotated[
        str | None,
        typer.Option(
            metavar="[auto|simulated]",
            callback=_clear_environment,
            help="Make a TLS key in this process, and let the platform attest it: an SGX enclave, "
            "or a TDX or SEV-SNP machine. Without such a platform the server does not start; "
            "simulated is for trying it out, and proves nothing.",
        ),
    ] = None,
    broker_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Key broker, https://HOST:PORT, from which the server fetches secrets at its "
            "start. It keeps them in memory. Needs --attest.",
        ),
    ] = None,
    broker_key: Annotated[
        str | None,
        typer.Option(
            metavar="SHA256",
            help="SHA-256 of the broker's TLS key, as `tsqp keys serve` prints it.",
        ),
    ] = None,
    fetch_model_key: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name of the broker's secret for --model-key-file."),
    ] = None,
    fetch_api_keys: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name of the broker's secret for --api-key-file."),
    ] = None,
    receipts: Annotated[
        bool,
        typer.Option(
            "--receipts",
            help="With --attest: sign a receipt of each request and its response.",
        ),
    ] = False,
    root_path: Annotated[
        str, typer.Option(help="Path under which a reverse proxy shows the server.")
    ] = "",
    shutdown_timeout: Annotated[
        float,
        typer.Option(min=0, help="Seconds that running requests get after SIGTERM or Ctrl-C."),
    ] = 30.0,
    show_worker_view: Annotated[
        bool,
        typer.Option(
            help="Show clients a sample of what the workers received for their requests, next to "
            "the values that it hides. Meant for demonstrations."
        ),
    ] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Serve a model over HTTP, as OpenAI's interface has it. Run it on the trusted machine."""
    try:
        import llguidance  # noqa: F401  for requests with tools or a response format

        from tsqp.serve.options import ServeOptions, read_api_keys
        from tsqp.serve.run import run_server
    except ModuleNotFoundError as exc:
        raise UsageError(
            f"The server needs the package {exc.name}: pip install 'tsqp[serve]'."
        ) from None
    from tsqp.cli.printing import loading_progress

    if not os.environ.get("TSQP_API_KEY", "a key").strip():
        raise UsageError("TSQP_API_KEY is empty: set it to a key, or unset it to need none.")
    served = ServeOptions(
        host=host,
        port=port,
        uds=uds,
        api_keys=read_api_keys(api_key or (), api_key_file),
        served_model_names=tuple(served_model_name or ()),
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_queued_reqs=max_num_queued_reqs,
        max_connections=max_connections,
        tool_call_parser=tool_call_parser,
        ssl_certfile=ssl_certfile,
        ssl_keyfile=ssl_keyfile,
        attest=attest,
        broker_url=broker_url,
        broker_key=broker_key,
        fetch_model_key=fetch_model_key,
        fetch_api_keys=fetch_api_keys,
        receipts=receipts,
        root_path=root_path,
        shutdown_timeout=shutdown_timeout,
        show_worker_view=show_worker_view,
    )
    if max_num_batched_tokens is not None:
        options = replace(options, prefill_chunk=max_num_batched_tokens)
    with loading_progress() as loading:
        run_server(model, options, served, on_load=loading)
