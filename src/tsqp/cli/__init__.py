"""The command line. One file for a group of commands; importing them here registers them."""

from tsqp.cli import audit, bench, chat, digest, doctor, generate, report, worker  # noqa: F401
from tsqp.cli.app import app, main

__all__ = ["app", "main"]
