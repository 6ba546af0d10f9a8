"""A `tsqp chat` that is typed into while it runs."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from protocol_helpers import GIVES_UP_SOON, Commands, Running


class Terminal:
    """The end of a pipe into a running chat."""

    def __init__(self, running: Running, descriptor: int) -> None:
        self.running = running
        self._descriptor = descriptor

    def type(self, *lines: str) -> None:
        os.write(self._descriptor, "".join(f"{line}\n" for line in lines).encode())


@contextmanager
def chatting(
    commands: Commands, *arguments: object, env: Mapping[str, str] = GIVES_UP_SOON
) -> Iterator[Terminal]:
    """A chat whose standard input stays open."""
    pipe = commands.folder / "input"
    os.mkfifo(pipe)
    descriptor = os.open(pipe, os.O_RDWR)  # so that opening it for reading does not wait
    try:
        yield Terminal(commands.start("chat", *arguments, stdin=pipe, env=env), descriptor)
    finally:
        os.close(descriptor)
