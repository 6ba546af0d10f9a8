"""A worker that lies: each lie ends the session with the right error, and nothing is left."""

import socket
import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wire_helpers import begin, finish, hello, welcome
from wire_peers import Frames, LyingWorker, TCPServer

import tsqp.wire.zmq
from tsqp.errors import HandshakeError, ProtocolError, RemoteError, WorkerError, WorkerLost
from tsqp.wire.client import RemoteChannel
from tsqp.wire.codec import MAX_MESSAGE, encode
from tsqp.wire.messages import Failure, Probe, Result
from tsqp.wire.zmq import ClientSocket

pytestmark = pytest.mark.usefixtures("nothing_is_left")

SENT = torch.ones(4)
DATA = SENT.numpy().tobytes()


def good(ticket: int) -> Frames:
    return [encode(Result(1), ticket), DATA]


def outcome_of(*answers: Callable[[int], Frames], repeat: bool = False) -> torch.Tensor:
    """What a call comes to; after an error the session must have ended."""
    with LyingWorker(*answers, repeat=repeat) as worker:
        channel = RemoteChannel(worker.endpoint, hello(shm_bytes=0))
        ticket = begin(channel, SENT)
        try:
            return finish(channel, ticket, 1.0)[0]
        except WorkerError:
            with pytest.raises(WorkerLost, match="has ended"):
                begin(channel, SENT)
            raise
        finally:
            channel.close()


def test_the_honest_answer_is_taken() -> None:
    assert torch.equal(outcome_of(good), SENT)


def test_probes_before_the_answer_do_no_harm() -> None:
    assert torch.equal(outcome_of(*[lambda _: [encode(Probe())]] * 3, good), SENT)


def test_an_answer_to_an_unknown_ticket_is_refused() -> None:
    with pytest.raises(ProtocolError, match="answered a call that is not open"):
        outcome_of(lambda ticket: good(ticket + 1))


def test_a_welcome_is_no_answer() -> None:
    with pytest.raises(ProtocolError, match="not open"):
        outcome_of(lambda ticket: [encode(welcome(b"n" * 32), ticket)])


@pytest.mark.parametrize("length", [0, 1, 15, 17, 2**20])
def test_an_answer_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(ProtocolError, match=f"a tensor of {length} bytes where 16 are due"):
        outcome_of(lambda ticket: [encode(Result(1), ticket), bytes(length)])


def test_an_answer_without_its_tensor_is_refused() -> None:
    with pytest.raises(ProtocolError, match="0 tensors where 1 are due"):
        outcome_of(lambda ticket: good(ticket)[:1])


def test_an_answer_with_a_tensor_too_many_is_refused() -> None:
    with pytest.raises(ProtocolError, match="more than the 1 tensors"):
        outcome_of(lambda ticket: [*good(ticket), DATA])


def test_frames_behind_a_failure_are_refused() -> None:
    with pytest.raises(ProtocolError, match="more than the 0 tensors"):
        outcome_of(lambda ticket: [encode(Failure("error", "x"), ticket), DATA])


def test_an_answer_hidden_behind_a_probe_is_refused() -> None:
    with pytest.raises(ProtocolError, match="more than the 0 tensors"):
        outcome_of(lambda ticket: [encode(Probe()), *good(ticket)])


def test_a_stream_of_probes_does_not_hold_up_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tsqp.wire.zmq, "TICK_MS", 120_000)  # so that only probes end a wait
    start = time.monotonic()
    with pytest.raises(WorkerLost, match="probes instead of answers"):
        outcome_of(lambda _: [encode(Probe())], repeat=True)
    assert time.monotonic() - start < 60


def test_garbage_is_refused() -> None:
    with pytest.raises(ProtocolError, match="does not speak the TSQP protocol"):
        outcome_of(lambda _: [b"\x00" * 64])


def test_an_empty_message_is_refused() -> None:
    with pytest.raises(ProtocolError, match="message of 0 bytes"):
        outcome_of(lambda _: [b""])


