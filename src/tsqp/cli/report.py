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
        typer.Argument(
            metavar="FILE…", help="Call logs written by --rpc-log, or results of `tsqp bench`."
        ),
    ],
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Another file of the same kind; print ratios relative to it."
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT",
            help="Also write an HTML page with plots to this new file. For call logs only.",
        ),
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
    """Show where the time of a run went, its bottleneck, and what would help."""
    from tsqp.report.render import print_reports

    print_reports(files, against=against, html=html, trace=trace, json_output=json_output)
