"""The command line. Each file holds a group of commands; importing a file registers them."""

from tsqp.cli import (  # noqa: F401
    audit,
    bench,
    chat,
    cluster,
    collateral,
    digest,
    doctor,
    encrypt,
    generate,
    keys,
    report,
    serve,
    verify,
    verify_receipt,
    worker,
)
from tsqp.cli.app import app, main

__all__ = ["app", "main"]
