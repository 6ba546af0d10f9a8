"""`tsqp doctor`."""

import logging
from typing import Annotated

import typer

from tsqp.cli.app import app
from tsqp.cli.flags import Debug, JsonOutput
from tsqp.cli.with_options import with_options


@app.command()
@with_options("dtype", "threads", "insecure")
def doctor(
    *,
    model: Annotated[
        str | None,
        typer.Argument(
            envvar=["TSQP_MODEL", "LLAMA_MODEL_PATH"],
            help="The model that the worker serves. Needs --worker.",
            show_default=False,
        ),
    ] = None,
    worker: Annotated[
        str | None,
        typer.Option(
            help="Also check the worker at this endpoint. With MODEL, check its weights and "
            "products too."
        ),
    ] = None,
    worker_key: Annotated[
        str | None, typer.Option(help="Public key of the worker, or the file that holds it.")
    ] = None,
    dtype: str,
    threads: int | None,
    insecure: bool,
    json_output: JsonOutput = False,
    debug: Debug = False,
) -> None:
    """Find problems of this machine, its transports or a worker, and say how to solve them."""
    from tsqp.cli.console import say
    from tsqp.doctor.diagnose import examine, print_checks
    from tsqp.doctor.greeting_checks import Unnamed
    from tsqp.doctor.session_checks import Target

    logging.getLogger("tsqp").setLevel(logging.WARNING)  # each check prints its own line
    target: Target | Unnamed | None = None
    if worker is None and model is not None:
        say(f"{model} was not checked: give the --worker that serves it.")
    if worker is not None and model is not None:
        target = Target(model, worker, worker_key, dtype, threads, insecure)
    elif worker is not None:
        target = Unnamed(worker, worker_key)
    if not print_checks(examine(threads, target), json_output=json_output):
        raise typer.Exit(1)