@pytest.mark.parametrize("length", [MAX_MESSAGE + 1, 2**21])
def test_an_oversized_message_is_refused(length: int) -> None:
    with pytest.raises(ProtocolError, match=f"a message of {length} bytes"):
        outcome_of(lambda _: [bytes(length)])


def test_another_version_in_the_middle_is_refused() -> None:
    with pytest.raises(HandshakeError, match="version 9"):
        outcome_of(lambda ticket: [b"TSQP\x09\x00" + encode(Result(1), ticket)[6:]])


def test_a_failure_of_the_session_ends_it() -> None:
    with pytest.raises(RemoteError, match="failed: because") as caught:
        outcome_of(lambda _: [encode(Failure("protocol", "because", "line 1\nline 2"))])
    assert caught.value.remote_traceback == "line 1\nline 2"


def test_a_call_answered_twice_is_refused() -> None:
    with LyingWorker(good, good) as worker:
        channel = RemoteChannel(worker.endpoint, hello(shm_bytes=0))
        first = begin(channel, SENT)
        assert torch.equal(finish(channel, first)[0], SENT)
        with pytest.raises(ProtocolError, match="not open"):
            finish(channel, begin(channel, SENT))
        channel.close()


def test_a_call_answered_twice_before_it_is_taken_is_refused() -> None:
    with LyingWorker(lambda ticket: good(1)) as worker:
        channel = RemoteChannel(worker.endpoint, hello(shm_bytes=0))
        begin(channel, SENT)
        with pytest.raises(ProtocolError, match="not open"):
            finish(channel, begin(channel, SENT))
        channel.close()


def test_no_answer_at_all_runs_into_the_deadline() -> None:
    with pytest.raises(WorkerLost, match="stopped answering"):
        outcome_of()


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.lists(st.binary(max_size=300), min_size=1, max_size=4))
def test_random_answers_never_raise_anything_else(frames: list[bytes]) -> None:
    with LyingWorker(lambda _: frames) as worker:
        channel = RemoteChannel(worker.endpoint, hello(shm_bytes=0))
        with pytest.raises(WorkerError):
            finish(channel, begin(channel, SENT), 1.0)
        channel.close()


@pytest.mark.parametrize(
    ("greeting", "error", "words"),
    [
        (lambda nonce: [encode(welcome(bytes(32)))], ProtocolError, "handshake wrongly"),
        (lambda nonce: [encode(Result(1))], ProtocolError, "handshake wrongly"),
        (lambda nonce: [encode(Probe())], ProtocolError, "handshake wrongly"),
        (lambda nonce: [encode(welcome(nonce)), b"x"], ProtocolError, "more than the 0"),
        (lambda nonce: [b"garbage, and more of it"], ProtocolError, "does not speak"),
        (lambda nonce: [b"", encode(welcome(nonce))], ProtocolError, "message of 0 bytes"),
        (lambda nonce: [bytes(2**20)], ProtocolError, "message of 1048576 bytes"),
        (
            lambda nonce: [encode(Failure("refused", "be\x1bcause"))],
            HandshakeError,
            "be\ufffdcause",
        ),
    ],
)
def test_a_wrong_greeting_is_refused(
    greeting: Callable[[bytes], Frames], error: type[WorkerError], words: str
) -> None:
    with LyingWorker(greeting=greeting) as worker:
        with pytest.raises(error, match=words) as caught:
            RemoteChannel(worker.endpoint, hello(shm_bytes=0))
        assert str(worker.endpoint) in str(caught.value)


def test_a_client_does_not_connect_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has taken the worker's place gets nothing, and can send nothing."""
    monkeypatch.setattr(tsqp.wire.zmq, "TICK_MS", 1)  # how soon a client connects again
    with LyingWorker() as worker:
        client = ClientSocket(worker.endpoint, timeout=5)
    broken = 0

    def hang_up(connection: socket.socket) -> None:
        nonlocal broken
        broken += 1
        connection.close()

    with TCPServer(hang_up, port=worker.port):
        time.sleep(0.3)
        with pytest.raises(WorkerLost, match="is gone"):
            client.send([b"secret"])
        client.close()
    assert broken == 0
