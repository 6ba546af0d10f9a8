"""`tsqp report`."""

from pathlib import Path
from typing import Annotated

import typer

from tsqp.cli.app import app
from tsqp.cli.flags import Debug, JsonOutput


@app.command()
def report(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE…", help="Call logs of --rpc-log, or results of tsqp bench."),
    ],
    against: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Another of the same kind: print ratios to it."),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="Also write one page with plots, of call logs alone."),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT",
            help="Also write a trace of call logs, for ui.perfetto.dev or chrome://tracing.",
        ),
    ] = None,
    json_output: JsonOutput = False,
    debug: Debug = False,
) -> None:
    """Say where the time of a run went, what held it up, and what would help."""
    from tsqp.report.render import print_reports

    print_reports(files, against=against, html=html, trace=trace, json_output=json_output)
