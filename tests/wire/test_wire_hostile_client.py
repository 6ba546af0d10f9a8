"""A client that breaks the rules: it is told and sent away, and disturbs nobody."""

import os
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wire_helpers import DIGEST, SEGMENT, HelperProcess, WorkerThread, eventually, hello
from wire_peers import Frames, RawClient

from tsqp.wire.codec import MAX_MESSAGE, encode
from tsqp.wire.messages import (
    INLINE,
    Attach,
    Bye,
    Call,
    Failure,
    Linear,
    Result,
    TensorRef,
    Welcome,
)

pytestmark = pytest.mark.usefixtures("nothing_is_left")

ECHO = Linear(0, "echo")


def call(*refs: TensorRef, outputs: tuple[TensorRef, ...] | None = None) -> Call:
    return Call(ECHO, refs, refs if outputs is None else outputs)


def floats(count: int, offset: int = INLINE, dtype: str = "float32") -> TensorRef:
    return TensorRef(dtype, (count,), offset)


HELLO = encode(hello(shm_bytes=0))
FLOATS = bytes(16)

ENDS_THE_SESSION: dict[str, tuple[list[Frames], str]] = {
    "speaks before its handshake": ([[encode(call(floats(4)), 1), FLOATS]], "before its handshake"),
    "says goodbye before its handshake": ([[encode(Bye())]], "before its handshake"),
    "shakes hands twice": ([[HELLO], [HELLO]], "shook hands twice"),
    "repeats a ticket": ([[HELLO], *[[encode(call(floats(4)), 3), FLOATS]] * 2], "same call twice"),
    "goes back in tickets": (
        [[HELLO], *[[encode(call(floats(4)), ticket), FLOATS] for ticket in (3, 2)]],
        "same call twice",
    ),
    "uses ticket 0": ([[HELLO], [encode(call(floats(4)), 0), FLOATS]], "same call twice"),
    "names memory it has not": ([[HELLO], [encode(call(floats(4, 0)), 1)]], "does not have"),
    "wants other shapes back": (
        [[HELLO], [encode(call(floats(4), outputs=(floats(5),)), 1), FLOATS]],
        "An echo has the shapes",
    ),
    "wants another dtype back": (
        [[HELLO], [encode(call(floats(4), outputs=(floats(4, dtype="float16"),)), 1), FLOATS]],
        "An echo has the shapes",
    ),
    "sends no tensor": ([[HELLO], [encode(call(floats(4)), 1)]], "0 tensors where 1 are due"),
    "sends a tensor too many": (
        [[HELLO], [encode(call(floats(4)), 1), FLOATS, FLOATS]],
        "more than the 1 tensors",
    ),
    "sends a short tensor": (
        [[HELLO], [encode(call(floats(4)), 1), b"123"]],
        "of 3 bytes where 16",
    ),
    "sends a long tensor": (
        [[HELLO], [encode(call(floats(4)), 1), bytes(10**6)]],
        "of 1000000 bytes where 16",
    ),
    "promises more than a frame holds": (
        [[HELLO], [encode(call(floats(2**31 - 1)), 1), FLOATS]],
        "8589934588 bytes in one frame",
    ),
    "sends garbage": ([[HELLO], [b"\xff" * 100]], "does not speak the TSQP protocol"),
    "sends a large random frame": ([[HELLO], [os.urandom(100_000)]], "does not speak"),
    "sends a frame that is too large": ([[HELLO], [bytes(MAX_MESSAGE + 1)]], "message of 0 bytes"),
    "sends an empty frame": ([[HELLO], [b"", encode(Bye())]], "message of 0 bytes"),
    "sends what a worker sends": ([[HELLO], [encode(Result(1), 1)]], "invalid message"),
}


@pytest.mark.parametrize(("messages", "words"), ENDS_THE_SESSION.values(), ids=ENDS_THE_SESSION)
def test_a_client_is_told_and_sent_away_that(
    busy: WorkerThread, messages: list[Frames], words: str
) -> None:
    with RawClient(busy.endpoint) as client:
        for frames in messages:
            client.send(*frames)
        replies = [client.receive() for _ in messages]
        assert isinstance(replies[-1], Failure)
        assert replies[-1].kind == "protocol"
        assert words in replies[-1].message
        assert not any(isinstance(reply, Failure) for reply in replies[:-1])
        client.send(encode(call(floats(4)), 99), FLOATS)
        after = client.receive()
        assert isinstance(after, Failure)
        assert "before its handshake" in after.message


