"""Sessions take turns: each gets one call, whichever way it asks.

The order is that of a worker whose socket and mailboxes are full before it looks at them.
"""

from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import Tensor
from wire_helpers import SEGMENT, TIMEOUT, Echo, WorkerThread, begin, finish, hello
from wire_peers import Frames, PostingClient

import tsqp.wire.server
from tsqp.errors import ProtocolError
from tsqp.wire.client import RemoteChannel
from tsqp.wire.codec import encode, tee_decoder
from tsqp.wire.endpoint import parse_endpoint
from tsqp.wire.mailbox import CAN_POLL, MAILBOX_BYTES, Mailbox
from tsqp.wire.messages import (
    INLINE,
    Attach,
    Bye,
    Call,
    Linear,
    Operation,
    Probe,
    SealedRef,
    TensorRef,
    Welcome,
)
from tsqp.wire.server import Server
from tsqp.wire.shm import SealedSegment

pytestmark = [
    pytest.mark.usefixtures("nothing_is_left"),
    pytest.mark.skipif(not CAN_POLL, reason="no mailboxes here"),
]

FLOATS = bytes(16)
PLACE = 2 * MAILBOX_BYTES // 64 * 64  # of tensors in a segment


def call(layer: int, offset: int = INLINE) -> Call:
    """A call that says by its layer who asks."""
    ref = TensorRef("float32", (4,), offset)
    return Call(Linear(layer, "echo"), (ref,), (ref,))


class Order(Echo):
    """Notes by their layers in which order calls are done."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[int] = []

    def run(
        self, operation: Operation, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        assert isinstance(operation, Linear)
        self.done.append(operation.layer)


class Script:
    """A socket that gives one message of each peer in turn, as libzmq does, of those queued."""

    def __init__(self, *_: object) -> None:
        self.queues: dict[bytes, deque[Frames]] = {}
        self.sent: dict[bytes, list[bytes]] = {}
        self.client = "unknown"
        self.address = "ipc://nowhere"
        self.is_empty = False
        self._turns: deque[bytes] = deque()
        self._rest: list[bytes] = []

    def queue(self, peer: bytes, *messages: Frames) -> None:
        self.queues.setdefault(peer, deque()).extend(messages)
        if peer not in self._turns:
            self._turns.append(peer)

    def measure(self) -> None:
        pass

    def receive(self, *_: object, wait: bool, spin: bool) -> tuple[bytes, memoryview] | None:
        assert not self._rest, "a message was taken in part"
        for _ in range(len(self._turns)):
            peer = self._turns[0]
            self._turns.rotate(-1)
            if self.queues[peer]:
                first, *self._rest = self.queues[peer].popleft()
                return peer, memoryview(first)
        self.is_empty = self.is_empty or wait
        return None

    def receive_exactly(self, buffers: Sequence[memoryview], sender: str) -> None:
        rest, self._rest = self._rest, []
        if len(rest) != len(buffers):
            raise ProtocolError(f"{sender} sent {len(rest)} tensors.")

    def drain(self) -> None:
        self._rest = []

    def send(self, peer: bytes, frames: Frames, *, wait: bool) -> bool:
        self.sent.setdefault(peer, []).append(bytes(frames[0]))
        return True

    def probe(self, peer: bytes, frame: bytes) -> bool:
        return True

    def a_peer_left(self) -> bool:
        return False

    def close(self) -> None:
        pass


class Bench:
    """A server on a scripted socket, with sessions that post and sessions that do not."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tsqp.wire.server, "ServerSocket", Script)
        self.order = Order()
        self.server = Server(parse_endpoint("ipc://nowhere"), shm_folder=folder)
        self.script: Any = self.server._socket
        self.folder = folder
        self._segments: list[SealedSegment] = []
        self._mailboxes: dict[int, Mailbox] = {}

    def serve(self) -> list[int]:
        """Who was served, in order, until nothing is left to do."""
        self.script.is_empty = False
        self.server.serve(self.order, lambda: self.script.is_empty)
        return self.order.done

    def open(self, *, posting: Sequence[int] = (), sending: Sequence[int] = ()) -> None:
        """Begin sessions that have a mailbox, and sessions that have none."""
        for numbers, shm_bytes in ((posting, SEGMENT), (sending, 0)):
            for number in numbers:
                self.script.queue(bytes([number]), [encode(hello(shm_bytes=shm_bytes))])
        self.serve()
        for number in posting:
            peer = bytes([number])
            _, greeting = tee_decoder("a test").decode(self.script.sent[peer][0])
            assert isinstance(greeting, Welcome)
            ref = greeting.segment
            assert isinstance(ref, SealedRef)
            segment = SealedSegment.open(ref.pid, ref.descriptor, ref.size)
            self._segments.append(segment)
            self._mailboxes[number] = Mailbox(segment.memory(MAILBOX_BYTES), "tee")
            self.script.queue(peer, [encode(Attach(True, True))])
        self.serve()

    def send(self, number: int, calls: int) -> None:
        """Queue calls at the socket."""
        tickets = range(1, calls + 1)
        messages = ([encode(call(number), ticket), FLOATS] for ticket in tickets)
        self.script.queue(bytes([number]), *messages)

    def post(self, number: int, calls: int) -> None:
        """Queue calls in the mailbox."""
        for ticket in range(1, calls + 1):
            self._mailboxes[number].post(encode(call(number, PLACE), ticket))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.close()
        self._mailboxes.clear()
        for segment in self._segments:
            segment.close()


