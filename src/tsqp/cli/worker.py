"""`tsqp worker`, and the commands that prepare its files: `tsqp prepare` and `tsqp keygen`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from tsqp.cli.app import app
from tsqp.cli.flags import Debug, Model, Quiet
from tsqp.cli.with_options import with_options


@app.command()
@with_options("device", "dtype", "threads", "shm", "shm_name", "insecure", "model_key_file")
def worker(
    *,
    model: Model,
    listen: Annotated[
        str,
        typer.Option(
            envvar=["TSQP_LISTEN", "LLAMA_IPC_PATH"],
            help="Endpoint to listen on: ipc:///PATH or tcp://HOST:PORT.",
        ),
    ],
    device: str,
    serve: Annotated[
        str,
        typer.Option(
            help="Modes to load weights for: private (pad and shares), open, or all of them."
        ),
    ] = "all",
    dtype: str,
    shard: Annotated[
        str | None,
        typer.Option(
            envvar="TSQP_SHARD",
            metavar="NUMBER/COUNT",
            help="Load only this part of every layer, such as 2/4. All parts must be served.",
        ),
    ] = None,
    threads: int | None,
    shm: bool,
    shm_name: str | None,
    max_sessions: Annotated[
        int, typer.Option(min=1, help="Maximum number of sessions at a time, of all clients.")
    ] = 64,
    max_sessions_per_client: Annotated[
        int,
        typer.Option(
            min=1, help="Maximum number of sessions per client (local user or IP address)."
        ),
    ] = 16,
    max_shm_bytes: Annotated[
        int, typer.Option(min=0, help="Maximum shared memory of one session, in bytes.")
    ] = 2**30,
    max_total_shm_bytes: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Maximum shared memory of all sessions together, in bytes. Never more than half "
            "of the free memory.",
        ),
    ] = None,
    keyfile: Annotated[
        Path | None,
        typer.Option(
            envvar="TSQP_KEYFILE",
            help="Secret key made by `tsqp keygen` (worker.key). Accept only encrypted links.",
        ),
    ] = None,
    model_key_file: Path | None,
    insecure: bool,
    record: Annotated[
        Path | None,
        typer.Option(help="Record everything that arrives in this folder, for `tsqp audit`."),
    ] = None,
    supervised: Annotated[bool, typer.Option("--supervised", hidden=True)] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Serve a model's linear layers to TEE processes. Run it on the machine with the GPU."""
    from tsqp.cli.printing import loading_progress
    from tsqp.gpu.serve import serve as serve_model
    from tsqp.runtime.hardening import harden_process
    from tsqp.wire.quotas import Quotas

    if model_key_file is not None:
        harden_process()
    with loading_progress() as loading:
        serve_model(
            model,
            listen,
            device=device,
            serve=serve,
            dtype=dtype,
            shard=shard,
            threads=threads,
            quotas=Quotas(
                max_sessions,
                max_sessions_per_client,
                max_shm_bytes if shm else 0,
                max_total_shm_bytes,
            ),
            shm_name=shm_name,
            keyfile=keyfile,
            model_key_file=model_key_file,
            insecure=insecure,
            record=record,
            supervised=supervised,
            progress=loading,
        )


@app.command()
def prepare(
    model: Model,
    out: Annotated[
        Path,
        typer.Argument(
            help="The file to write, NAME.tsqp.safetensors. It must not exist.",
            show_default=False,
        ),
    ],
    hints: Annotated[
        Path | None,
        typer.Option(help="Also write the hints of lattice masks, for the TEE, to this new file."),
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a file of int8 weights, which is all that a worker of the private modes needs."""
    from tsqp.cli.printing import prepare_model

    prepare_model(model, out, hints)


@app.command()
def keygen(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Directory for the two key files.")],
    debug: Debug = False,
) -> None:
    """Create a key pair for a worker: worker.key for --keyfile, worker.pub for --worker-key."""
    from tsqp.wire.keys import write_key_pair

    secret_path, public_path, public_key = write_key_pair(folder)
    print(
        f"Keep {secret_path} on the worker, and give {public_path} to its users.", file=sys.stderr
    )
    print(public_key)
