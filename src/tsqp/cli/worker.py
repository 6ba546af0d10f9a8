"""`tsqp worker`, and what prepares one: `tsqp prepare`, `tsqp keygen`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from tsqp.cli.app import app
from tsqp.cli.flags import Debug, Model, Quiet
from tsqp.cli.options import with_options


@app.command()
@with_options("device", "dtype", "threads", "shm", "insecure")
def worker(
    *,
    model: Model,
    listen: Annotated[
        str,
        typer.Option(
            envvar=["TSQP_LISTEN", "LLAMA_IPC_PATH"], help="ipc:///PATH or tcp://HOST:PORT."
        ),
    ],
    device: str,
    serve: Annotated[
        str, typer.Option(help="What to hold weights for: private modes, open, or all.")
    ] = "all",
    dtype: str,
    threads: int | None,
    shm: bool,
    max_sessions: Annotated[
        int, typer.Option(min=1, help="Most sessions at a time, of all clients.")
    ] = 64,
    max_sessions_per_client: Annotated[
        int,
        typer.Option(min=1, help="Most sessions of one user of this machine, or of one address."),
    ] = 16,
    max_shm_bytes: Annotated[
        int, typer.Option(min=0, help="Most shared memory of one session.")
    ] = 2**30,
    max_total_shm_bytes: Annotated[
        int | None,
        typer.Option(
            min=0, help="Most shared memory of all sessions; at most half of what is free."
        ),
    ] = None,
    keyfile: Annotated[
        Path | None,
        typer.Option(
            envvar="TSQP_KEYFILE", help="The worker.key of `tsqp keygen`: encrypted links alone."
        ),
    ] = None,
    insecure: bool,
    record: Annotated[
        Path | None,
        typer.Option(help="Write down everything that arrives, for `tsqp audit`, in this folder."),
    ] = None,
    supervised: Annotated[bool, typer.Option("--supervised", hidden=True)] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Serve a model's linear layers to TEE processes. Runs on the machine with the GPU."""
    from tsqp.cli.printing import loading_progress
    from tsqp.gpu.serve import serve as serve_model
    from tsqp.wire.quotas import Quotas

    with loading_progress() as loading:
        serve_model(
            model,
            listen,
            device=device,
            serve=serve,
            dtype=dtype,
            threads=threads,
            quotas=Quotas(
                max_sessions,
                max_sessions_per_client,
                max_shm_bytes if shm else 0,
                max_total_shm_bytes,
            ),
            keyfile=keyfile,
            insecure=insecure,
            record=record,
            supervised=supervised,
            progress=loading,
        )


@app.command()
def prepare(
    model: Model,
    out: Annotated[
        Path, typer.Argument(help="A new file, NAME.tsqp.safetensors.", show_default=False)
    ],
    hints: Annotated[
        Path | None,
        typer.Option(help="Also write the hints of lattice masks, for the TEE, in this new file."),
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write the int8 weights of the private modes, which are all that a worker needs for them."""
    from tsqp.cli.printing import prepare_model

    prepare_model(model, out, hints)


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
