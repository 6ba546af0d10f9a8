"""`tsqp doctor`."""

import logging
from typing import Annotated

import typer

from tsqp.cli.app import app
from tsqp.cli.flags import Debug, JsonOutput
from tsqp.cli.options import with_options


@app.command()
@with_options("dtype", "threads", "insecure")
def doctor(
    *,
    model: Annotated[
        str | None,
        typer.Argument(
            envvar=["TSQP_MODEL", "LLAMA_MODEL_PATH"],
            help="The model that --worker serves.",
            show_default=False,
        ),
    ] = None,
    worker: Annotated[
        str | None,
        typer.Option(help="Examine this worker too; with MODEL, its weights and products."),
    ] = None,
    worker_key: Annotated[
        str | None, typer.Option(help="The worker's public key, or its file.")
    ] = None,
    dtype: str,
    threads: int | None,
    insecure: bool,
    json_output: JsonOutput = False,
    debug: Debug = False,
) -> None:
    """Check this machine, the ways to a worker, and a worker: what is wrong, and what to do."""
    from tsqp.cli.printing import say
    from tsqp.doctor.diagnose import examine, print_checks
    from tsqp.doctor.greeting_checks import Unnamed
    from tsqp.doctor.session_checks import Target

    logging.getLogger("tsqp").setLevel(logging.WARNING)  # every check says its own
    target: Target | Unnamed | None = None
    if worker is None and model is not None:
        say(f"{model} was not looked at: that takes a --worker that serves it.")
    if worker is not None and model is not None:
        target = Target(model, worker, worker_key, dtype, threads, insecure)
    elif worker is not None:
        target = Unnamed(worker, worker_key)
    if not print_checks(examine(threads, target), json_output=json_output):
        raise typer.Exit(1)
