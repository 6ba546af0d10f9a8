"""Workers and clients for the tests of the wire: honest ones, in threads and in processes.

Run as a program, this file is a worker or a client that a test can kill.
"""

import json
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

import processes
from tsqp.errors import ProtocolError
from tsqp.wire.channel import Channel, Service
from tsqp.wire.client import RemoteChannel
from tsqp.wire.endpoint import Endpoint, parse_endpoint
from tsqp.wire.mailbox import CAN_POLL
from tsqp.wire.messages import Hello, Linear, Operation, Welcome
from tsqp.wire.server import Server
from tsqp.wire.tensors import Spec

DIGEST = "ab" * 32
SEGMENT = 2**20
SHARED = "poll" if CAN_POLL else "shm"  # the transport where memory can be shared
TIMEOUT = 60.0  # for what hangs, on a machine as busy as may be


def hello(**changes: Any) -> Hello:
    fields: dict[str, Any] = {
        "nonce": secrets.token_bytes(32),
        "weights_digest": DIGEST,
        "dtype": "float32",
        "abilities": ("linear",),
        "shm_bytes": SEGMENT,
    }
    return Hello(**(fields | changes))


def welcome(nonce: bytes, **changes: Any) -> Welcome:
    fields: dict[str, Any] = {
        "nonce": nonce,
        "weights_digest": DIGEST,
        "dtype": "float32",
        "abilities": ("linear",),
        "device": "cpu",
        "max_call_macs": 2**40,
        "segment": None,
    }
    return Welcome(**(fields | changes))


class Echo:
    """A service that gives back what it was given. The group says how, the layer is a number."""

    def __init__(self, **changes: Any) -> None:
        self._changes = changes

    def welcome(self, hello: Hello) -> Welcome:
        return welcome(hello.nonce, **self._changes)

    def open(self) -> Self:
        return self

    def close(self) -> None:
        pass

    def check(self, operation: Operation, inputs: Sequence[Spec], outputs: Sequence[Spec]) -> None:
        if list(inputs) != list(outputs) or not inputs:
            raise ProtocolError("An echo has the shapes of what it echoes.")

    def run(
        self, operation: Operation, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        assert isinstance(operation, Linear)
        if operation.group == "raise":
            raise ValueError(f"boom number {operation.layer}")
        if operation.group == "rude":
            raise ValueError("\x1b[2J\udc80")
        if operation.group == "sleep":
            time.sleep(operation.layer / 1000)
        if operation.group == "hang":
            threading.Event().wait()
        for given, answer in zip(inputs, outputs, strict=True):
            answer.copy_(given)


def specs_of(tensors: Sequence[Tensor]) -> list[Spec]:
    return [Spec(tuple(tensor.shape), tensor.dtype) for tensor in tensors]


def begin(channel: Channel, *tensors: Tensor, group: str = "echo", layer: int = 0) -> int:
    """Submit a call and return its ticket."""
    specs = specs_of(tensors)
    slot = channel.reserve(Linear(layer, group), specs, specs)
    for place, tensor in zip(slot.inputs, tensors, strict=True):
        place.copy_(tensor)
    return channel.submit(slot)


def finish(channel: Channel, ticket: int, timeout: float = TIMEOUT) -> list[Tensor]:
    """Private copies of the answer to `ticket`."""
    with channel.wait(ticket, time.monotonic() + timeout) as reply:
        return [tensor.clone() for tensor in reply.outputs]


def echoes(channel: Channel, value: float = 7.0) -> bool:
    """Whether a call comes back right."""
    sent = torch.full((3, 5), value)
    return torch.equal(finish(channel, begin(channel, sent))[0], sent)


def mapped_segments() -> set[str]:
    """Where segments are mapped in this process, those of earlier tests included."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line for line in lines if "tsqp-segment" in line}


def eventually(condition: Callable[[], bool], timeout: float = TIMEOUT) -> bool:
    """Whether `condition` becomes true in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


class WorkerThread:
    """A worker in this process, whose books a test can read."""

    def __init__(self, endpoint: str, service: Service | None = None, **options: Any) -> None:
        self.log: list[str] = []
        self.server = Server(parse_endpoint(endpoint), log=self.log.append, **options)
        self._service = service or Echo()
        self.endpoint: Endpoint = parse_endpoint(self.server.address)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        self.server.serve(self._service, self._stop.is_set)
        self.server.close()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()


class HelperProcess:
    """This file as a process of its own; its output goes to a file that the test can read."""

    def __init__(self, role: str, output: Path, **options: Any) -> None:
        self._output = output
        with output.open("wb") as stream:
            self._process = processes.start(
                [sys.executable, __file__, role, json.dumps(options)],
                stdin=processes.PIPE,
                stdout=stream,
                stderr=stream,
            )
        self.pid = self._process.pid

    @property
    def words(self) -> str:
        return self._output.read_text()

    def says(self, words: str, timeout: float = TIMEOUT) -> bool:
        """Whether it prints `words` in time."""
        return eventually(lambda: words in self.words or not self.is_alive, timeout) and (
            words in self.words
        )

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def endpoint(self) -> Endpoint:
        """Where a worker listens, once it does."""
        assert self.says("listening\n"), self.words
        return parse_endpoint(self.words.split()[0])

    @property
    def segments(self) -> list[str]:
        """What it maps of the segments of sessions."""
        maps = Path(f"/proc/{self.pid}/maps").read_text().splitlines()
        return [line for line in maps if "/tsqp-" in line or "/memfd:tsqp-" in line]

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def worker_process(output: Path, endpoint: str, shm_folder: Path) -> HelperProcess:
    return HelperProcess("worker", output, endpoint=endpoint, shm_folder=str(shm_folder))


def client_process(output: Path, endpoint: Endpoint, shm_folder: Path) -> HelperProcess:
    return HelperProcess("client", output, endpoint=str(endpoint), shm_folder=str(shm_folder))


def _parent_is_gone() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])


def _work(endpoint: str, shm_folder: str) -> None:
    def log(line: str) -> None:
        print(line, flush=True)

    server = Server(parse_endpoint(endpoint), shm_folder=Path(shm_folder), log=log)
    log(f"{server.address} listening")
    server.serve(Echo(), _parent_is_gone)
    server.close()


def _connect(endpoint: str, shm_folder: str) -> None:
    channel = RemoteChannel(parse_endpoint(endpoint), hello(), shm_folder=Path(shm_folder))
    assert echoes(channel)
    print(f"connected over {channel.transport}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    {"worker": _work, "client": _connect}[sys.argv[1]](**json.loads(sys.argv[2]))
