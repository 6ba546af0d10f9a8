"""`tsqp demo` and `tsqp audit`: what the GPU saw."""

from pathlib import Path
from typing import Annotated

import typer

from tsqp.cli.app import app
from tsqp.cli.flags import Debug, JsonOutput, Quiet
from tsqp.cli.prompts import read_ids
from tsqp.errors import PromptError

DEMO_PROMPT = "What is the capital of France? Answer in one sentence."


@app.command()
def demo(
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Download the demo model first if it is missing.")
    ] = False,
    prompt: Annotated[
        str,
        typer.Option(
            help="The question to ask. Other users of this machine can read it in the process list."
        ),
    ] = DEMO_PROMPT,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Answer a question through a worker process, then show what the worker could see."""
    from tsqp.cli.demo_run import run_demo
    from tsqp.cli.printing import fetch_demo_model

    if fetch:
        fetch_demo_model()
    run_demo(prompt)


@app.command()
def audit(
    recording: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Recording of one session, written by `tsqp worker --record`."
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            envvar=["TSQP_MODEL", "LLAMA_MODEL_PATH"], help="The model that the worker served."
        ),
    ],
    prompt_ids: Annotated[
        Path, typer.Option(help="The prompt that was used, as token ids in a JSON file.")
    ],
    again: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A second recording of the same prompt."),
    ] = None,
    shares: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="Recording of another worker of the same session. May be repeated.",
        ),
    ] = None,
    json_output: JsonOutput = False,
    debug: Debug = False,
) -> None:
    """Attack a recording of what a worker saw. Exit with status 1 if an attack finds anything."""
    prompts = read_ids(prompt_ids)
    if len(prompts) != 1:
        raise PromptError(f"{prompt_ids} holds {len(prompts)} prompts; an audit needs exactly one.")
    from tsqp.audit.audit_table import print_report
    from tsqp.audit.auditor import Auditor

    report = Auditor(model).audit(recording, prompts[0], again=again, shares=shares or ())
    print_report(report, model, json_output=json_output)
    if report.leaks:
        raise typer.Exit(1)