@pytest.fixture
def bench(shm_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    with Bench(shm_folder, monkeypatch) as bench:
        yield bench


def most_between(done: Sequence[int], waiting: int, other: int) -> int:
    """Calls of `other` between two of `waiting`, or before the first, at most."""
    places = [-1, *(place for place, number in enumerate(done) if number == waiting)]
    return max(done[first + 1 : last].count(other) for first, last in pairwise(places))


def test_sessions_that_flood_take_turns_with_one_that_asks_now_and_then(bench: Bench) -> None:
    calls = 15
    bench.open(posting=(1, 2, 7), sending=(3, 4, 5, 6))
    for number in (1, 2):
        bench.post(number, calls)
    for number in (3, 4, 5):
        bench.send(number, calls)
    bench.send(6, 2)
    bench.post(7, 2)
    done = bench.serve()
    assert sorted(done) == sorted([*(calls * [1, 2, 3, 4, 5]), 6, 6, 7, 7])
    for waiting in range(1, 8):
        for other in range(1, 8):
            if other != waiting:
                assert most_between(done, waiting, other) <= 1, (waiting, other, done)


def test_a_session_that_posts_and_sends_gets_one_turn_for_both(bench: Bench) -> None:
    bench.open(posting=(1, 2), sending=(3,))
    for number in (1, 2):
        bench.post(number, 10)
    for number in (1, 3):
        bench.send(number, 10)
    done = bench.serve()
    assert len(done) == 40
    for waiting in (2, 3):
        assert most_between(done, waiting, 1) <= 1, done


def test_probes_keep_nobody_waiting(bench: Bench) -> None:
    bench.open(posting=(1,), sending=(2, 3))
    bench.post(1, 5)
    bench.script.queue(b"\x03", *([encode(Probe())] for _ in range(50)))
    bench.send(2, 5)
    done = bench.serve()
    assert len(done) == 10
    for waiting, other in ((1, 2), (2, 1)):
        assert most_between(done, waiting, other) <= 1, done


def test_a_message_of_a_session_that_ended_before_its_turn_is_refused(bench: Bench) -> None:
    bench.open(posting=(1,), sending=(2,))
    bench.post(1, 3)
    bench.send(2, 1)
    bench.script.queue(b"\x02", [encode(Bye())], [encode(call(2), 2), FLOATS])
    assert sorted(bench.serve()) == [1, 1, 1, 2]
    assert set(bench.server.sessions) == {b"\x01"}


class Flood(Order):
    """Each call of layer 1 posts the next one, so that there is always one."""

    post: Any = None
    ended = False

    def run(self, *arguments: Any) -> None:
        super().run(*arguments)
        if self.done[-1] == 1 and not self.ended:
            self.post()


def test_a_flood_of_mail_keeps_no_socket_waiting(tmp_path: Path, shm_folder: Path) -> None:
    flood = Flood()
    with (
        WorkerThread(f"ipc://{tmp_path}/socket", flood, shm_folder=shm_folder) as worker,
        PostingClient(worker.endpoint) as client,
        ExitStack() as stack,
    ):
        tickets = iter(range(1, 10**9))
        flood.post = lambda: client.mailbox.post(encode(call(1, PLACE), next(tickets)))
        askers = [RemoteChannel(worker.endpoint, hello(shm_bytes=0)) for _ in range(2)]
        for channel in askers:
            stack.callback(channel.close)
        client.post(encode(call(1, PLACE), next(tickets)))
        for _ in range(10):
            for number, channel in enumerate(askers, 2):
                finish(channel, begin(channel, torch.ones(4), layer=number), TIMEOUT)
        flood.ended = True
        for asker in (2, 3):
            assert flood.done.count(asker) == 10
            assert most_between(flood.done, 1, asker) <= 1
