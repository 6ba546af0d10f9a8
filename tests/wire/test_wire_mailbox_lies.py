"""What a lying peer can do with the rings in the segment: nothing but end its own session."""

import itertools
import random
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from wire_helpers import (
    SEGMENT,
    Echo,
    HelperProcess,
    WorkerThread,
    begin,
    echoes,
    eventually,
    finish,
    hello,
)
from wire_peers import PostingClient, PostingLiar

import tsqp.wire.zmq
from tsqp.errors import HandshakeError, ProtocolError, RemoteError, WorkerError, WorkerLost
from tsqp.wire.client import RemoteChannel
from tsqp.wire.codec import encode, tee_decoder, worker_decoder
from tsqp.wire.mailbox import (
    CAN_POLL,
    HEADER_BYTES,
    MAILBOX_BYTES,
    MAX_FRAME,
    SLOT_BYTES,
    SLOTS,
    Mailbox,
)
from tsqp.wire.messages import (
    INLINE,
    Attach,
    Bye,
    Call,
    Failure,
    Linear,
    Message,
    Operation,
    Probe,
    Result,
    TensorRef,
)

pytestmark = [
    pytest.mark.usefixtures("nothing_is_left"),
    pytest.mark.skipif(not CAN_POLL, reason="this processor reorders stores"),
]

Slot = tuple[int, int, bytes]  # sequence number, length, content
ROOM = 2**15  # a place in the segment behind the mailbox
LENGTHS = [MAX_FRAME + 1, SLOT_BYTES, 2**31, 2**63, 2**64 - 1]


def call(input_offset: int = ROOM, output_offset: int = 2 * ROOM, count: int = 4) -> Call:
    refs = [TensorRef("float32", (count,), offset) for offset in (input_offset, output_offset)]
    return Call(Linear(0, "echo"), (refs[0],), (refs[1],))


@settings(max_examples=1000)
@given(st.binary(max_size=64), st.integers(0, 2**32), st.lists(st.integers(0, 2**64 - 1)))
def test_a_ring_of_anything_gives_bounded_frames_that_are_refused(
    seed: bytes, noise: int, lengths: list[int]
) -> None:
    """Each slot has the right number, so that all of them are read; the rest is noise."""
    memory = memoryview(bytearray(random.Random(noise).randbytes(MAILBOX_BYTES)))
    mailbox = Mailbox(memory, "tee")
    for count in range(1, SLOTS + 1):
        start = MAILBOX_BYTES - SLOTS * SLOT_BYTES + count % SLOTS * SLOT_BYTES
        length = lengths[count] if count < len(lengths) else len(seed)
        memory[start : start + HEADER_BYTES + len(seed)] = struct.pack("<QQ", count, length) + seed
        frame = mailbox.take()
        assert frame is not None
        assert len(frame) == (length if length <= MAX_FRAME else 0)
        for decoder in (tee_decoder("x"), worker_decoder()):
            with pytest.raises((ProtocolError, HandshakeError)):
                decoder.decode(frame)


# What a lying worker posts. The one call that is out has ticket 1.

RESULT = encode(Result(0), 1)


def flipped(bit: int) -> bytes:
    changed = bytearray(RESULT)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


refused_frames = (
    st.binary(max_size=MAX_FRAME)
    # The last byte is the time, in which a flipped bit would make another good answer.
    | st.integers(0, (len(RESULT) - 1) * 8 - 1).map(flipped)
    | st.integers(0, len(RESULT) - 1).map(lambda length: RESULT[:length])
    | st.binary(min_size=1, max_size=20).map(RESULT.__add__)
    | st.sampled_from([0, 2, 3, 2**64 - 1]).map(lambda ticket: encode(Result(0), ticket))
    | st.sampled_from(["refused", "protocol", "error"]).map(
        lambda kind: encode(Failure(kind, "no"), 1)
    )
    | st.sampled_from([Bye(), Attach(True, True), call()]).map(lambda message: encode(message, 1))
)


