"""How a client waits for an answer: it polls for quick ones, and sleeps for slow ones."""

import time
from pathlib import Path

from wire_helpers import TIMEOUT

from tsqp.wire.endpoint import parse_endpoint
from tsqp.wire.server_socket import ServerSocket
from tsqp.wire.zmq import ClientSocket


class Mail:
    """A mailbox in which mail arrives after a while; counts how often it is looked at."""

    def __init__(self, after_s: float) -> None:
        self._there_at = time.perf_counter() + after_s
        self.looks = 0

    @property
    def has_mail(self) -> bool:
        self.looks += 1
        return time.perf_counter() >= self._there_at

    def linger(self) -> bool:
        return self.has_mail

    def say_asleep(self, asleep: bool) -> None:
        pass


def test_a_client_polls_again_only_after_an_answer_that_was_quick(tmp_path: Path) -> None:
    server = ServerSocket(parse_endpoint(f"ipc://{tmp_path}/socket"))
    client = ClientSocket(parse_endpoint(f"ipc://{tmp_path}/socket"), TIMEOUT)

    def looks(after_s: float) -> int:
        mail = Mail(after_s)
        assert client.receive(time.monotonic() + TIMEOUT, mail) is None
        return mail.looks

    try:
        polling, sleeping = looks(0.15), looks(0.15)
        assert sleeping < 10 < polling  # two a tick, while it sleeps
        looks(0)
        assert looks(0.15) > 10
    finally:
        client.close()
        server.close()