@pytest.mark.parametrize("offset", [1, 63, SEGMENT, SEGMENT - 64, 2**48])
def test_a_client_cannot_reach_outside_its_segment(
    busy: WorkerThread, shm_folder: Path, offset: int
) -> None:
    with RawClient(busy.endpoint) as client:
        assert isinstance(client.shake_hands(), Welcome)
        client.send(encode(Attach(True, False)))
        client.send(encode(call(floats(17, 0)), 1))
        assert isinstance(client.receive(), Result)
        client.send(encode(call(floats(17, offset)), 2))
        reply = client.receive()
        assert isinstance(reply, Failure)
        assert "does not lie inside" in reply.message
        assert eventually(lambda: len(busy.server.sessions) == 1)


def test_a_client_that_gave_its_segment_up_cannot_use_it(busy: WorkerThread) -> None:
    with RawClient(busy.endpoint) as client:
        assert isinstance(client.shake_hands(), Welcome)
        client.send(encode(Attach(False, False)))
        client.send(encode(call(floats(4, 0)), 1))
        reply = client.receive()
        assert isinstance(reply, Failure)
        assert "does not have" in reply.message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights_digest": "0" * 64}, "other weights"),
        ({"dtype": "bfloat16"}, "computes in float32"),
        ({"abilities": ("fly",)}, "cannot do fly"),
    ],
)
def test_a_client_that_wants_something_else_is_refused(
    busy: WorkerThread, changes: dict[str, object], words: str
) -> None:
    with RawClient(busy.endpoint) as client:
        reply = client.shake_hands(**changes)
        assert isinstance(reply, Failure)
        assert reply.kind == "refused"
        assert words in reply.message
        assert DIGEST not in reply.message
        assert isinstance(client.shake_hands(shm_bytes=0), Welcome)


def test_a_client_of_another_version_is_told_both_versions(busy: WorkerThread) -> None:
    with RawClient(busy.endpoint) as client:
        client.send(b"TSQP" + struct.pack("<H", 7) + encode(hello())[6:])
        reply = client.receive()
        assert isinstance(reply, Failure)
        assert "version 7 and this side 3" in reply.message


def test_a_client_that_reads_nothing_is_dropped(busy: WorkerThread) -> None:
    """Its answers fill what the sockets hold; the worker must not wait for it for ever."""
    with RawClient(busy.endpoint) as client:
        assert isinstance(client.shake_hands(shm_bytes=0), Welcome)
        message = call(floats(2**14))
        for ticket in range(1, 3000):
            client.send(encode(message, ticket), bytes(2**16))
        assert eventually(lambda: len(busy.server.sessions) == 1)


frames_of_any_kind = st.lists(
    st.binary(max_size=300)
    | st.builds(
        encode, st.sampled_from([Bye(), Attach(True, False), Attach(False, False), call(floats(4))])
    )
    | st.builds(
        lambda offset, dtype, ticket: encode(call(floats(4, offset, dtype)), ticket),
        st.integers(-1, 2**48),
        st.sampled_from(["float32", "int64"]),
        st.integers(0, 5),
    )
    | st.just(FLOATS),
    min_size=1,
    max_size=3,
)


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(st.booleans(), st.lists(frames_of_any_kind, min_size=1, max_size=4))
def test_no_frames_disturb_a_worker(
    worker: HelperProcess, shakes_hands: bool, messages: list[list[bytes]]
) -> None:
    with RawClient(worker.endpoint) as client:
        if shakes_hands:
            assert isinstance(client.shake_hands(shm_bytes=0), Welcome)
        for frames in messages:
            client.send(*frames)
        client.send(encode(Bye()))  # or the ghosts of all examples together fill the worker
    with RawClient(worker.endpoint) as client:
        assert isinstance(client.shake_hands(shm_bytes=0), Welcome)
        client.send(encode(call(floats(4)), 1), FLOATS)
        assert isinstance(client.receive(), Result)
        client.send(encode(Bye()))
