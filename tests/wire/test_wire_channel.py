"""One session between a client and an honest worker, over every carrier."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from wire_helpers import (
    SEGMENT,
    TIMEOUT,
    Echo,
    HelperProcess,
    WorkerThread,
    begin,
    echoes,
    finish,
    hello,
    mapped_segments,
    specs_of,
)

import tsqp.wire.client
from tsqp.errors import RemoteError, WorkerLost
from tsqp.wire.channel import Channel, InprocChannel
from tsqp.wire.client import RemoteChannel
from tsqp.wire.mailbox import CAN_POLL, MAILBOX_BYTES
from tsqp.wire.messages import Linear
from tsqp.wire.tensors import Spec

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def connect(worker: HelperProcess, folder: Path, shm_bytes: int = SEGMENT) -> RemoteChannel:
    return RemoteChannel(worker.endpoint, hello(shm_bytes=shm_bytes), shm_folder=folder)


needs_polling = pytest.mark.skipif(not CAN_POLL, reason="this processor reorders stores")


@pytest.fixture(
    params=[
        pytest.param("tcp-poll", marks=needs_polling),
        "tcp-shm",
        "tcp-inline",
        pytest.param("ipc-poll", marks=needs_polling),
        "ipc-shm",
        "ipc-inline",
        "inproc",
    ]
)
def channel(
    request: pytest.FixtureRequest,
    worker: HelperProcess,
    ipc_worker: HelperProcess,
    shared_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Channel]:
    """One after the other, over every carrier."""
    channel: Channel
    if request.param == "inproc":
        channel = InprocChannel(Echo(), hello())
    else:
        carrier, _, transport = request.param.partition("-")
        process = worker if carrier == "tcp" else ipc_worker
        monkeypatch.setattr(tsqp.wire.client, "CAN_POLL", transport == "poll")
        channel = connect(process, shared_folder, 0 if transport == "inline" else SEGMENT)
        assert channel.transport == transport
    yield channel
    channel.close()
    channel.close()


@pytest.fixture(params=[pytest.param("poll", marks=needs_polling), "shm"])
def shm_channel(
    request: pytest.FixtureRequest,
    worker: HelperProcess,
    shared_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[RemoteChannel]:
    """Tensors in shared memory, and messages there too or on the socket."""
    monkeypatch.setattr(tsqp.wire.client, "CAN_POLL", request.param == "poll")
    channel = connect(worker, shared_folder)
    assert channel.transport == request.param
    yield channel
    channel.close()


@pytest.fixture
def inline_channel(worker: HelperProcess, shared_folder: Path) -> Iterator[RemoteChannel]:
    channel = connect(worker, shared_folder, shm_bytes=0)
    yield channel
    channel.close()


TENSORS = {
    "float32": torch.tensor([[0.1, -0.0, float("inf")], [1e-45, -3e38, 7.0]]),
    "bfloat16": torch.arange(2**16).to(torch.uint16).view(torch.bfloat16),  # every bit pattern
    "float16": torch.arange(2**16).to(torch.uint16).view(torch.float16),
    "int64": torch.tensor([[[2**63 - 1]], [[-(2**63)]], [[0]]]),
}


@pytest.mark.parametrize("sent", TENSORS.values(), ids=TENSORS)
def test_tensors_come_back_bit_for_bit(channel: Channel, sent: Tensor) -> None:
    (received,) = finish(channel, begin(channel, sent))
    assert received.dtype == sent.dtype
    assert received.shape == sent.shape
    assert torch.equal(received.view(torch.uint8), sent.view(torch.uint8))


def test_a_call_may_have_several_tensors(channel: Channel) -> None:
    for received, sent in zip(
        finish(channel, begin(channel, *TENSORS.values())), TENSORS.values(), strict=True
    ):
        assert torch.equal(received.view(torch.uint8), sent.view(torch.uint8))


def test_answers_may_be_taken_in_any_order(channel: Channel) -> None:
    sent = [torch.full((4, 4), float(i)) for i in range(6)]
    tickets = [begin(channel, tensor) for tensor in sent]
    for i in (1, 5, 0, 4, 3, 2):
        assert torch.equal(finish(channel, tickets[i])[0], sent[i])


def test_a_failure_carries_the_remote_traceback_and_the_session_goes_on(channel: Channel) -> None:
    good = begin(channel, torch.ones(3))
    bad = begin(channel, torch.ones(3), group="raise", layer=41)
    with pytest.raises(RemoteError, match="boom number 41") as caught:
        finish(channel, bad)
    assert "ValueError: boom number 41" in caught.value.remote_traceback
    assert "wire_helpers.py" in caught.value.remote_traceback
    assert torch.equal(finish(channel, good)[0], torch.ones(3))
    assert echoes(channel)


def test_a_cancelled_call_disturbs_no_other(channel: Channel) -> None:
    cancelled = begin(channel, torch.zeros(3))
    kept = begin(channel, torch.ones(3))
    channel.cancel(cancelled)
    channel.cancel(cancelled)
    assert torch.equal(finish(channel, kept)[0], torch.ones(3))
    assert echoes(channel)


def test_counters_count_calls_tensors_and_time_by_kind(channel: Channel) -> None:
    for _ in range(3):
        finish(channel, begin(channel, torch.ones(10, 10)))
    sleeping = begin(channel, torch.ones(1), group="sleep", layer=30)
    finish(channel, sleeping)
    counters = channel.counters
    assert counters.calls == {"linear": 4}
    assert counters.sent_bytes == counters.received_bytes == 3 * 400 + 4
    assert 0.03 <= counters.compute_s["linear"] < TIMEOUT


def test_many_calls_leave_the_whole_segment_free(shm_channel: RemoteChannel) -> None:
    for i in range(200):
        tickets = [begin(shm_channel, torch.full((i + 1,), float(i))) for _ in range(3)]
        if i % 3 == 0:
            shm_channel.cancel(tickets.pop(0))
        for ticket in tickets:
            assert finish(shm_channel, ticket)[0][0] == i
    whole = [Spec(((SEGMENT - MAILBOX_BYTES) // 8,), torch.float32)]
    slot = shm_channel.reserve(Linear(0, "echo"), whole, whole)
    assert slot.place == MAILBOX_BYTES


def test_answers_are_read_where_the_worker_wrote_them(shm_channel: RemoteChannel) -> None:
    specs = [Spec((4,), torch.float32)]
    slot = shm_channel.reserve(Linear(0, "echo"), specs, specs)
    address = slot.outputs[0].data_ptr()
    slot.inputs[0].fill_(2.0)
    with shm_channel.wait(shm_channel.submit(slot), time.monotonic() + TIMEOUT) as reply:
        assert reply.outputs[0].data_ptr() == address
        assert reply.outputs[0].tolist() == [2.0] * 4
    assert list(reply.outputs) == []


def test_memory_of_a_cancelled_call_is_reused_only_after_its_answer(
    shm_channel: RemoteChannel,
) -> None:
    specs = [Spec((64,), torch.float32)]
    slow = shm_channel.reserve(Linear(300, "sleep"), specs, specs)
    place = slow.place
    shm_channel.cancel(shm_channel.submit(slow))
    meanwhile = shm_channel.reserve(Linear(0, "echo"), specs, specs)
    assert meanwhile.place != place
    meanwhile.inputs[0].fill_(5.0)
    ticket = shm_channel.submit(meanwhile)
    assert torch.equal(finish(shm_channel, ticket)[0], torch.full((64,), 5.0))
    afterwards = shm_channel.reserve(Linear(0, "echo"), specs, specs)
    assert afterwards.place == place


def test_a_call_that_is_cancelled_after_its_answer_gives_its_memory_back(
    shm_channel: RemoteChannel,
) -> None:
    specs = [Spec((64,), torch.float32)]
    early = shm_channel.reserve(Linear(0, "echo"), specs, specs)
    place = early.place
    ticket = shm_channel.submit(early)
    assert echoes(shm_channel)
    shm_channel.cancel(ticket)
    assert shm_channel.reserve(Linear(0, "echo"), specs, specs).place == place


def test_a_cancelled_inline_call_is_received_and_dropped(inline_channel: RemoteChannel) -> None:
    ticket = begin(inline_channel, torch.ones(2**16), group="sleep", layer=100)
    inline_channel.cancel(ticket)
    assert echoes(inline_channel)


def test_a_call_larger_than_the_segment_goes_inline(shm_channel: RemoteChannel) -> None:
    sent = torch.arange(SEGMENT, dtype=torch.float32)
    assert sent.nbytes > shm_channel.max_call_bytes == (SEGMENT - MAILBOX_BYTES) // 3
    before = shm_channel.counters.socket_bytes
    assert torch.equal(finish(shm_channel, begin(shm_channel, sent))[0], sent)
    assert shm_channel.counters.socket_bytes - before > 2 * sent.nbytes


def test_calls_of_the_largest_size_leave_room_for_the_next(shm_channel: RemoteChannel) -> None:
    specs = [Spec((shm_channel.max_call_bytes // 8,), torch.float32)]
    slots = [shm_channel.reserve(Linear(0, "echo"), specs, specs) for _ in range(2)]
    assert None not in [slot.place for slot in slots]


def test_a_closed_channel_says_so(shm_channel: RemoteChannel) -> None:
    ticket = begin(shm_channel, torch.ones(3))
    shm_channel.close()
    for attempt in (lambda: finish(shm_channel, ticket), lambda: echoes(shm_channel)):
        with pytest.raises(WorkerLost, match=r"session with the worker at tcp://.* has ended"):
            attempt()


def test_an_answer_in_use_outlives_the_channel(shm_channel: RemoteChannel) -> None:
    ticket = begin(shm_channel, torch.ones(3))
    with shm_channel.wait(ticket, time.monotonic() + TIMEOUT) as reply:
        shm_channel.close()
        assert reply.outputs[0].sum() == 3.0


def test_a_failed_call_leaves_no_memory_behind(worker: HelperProcess, shared_folder: Path) -> None:
    before = mapped_segments()
    channel = connect(worker, shared_folder)
    with pytest.raises(RemoteError):
        finish(channel, begin(channel, torch.ones(3), group="raise"))
    channel.close()
    assert mapped_segments() <= before


def test_text_from_a_worker_moves_no_cursor(shm_channel: RemoteChannel) -> None:
    with pytest.raises(RemoteError) as caught:
        finish(shm_channel, begin(shm_channel, torch.ones(1), group="rude"))
    assert str(caught.value).isprintable()
    assert "\x1b" not in caught.value.remote_traceback
    assert echoes(shm_channel)


def test_the_inproc_channel_checks_shapes_too() -> None:
    channel = InprocChannel(Echo(), hello())
    with pytest.raises(Exception, match="echo"):
        channel.reserve(Linear(0, "echo"), specs_of([torch.ones(2)]), specs_of([torch.ones(3)]))


def test_ipv6_works_where_it_is_asked_for() -> None:
    with WorkerThread("tcp://[::1]:0") as worker:
        channel = RemoteChannel(worker.endpoint, hello(shm_bytes=0))
        assert echoes(channel)
        channel.close()


def test_on_one_machine_the_best_way_is_chosen(worker: HelperProcess, shared_folder: Path) -> None:
    channel = connect(worker, shared_folder)
    assert channel.transport == ("poll" if CAN_POLL else "shm")
    channel.close()
