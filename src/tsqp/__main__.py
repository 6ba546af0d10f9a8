"""`python -m tsqp`."""

from tsqp.cli import main

main()