@st.composite
def lies(draw: st.DrawFn) -> list[Slot]:
    """A row of slots, none of which is a good answer to the call that is out."""
    slots = []
    for number in range(1, draw(st.integers(1, 4)) + 1):
        frame = draw(refused_frames | st.just(encode(Probe())))
        lengths = st.sampled_from([0, *LENGTHS]) | st.integers(0, 2**64 - 1)
        wrong_length = lengths.filter(lambda length: length != len(RESULT))
        length = draw(st.just(len(frame)) | wrong_length)
        wrong_number = st.sampled_from([0, number + SLOTS, 2**64 - 1])
        is_seen = draw(st.integers(0, 9)) > 0
        slots.append((number if is_seen else draw(wrong_number), length, frame))
    return slots


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(lies())
@example([(1, 2**64 - 1, RESULT)])
@example([(1 + SLOTS, len(RESULT), RESULT)])
@example([(1, 24, encode(Probe())), (2, 20, RESULT)])
def test_a_worker_that_posts_lies_gets_no_answer_believed(
    shm_folder: Path, monkeypatch: pytest.MonkeyPatch, slots: list[Slot]
) -> None:
    monkeypatch.setattr(tsqp.wire.zmq, "TICK_MS", 5)
    with PostingLiar(shm_folder) as liar:
        channel = RemoteChannel(liar.endpoint, hello(), shm_folder=shm_folder)
        assert channel.transport == "poll"
        ticket = begin(channel, torch.ones(4))
        for number, (sequence, length, frame) in enumerate(slots, 1):
            liar.fill(number, sequence, length, frame)
        with pytest.raises(WorkerError) as caught:
            finish(channel, ticket, 0.02)
        if not isinstance(caught.value, RemoteError):
            with pytest.raises(WorkerLost, match="has ended"):
                begin(channel, torch.ones(4))
        channel.close()


@pytest.fixture
def liar(shm_folder: Path) -> Iterator[PostingLiar]:
    with PostingLiar(shm_folder) as liar:
        yield liar


@pytest.fixture
def deceived(liar: PostingLiar, shm_folder: Path) -> Iterator[RemoteChannel]:
    """A channel to the liar."""
    channel = RemoteChannel(liar.endpoint, hello(), shm_folder=shm_folder)
    assert channel.transport == "poll"
    yield channel
    channel.close()


def test_a_posted_answer_is_taken_with_what_lies_at_its_place(
    liar: PostingLiar, deceived: RemoteChannel
) -> None:
    ticket = begin(deceived, torch.ones(4))
    place = deceived._calls[ticket].refs[1].offset
    liar.segment.tensor(place, (4,), torch.float32).fill_(9.0)
    liar.answer(1, encode(Probe()))
    liar.answer(2, RESULT)
    assert finish(deceived, ticket)[0].tolist() == [9.0] * 4


def test_a_posted_answer_to_one_call_is_none_to_another(
    liar: PostingLiar, deceived: RemoteChannel
) -> None:
    tickets = [begin(deceived, torch.ones(4)) for _ in range(2)]
    liar.answer(1, encode(Result(1), tickets[1]))
    with pytest.raises(WorkerLost, match="stopped answering"):
        finish(deceived, tickets[0], 0.1)


def test_a_posted_answer_that_comes_again_is_refused(
    liar: PostingLiar, deceived: RemoteChannel
) -> None:
    liar.answer(1, RESULT)
    liar.answer(2, RESULT)
    finish(deceived, begin(deceived, torch.ones(4)))
    with pytest.raises(ProtocolError, match="answered a call that is not open"):
        finish(deceived, begin(deceived, torch.ones(4)))


