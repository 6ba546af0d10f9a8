"""Calls and answers that are posted in shared memory."""

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from wire_helpers import (
    TIMEOUT,
    Echo,
    HelperProcess,
    WorkerThread,
    begin,
    echoes,
    eventually,
    finish,
    hello,
)

import tsqp.wire.zmq
from tsqp.wire.client import RemoteChannel
from tsqp.wire.codec import worker_decoder
from tsqp.wire.mailbox import CAN_POLL, FLAG_BYTES, MAILBOX_BYTES, MAX_FRAME, SLOTS, Mailbox
from tsqp.wire.messages import Call, Operation, Probe

pytestmark = [
    pytest.mark.usefixtures("nothing_is_left"),
    pytest.mark.skipif(not CAN_POLL, reason="this processor reorders stores"),
]


def pair() -> tuple[Mailbox, Mailbox, memoryview]:
    """The mailboxes of a TEE and of a worker over the same memory."""
    memory = memoryview(bytearray(MAILBOX_BYTES))
    return Mailbox(memory, "tee"), Mailbox(memory, "worker"), memory


def connect(worker: WorkerThread | HelperProcess, shm_folder: Path) -> RemoteChannel:
    channel = RemoteChannel(worker.endpoint, hello(), shm_folder=shm_folder)
    assert channel.transport == "poll"
    return channel


@pytest.mark.parametrize("sender", ["tee", "worker"])
def test_thousands_of_frames_go_round_the_ring_in_order(sender: str) -> None:
    tee, worker, _ = pair()
    out, back = (tee, worker) if sender == "tee" else (worker, tee)
    dice = random.Random(5)
    unread: deque[bytes] = deque()
    for number in range(8000):
        if len(unread) < SLOTS and dice.random() < 0.6:
            frame = number.to_bytes(4, "little") + dice.randbytes(dice.randint(0, MAX_FRAME - 4))
            out.post(frame)
            unread.append(frame)
        else:
            assert back.has_mail == bool(unread)
            assert back.take() == (unread.popleft() if unread else None)
    assert not out.has_mail


@settings(max_examples=300)
@given(st.lists(st.none() | st.binary(max_size=MAX_FRAME), max_size=60))
def test_the_ring_is_a_queue(steps: list[bytes | None]) -> None:
    """Bytes are posted, None takes; a deque is the reference."""
    tee, worker, _ = pair()
    unread: deque[bytes] = deque()
    for step in steps:
        if step is not None and len(unread) < SLOTS:
            tee.post(step)
            unread.append(step)
        elif step is None:
            assert worker.take() == (unread.popleft() if unread else None)


def test_an_empty_mailbox_has_no_mail() -> None:
    for mailbox in pair()[:2]:
        assert not mailbox.has_mail
        assert mailbox.take() is None


def test_a_side_does_not_find_its_own_mail() -> None:
    tee, worker, _ = pair()
    tee.post(b"call")
    assert tee.take() is None
    worker.post(b"answer")
    assert (tee.take(), worker.take()) == (b"answer", b"call")


def test_posting_tells_whether_the_peer_sleeps() -> None:
    tee, worker, _ = pair()
    assert not tee.post(b"1")
    worker.say_asleep(True)
    tee.say_asleep(True)
    assert tee.post(b"2")
    assert worker.post(b"3")
    worker.say_asleep(False)
    assert not tee.post(b"4")
    assert worker.post(b"5")


def test_a_frame_that_is_rewritten_after_it_was_taken_stays_as_it_was() -> None:
    tee, worker, memory = pair()
    tee.post(b"first" * 40)
    taken = worker.take()
    memory[:] = b"\xff" * MAILBOX_BYTES
    assert taken == b"first" * 40


def test_calls_of_all_sizes_go_round_between_two_processes(
    worker: HelperProcess, shared_folder: Path
) -> None:
    channel = connect(worker, shared_folder)
    dice = random.Random(6)
    out: dict[int, Tensor] = {}
    for number in range(1500):
        sent = torch.full((dice.randint(1, 400),), float(number))
        out[begin(channel, sent)] = sent
        while len(out) > dice.randint(0, SLOTS - 1):
            ticket = dice.choice(sorted(out))
            assert torch.equal(finish(channel, ticket)[0], out.pop(ticket))
    for ticket, sent in out.items():
        assert torch.equal(finish(channel, ticket)[0], sent)
    channel.close()


