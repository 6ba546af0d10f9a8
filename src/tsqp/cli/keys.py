"""`tsqp keys serve` and `tsqp keys fetch`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from tsqp.cli.app import app
from tsqp.cli.flags import Debug
from tsqp.cli.verify import CollateralFiles, needed_packages
from tsqp.errors import UsageError
from tsqp.runtime.environment import keep_known


@app.command("keys-serve")
def keys_serve(
    policy: Annotated[
        Path, typer.Option(help="TOML file of what a TEE must be; see docs/attestation.md.")
    ],
    secret: Annotated[
        list[str],
        typer.Option(metavar="NAME=FILE", help="A secret to give. May be repeated."),
    ],
    ssl_certfile: Annotated[
        Path, typer.Option(help="Certificate that identifies this broker, a PEM file.")
    ],
    ssl_keyfile: Annotated[Path, typer.Option(help="Private key for it, a PEM file.")],
    collateral: CollateralFiles = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on. 0 chooses a free one.")
    ] = 8002,
    debug: Debug = False,
) -> None:
    """Give secrets to TEEs whose evidence meets a policy. Run it on a machine that you trust."""
    with needed_packages():
        from tsqp.client.run_broker import BrokerOptions, run_broker
    run_broker(
        BrokerOptions(
            policy=policy,
            collateral=tuple(collateral or ()),
            secrets=tuple(secret),
            host=host,
            port=port,
            ssl_certfile=ssl_certfile,
            ssl_keyfile=ssl_keyfile,
        )
    )


@app.command("keys-fetch")
def keys_fetch(
    url: Annotated[str, typer.Argument(help="The broker: https://HOST:PORT.", show_default=False)],
    name: Annotated[str, typer.Argument(help="Name of the secret.", show_default=False)],
    out: Annotated[
        Path,
        typer.Option(help="New file for the secret, in the TEE's own memory: a tmpfs, not a disk."),
    ],
    broker_key: Annotated[
        str,
        typer.Option(
            metavar="SHA256",
            help="SHA-256 of the broker's TLS key, as `tsqp keys serve` prints it.",
        ),
    ],
    attest: Annotated[
        str,
        typer.Option(
            metavar="[auto|simulated]",
            help="Platform that gives the evidence, as for `tsqp serve`.",
        ),
    ] = "auto",
    debug: Debug = False,
) -> None:
    """Fetch a secret from a broker into this TEE, which proves itself by its evidence."""
    keep_known(os.environ)
    with needed_packages():
        from tsqp.api.key_release import parse_broker_key
        from tsqp.runtime.fetch_secret import (
            Asker,
            configuration_of_fetch,
            fetch_secret,
            write_secret,
        )
        from tsqp.tee.attest.choose import choose_provider
        from tsqp.tee.attest.provider import CHOICES
    if attest not in CHOICES:
        raise UsageError("--attest takes auto or simulated.")
    key = parse_broker_key(broker_key)
    settings = {
        "name": name, "broker_key": key.hex(), "out": str(out.absolute()), "attest": attest,
    }  # fmt: skip
    asker = Asker(configuration=configuration_of_fetch(settings))
    secret = fetch_secret(url, name, key, choose_provider(attest), asker)
    write_secret(out, secret)
