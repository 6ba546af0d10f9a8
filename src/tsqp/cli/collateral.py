"""`tsqp collateral`."""

from pathlib import Path
from typing import Annotated

import typer

from tsqp.cli.app import app
from tsqp.cli.flags import Debug
from tsqp.cli.verify import needed_packages

INTEL = "https://api.trustedservices.intel.com"


@app.command()
def collateral(
    quote: Annotated[
        Path,
        typer.Argument(
            help="A quote of SGX or TDX, or what `tsqp verify --save` wrote.", show_default=False
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="File to write, NAME.json. An earlier one is replaced.")
    ],
    pccs: Annotated[
        str, typer.Option(help="URL of Intel's service, or of a cache of it (PCCS).")
    ] = INTEL,
    debug: Debug = False,
) -> None:
    """Fetch Intel's collateral for a quote, for --collateral of the other commands."""
    with needed_packages():
        from tsqp.client.fetch_collateral import fetch_collateral, write_collateral
        from tsqp.client.quote_file import read_evidence
    from tsqp.cli.console import note

    found = fetch_collateral(read_evidence(quote, None), pccs)
    write_collateral(found, out)
    note(f"{out}: {found.platform} on processors {found.fmspc}, issued {found.issued:%Y-%m-%d}")
