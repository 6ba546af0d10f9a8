"""A peer that sends much and hangs up: libzmq must not abort this process at its next heartbeat."""

import sys
import time
from pathlib import Path
from typing import Self

import pytest
import zmq
from wire_helpers import TIMEOUT

import processes

MESSAGES = 100  # more than libzmq's reader takes at once
BEGIN = """
import sys, time
import tsqp.wire.zmq
tsqp.wire.zmq.HEARTBEAT_MS = 100
from tsqp.wire.endpoint import parse_endpoint
"""
WORKER = f"""{BEGIN}
from tsqp.wire.server_socket import ServerSocket
from tsqp.wire.wakeup import NO_WAKEUP
worker = ServerSocket(parse_endpoint(sys.argv[1]))
print(worker.address, flush=True)
sys.stdin.readline()  # the client has hung up
time.sleep(0.5)
received = 0
while worker.receive(NO_WAKEUP, wait=True, spin=False) is not None:
    received += 1
print(received, flush=True)
worker.close()
"""
CLIENT = f"""{BEGIN}
from tsqp.errors import WorkerLost
from tsqp.wire.zmq import ClientSocket
client = ClientSocket(parse_endpoint(sys.argv[1]), {TIMEOUT})
client.send([b"hello"])
sys.stdin.readline()  # the worker has hung up
time.sleep(0.5)
try:
    client.send([b"again"])
except WorkerLost:
    print("lost", flush=True)
client.close()
"""


@pytest.fixture(params=["tcp://127.0.0.1:0", "ipc"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/socket" if request.param == "ipc" else str(request.param)


class Script:
    """Runs a script in a process of its own, which waits for a line after its first part."""

    def __init__(self, script: str, address: str) -> None:
        pipe = processes.PIPE
        command = [sys.executable, "-c", script, address]
        self.process = processes.start(command, stdin=pipe, stdout=pipe, stderr=pipe)

    def first_line(self) -> str:
        return str(self.process.stdout.readline().strip())

    def goes_on(self) -> str:
        """What it prints then, once it has ended without an error."""
        self.process.stdin.write("\n")
        self.process.stdin.close()
        status = self.process.wait(TIMEOUT)
        assert (status, self.process.stderr.read()) == (0, "")
        return str(self.process.stdout.read().strip())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(TIMEOUT)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            stream.close()


def test_a_worker_outlives_a_client_that_sends_much_and_hangs_up(address: str) -> None:
    with Script(WORKER, address) as worker, zmq.Context() as context:
        client = context.socket(zmq.DEALER)
        client.connect(worker.first_line())
        for _ in range(MESSAGES):
            client.send(b"x" * 100)
        time.sleep(0.3)
        client.close(linger=0)
        assert worker.goes_on() == str(MESSAGES)


def test_the_trusted_side_outlives_a_worker_that_sends_much_and_hangs_up(address: str) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as liar:
        liar.set(zmq.RCVTIMEO, int(TIMEOUT * 1000))
        liar.bind(address)
        with Script(CLIENT, liar.get(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()) as client:
            identity, _ = liar.recv_multipart()
            for _ in range(MESSAGES):
                liar.send_multipart([identity, b"x" * 100])
            time.sleep(0.3)
            liar.close(linger=0)
            assert client.goes_on() == "lost"