def test_a_posted_answer_to_an_inline_call_is_refused(
    liar: PostingLiar, deceived: RemoteChannel
) -> None:
    ticket = begin(deceived, torch.ones(SEGMENT))
    liar.answer(1, RESULT)
    with pytest.raises(ProtocolError, match="0 tensors where 1 are due"):
        finish(deceived, ticket)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_posted_answer_of_an_impossible_length_is_refused(
    liar: PostingLiar, deceived: RemoteChannel, length: int
) -> None:
    liar.fill(1, 1, length, RESULT)
    with pytest.raises(ProtocolError, match="a message of 0 bytes"):
        finish(deceived, begin(deceived, torch.ones(4)))


def test_a_ring_full_of_probes_does_not_hold_up_the_deadline(
    liar: PostingLiar, deceived: RemoteChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert deceived._mailbox is not None
    take = deceived._mailbox.take
    numbers = itertools.count(1)

    def take_another() -> bytes | None:
        liar.answer(next(numbers), encode(Probe()))
        return take()

    monkeypatch.setattr(deceived._mailbox, "take", take_another)
    with pytest.raises(WorkerLost, match="probes instead of answers"):
        finish(deceived, begin(deceived, torch.ones(4)), 0.2)
    assert next(numbers) > SLOTS


# What a lying client posts.


def refusal_of(busy: WorkerThread, client: PostingClient) -> str:
    """Why the worker sends a client away, which ends its session."""
    reply = client.receive()
    assert isinstance(reply, Failure)
    assert reply.kind == "protocol"
    assert eventually(lambda: len(busy.server.sessions) == 1)
    return reply.message


def test_a_posted_call_is_done(busy: WorkerThread, shm_folder: Path) -> None:
    with PostingClient(busy.endpoint) as client:
        client.segment.tensor(ROOM, (4,), torch.float32).fill_(3.0)
        client.post(encode(call(), 5))
        ticket, answer = client.take()
        assert (ticket, type(answer)) == (5, Result)
        assert client.segment.tensor(2 * ROOM, (4,), torch.float32).tolist() == [3.0] * 4


@pytest.mark.parametrize(
    "message",
    [Probe(), Bye(), Attach(True, True), Attach(False, False), hello()],
    ids=lambda message: type(message).__name__,
)
def test_a_posted_message_that_is_no_call_is_refused(
    busy: WorkerThread, shm_folder: Path, message: Message
) -> None:
    with PostingClient(busy.endpoint) as client:
        client.post(encode(message, 1))
        assert "posted something that is not a call" in refusal_of(busy, client)


def test_a_posted_call_that_comes_again_is_refused(busy: WorkerThread, shm_folder: Path) -> None:
    with PostingClient(busy.endpoint) as client:
        client.post(encode(call(), 7))
        assert client.take()[0] == 7
        client.post(encode(call(), 7))
        assert "same call twice" in refusal_of(busy, client)


def test_a_posted_call_may_be_overtaken_by_one_on_the_socket(
    busy: WorkerThread, shm_folder: Path
) -> None:
    with PostingClient(busy.endpoint) as client:
        client.send(encode(call(), 9))
        assert isinstance(client.receive(), Result)
        client.post(encode(call(), 8))
        assert client.take()[0] == 8
        client.post(encode(call(), 10))
        assert client.take()[0] == 10


def test_a_posted_call_cannot_bring_its_tensor_inline(busy: WorkerThread, shm_folder: Path) -> None:
    with PostingClient(busy.endpoint) as client:
        client.post(encode(call(input_offset=INLINE), 1))
        assert "not in shared memory" in refusal_of(busy, client)


def test_a_posted_call_does_not_take_the_tensors_of_another_message(
    busy: WorkerThread, shm_folder: Path
) -> None:
    with PostingClient(busy.endpoint) as client:
        client.mailbox.post(encode(call(input_offset=INLINE), 1))
        client.send(encode(call(input_offset=INLINE), 2), bytes(16))
        replies = {type(client.receive()) for _ in range(2)}
        assert Failure in replies
        assert eventually(lambda: len(busy.server.sessions) == 1)


def test_a_posted_call_gets_no_tensor_back_on_the_socket(
    busy: WorkerThread, shm_folder: Path
) -> None:
    """A worker may refuse such a call, or answer it without the tensor."""
    with PostingClient(busy.endpoint) as client:
        client.post(encode(call(output_offset=INLINE), 1))
        client.send(encode(Bye()))  # to whose session the second is said, there is none
        client.send(encode(Bye()))
        frames = []
        while not frames or b"before its handshake" not in frames[-1]:
            frames += client.receive_frames()
        assert max(map(len, frames)) < 300
        assert bytes(16) not in frames


@pytest.mark.parametrize("length", LENGTHS)
def test_a_posted_call_of_an_impossible_length_is_refused(
    busy: WorkerThread, shm_folder: Path, length: int
) -> None:
    with PostingClient(busy.endpoint) as client:
        client.fill(1, 1, length, encode(call(), 1))
        client.wake()
        assert "a message of 0 bytes" in refusal_of(busy, client)


@pytest.mark.parametrize("offset", [1, SEGMENT - 8, 2**48])
def test_a_posted_call_cannot_reach_outside_its_segment(
    busy: WorkerThread, shm_folder: Path, offset: int
) -> None:
    with PostingClient(busy.endpoint) as client:
        client.post(encode(call(output_offset=offset), 1))
        assert "does not lie inside" in refusal_of(busy, client)


class Slow(Echo):
    """Takes its time over a call, and lets a test know."""

    def __init__(self) -> None:
        super().__init__()
        self.began, self.may_end = threading.Event(), threading.Event()

    def run(
        self, operation: Operation, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        self.began.set()
        assert self.may_end.wait(8)
        super().run(operation, inputs, outputs)


def test_a_posted_call_that_is_rewritten_while_it_runs_stays_as_it_was(shm_folder: Path) -> None:
    service = Slow()
    with (
        WorkerThread("tcp://127.0.0.1:0", service, shm_folder=shm_folder) as worker,
        PostingClient(worker.endpoint) as client,
    ):
        client.segment.tensor(ROOM, (4,), torch.float32).fill_(2.0)
        client.post(encode(call(), 5))
        assert service.began.wait(8)
        client.fill(1, 1, 2**40, encode(call(3 * ROOM, 4 * ROOM), 6))
        service.may_end.set()
        assert client.take()[0] == 5
        assert client.segment.tensor(2 * ROOM, (4,), torch.float32).tolist() == [2.0] * 4
        assert client.segment.tensor(4 * ROOM, (4,), torch.float32).tolist() == [0.0] * 4


offsets = st.sampled_from([INLINE, 0, 64, 128, ROOM, SEGMENT - 64, SEGMENT, 2**48])
calls = st.builds(
    lambda first, second, count, ticket: encode(call(first, second, count), ticket),
    offsets,
    offsets,
    st.sampled_from([1, 4, 2**10, 2**31 - 1]),
    st.integers(0, 3),
)
anything = st.binary(max_size=MAX_FRAME) | calls | refused_frames


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(anything, st.none() | st.integers(0, 2**64 - 1)), max_size=20))
def test_nothing_that_is_posted_disturbs_a_worker(
    worker: HelperProcess, shared_folder: Path, posts: list[tuple[bytes, int | None]]
) -> None:
    """Also calls whose tensors lie in the rings themselves."""
    with PostingClient(worker.endpoint) as client:
        for number, (frame, length) in enumerate(posts, 1):
            client.fill(number % SLOTS, number, len(frame) if length is None else length, frame)
            client.wake()
        client.send(encode(Bye()))
    channel = RemoteChannel(worker.endpoint, hello(), shm_folder=shared_folder)
    assert channel.transport == "poll"
    assert echoes(channel)
    channel.close()
