"""Starts `lying_worker.py`, and gives it its orders."""

import os
import sys
from pathlib import Path

from lies import Order
from protocol_helpers import Commands, Running, mapped_segments

import processes


class LyingWorker:
    """The process, and the file that tells it what to do to the next session."""

    def __init__(self, commands: Commands, name: str = "liar") -> None:
        self.endpoint = f"ipc://{commands.folder}/{name}.sock"
        self._orders = commands.folder / f"{name}.orders"
        self.order(Order())
        program = Path(__file__).with_name("lying_worker.py")
        process = processes.start(
            [sys.executable, str(program), self.endpoint, str(self._orders)],
            stdin=processes.PIPE,
            stdout=processes.PIPE,
            stderr=processes.PIPE,
            env=os.environ | commands.tag,
        )
        self.running = Running(process)

    def order(self, order: Order) -> None:
        order.write(self._orders)

    @property
    def sessions(self) -> int:
        """How many sessions were asked for until now."""
        return len(self._orders.with_suffix(".sessions").read_bytes())

    @property
    def segments(self) -> int:
        """How many sessions' memory it maps."""
        return mapped_segments(self.running.pid)

    def close(self) -> None:
        assert self.running.process.stdin is not None
        self.running.process.stdin.close()
        assert self.running.ends().status == 0, self.running.stderr
