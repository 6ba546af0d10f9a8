"""The command line. Each file holds a group of commands; importing a file registers them."""

from tsqp.cli import audit, bench, chat, digest, doctor, generate, report, worker  # noqa: F401
from tsqp.cli.app import app, main

__all__ = ["app", "main"]