class Gate(Echo):
    """Echoes as soon as it may."""

    def __init__(self, may_go: Callable[[], bool]) -> None:
        super().__init__()
        self.began = threading.Event()
        self.was_let_go: list[bool] = []
        self._may_go = may_go

    def run(
        self, operation: Operation, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        self.began.set()
        self.was_let_go.append(eventually(self._may_go))
        super().run(operation, inputs, outputs)


def messages_sent(channel: RemoteChannel, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What goes through the socket from now on."""
    sent: list[object] = []
    send = channel._socket.send

    def note(frames: Sequence[bytes]) -> None:
        sent.append(worker_decoder().decode(frames[0])[1])
        assert len(frames) == 1
        send(frames)

    monkeypatch.setattr(channel._socket, "send", note)
    return sent


def test_the_call_that_finds_the_ring_full_goes_through_the_socket(
    shm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    with WorkerThread("tcp://127.0.0.1:0", Gate(gate.is_set), shm_folder=shm_folder) as worker:
        channel = connect(worker, shm_folder)
        sent = messages_sent(channel, monkeypatch)
        tensors = [torch.full((3,), float(i)) for i in range(SLOTS + 2)]
        tickets = [begin(channel, tensor) for tensor in tensors[:SLOTS]]
        assert all(isinstance(message, Probe) for message in sent)
        channel.cancel(tickets[4])  # its place in the ring is taken until it was answered
        sent.clear()
        tickets += [begin(channel, tensor) for tensor in tensors[SLOTS:]]
        assert [type(message) for message in sent] == [Call, Call]
        gate.set()
        for i in (SLOTS, 3, 0, SLOTS + 1, 2, 1, *range(5, SLOTS)):
            assert torch.equal(finish(channel, tickets[i])[0], tensors[i])
        assert echoes(channel)
        sent.clear()
        assert echoes(channel)
        assert Call not in [type(message) for message in sent]
        channel.close()


def is_asleep(channel: RemoteChannel, side: str) -> bool:
    """What the flag of a side says, which is the first byte of its cache line."""
    assert channel._segment is not None
    return bool(channel._segment.memory(MAILBOX_BYTES)[0 if side == "tee" else FLAG_BYTES])


@pytest.fixture
def long_sleep(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Lets those who sleep from now on sleep for longer than any test waits."""
    yield lambda: monkeypatch.setattr(tsqp.wire.zmq, "TICK_MS", int(TIMEOUT * 3000))


def test_a_sleeping_worker_is_woken(
    shm_folder: Path, long_sleep: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with WorkerThread("tcp://127.0.0.1:0", shm_folder=shm_folder) as worker:
        channel = connect(worker, shm_folder)
        long_sleep()
        for value in range(3):
            start = time.monotonic()
            assert echoes(channel, value)
            assert time.monotonic() - start < TIMEOUT
            assert eventually(lambda: is_asleep(channel, "worker"))
        monkeypatch.undo()
        sent = messages_sent(channel, monkeypatch)
        assert echoes(channel)
        assert [type(message) for message in sent] == [Probe]
        channel.close()


def test_a_sleeping_client_is_woken(
    shm_folder: Path, long_sleep: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    channels: list[RemoteChannel] = []
    service = Gate(lambda: is_asleep(channels[0], "tee"))
    with WorkerThread("tcp://127.0.0.1:0", service, shm_folder=shm_folder) as worker:
        channels.append(connect(worker, shm_folder))
        long_sleep()
        start = time.monotonic()
        assert echoes(channels[0])
        assert time.monotonic() - start < TIMEOUT
        monkeypatch.undo()
        assert service.was_let_go == [True]
        channels[0].close()


def test_a_client_that_polls_is_not_asleep_afterwards(
    worker: HelperProcess, shared_folder: Path
) -> None:
    channel = connect(worker, shared_folder)
    finish(channel, begin(channel, torch.ones(1), group="sleep", layer=30))
    assert not is_asleep(channel, "tee")
    channel.close()
