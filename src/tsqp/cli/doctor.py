"""`tsqp doctor`."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from tsqp.cli.app import app
from tsqp.cli.flags import Debug, JsonOutput
from tsqp.cli.with_options import with_options
from tsqp.errors import UsageError


@app.command()
@with_options("dtype", "threads", "shm_name", "insecure", "model_key_file")
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
        list[str] | None,
        typer.Option(
            help="Also check the worker at this endpoint. With MODEL, check its weights and "
            "products too. Repeat the option for several workers."
        ),
    ] = None,
    worker_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Public key of the worker, or the file that holds it. For several workers, repeat "
            "the option in the order of --worker."
        ),
    ] = None,
    only_workers: Annotated[
        bool, typer.Option("--only-workers", help="Do not check this machine and its transports.")
    ] = False,
    dtype: str,
    threads: int | None,
    shm_name: str | None,
    insecure: bool,
    model_key_file: Path | None,
    json_output: JsonOutput = False,
    debug: Debug = False,
) -> None:
    """Find problems of this machine, its transports or a worker, and say how to solve them."""
    from tsqp.cli.console import say
    from tsqp.doctor.diagnose import examine, print_checks
    from tsqp.doctor.greeting_checks import Unnamed
    from tsqp.doctor.session_checks import Target
    from tsqp.runtime.links import check_number_of_keys

    logging.getLogger("tsqp").setLevel(logging.WARNING)  # each check prints its own line
    workers, keys = worker or [], worker_key or []
    if only_workers and not workers:
        raise UsageError("--only-workers needs --worker.")
    check_number_of_keys(len(workers), len(keys))
    if model is not None and not workers:
        say(f"{model} was not checked: give the --worker that serves it.")
    targets: list[Target | Unnamed] = []
    for number, each in enumerate(workers):
        key = keys[number] if keys else None
        if model is None:
            targets.append(Unnamed(each, key))
        else:
            targets.append(
                Target(model, each, key, dtype, threads, insecure, shm_name, model_key_file)
            )
    if not print_checks(
        examine(threads, targets, only_workers=only_workers), json_output=json_output
    ):
        raise typer.Exit(1)
