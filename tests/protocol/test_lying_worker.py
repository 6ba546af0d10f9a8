"""Every lie of a worker is caught: a real process that speaks the real protocol.

The tables list what the worker does, the error that ends the session, and what its message says. No
lie costs more than its deadline, and none gives a wrong token; `fails` checks that. The lies are in
`lies.py`. The other files test_lying_….py ask where, when and how often a worker may lie.
"""

import re

import pytest
from liars import LyingWorker
from lies import WRONG_MESSAGES, WRONG_PRODUCTS, WRONG_WELCOMES, Order
from lying_sessions import IMPATIENCE_S, complete, fails, name, private, right_tokens
from protocol_helpers import DEADLINE_S, SHARED

from tsqp.algebra.params import FIELDS
from tsqp.errors import (
    HandshakeError,
    IntegrityError,
    ProtocolError,
    RemoteError,
    WorkerError,
    WorkerLost,
)
from tsqp.tee.crypto.freivalds import FailureLimit

pytestmark = [pytest.mark.usefixtures("nothing_is_left", "limit")]

LIES: list[tuple[str, type[WorkerError], str]] = [
    ("one bit flipped", IntegrityError, "wrong product"),
    ("one element off by one", IntegrityError, "wrong product"),
    ("a row off by one", IntegrityError, "wrong product"),
    ("a row off by minus one", IntegrityError, "wrong product"),
    ("a row off by p", IntegrityError, "wrong product"),
    ("a row off by its highest bit", IntegrityError, "wrong product"),
    ("p itself", IntegrityError, "wrong product"),
    ("the largest word", IntegrityError, "wrong product"),
    ("zeros", IntegrityError, "wrong product"),
    ("twice the product", IntegrityError, "wrong product"),
    ("minus the product", IntegrityError, "wrong product"),
    ("one weight off by one", IntegrityError, "wrong product"),
    ("features shifted by one", IntegrityError, "wrong product"),
    ("two rows swapped", IntegrityError, "wrong product"),
    ("all rows but the last", IntegrityError, "wrong product"),
    ("rows and features exchanged", IntegrityError, "wrong product"),
    ("floating-point numbers", IntegrityError, "wrong product"),
    ("the previous answer", IntegrityError, "wrong product"),
    ("the answer of another group", IntegrityError, "wrong product"),
    ("writes nothing", IntegrityError, "wrong product"),
    ("hides other weights", IntegrityError, "wrong product"),
    ("fails", RemoteError, "failed: RuntimeError: this worker has better things to do"),
    ("never answers", WorkerLost, "stopped answering|sent probes instead"),
    ("answers late", WorkerLost, "stopped answering|sent probes instead"),
    ("answers twice", ProtocolError, "answered a call that is not open"),
    ("answers a call to come", ProtocolError, "answered a call that is not open"),
    ("answers no call", ProtocolError, "answered a call that is not open"),
    ("babbles", ProtocolError, "does not speak the TSQP protocol"),
]
INLINE_LIES: list[tuple[str, type[WorkerError], str]] = [
    ("sends a byte too few", ProtocolError, "a tensor of 2559 bytes where 2560 are due"),
    ("sends a byte too many", ProtocolError, "a tensor of 2561 bytes where 2560 are due"),
    ("sends half of the rows", ProtocolError, "a tensor of 1280 bytes where 2560 are due"),
    ("sends every row twice", ProtocolError, "a tensor of 5120 bytes where 2560 are due"),
    ("sends words twice as wide", ProtocolError, "a tensor of 5120 bytes where 2560 are due"),
    ("sends no tensor", ProtocolError, "0 tensors where 1 are due"),
    ("sends a tensor too many", ProtocolError, "more than the 1 tensors"),
]
HANDSHAKE_LIES: list[tuple[str, type[WorkerError], str]] = [
    ("names another digest", HandshakeError, "the worker holds other weights"),
    ("names another dtype", HandshakeError, "the worker computes in float32"),
    ("can do nothing", HandshakeError, "the worker cannot do product"),
    ("repeats an old nonce", ProtocolError, "answered the handshake wrongly"),
]


@pytest.mark.parametrize("shm", [True, False], ids=[SHARED, "inline"])
@pytest.mark.parametrize("field", FIELDS)
def test_a_worker_that_does_not_lie_is_believed(
    field: str, shm: bool, liar: LyingWorker, limit: FailureLimit
) -> None:
    with private(liar, field=field, shm=shm) as llm:
        assert complete(llm) == complete(llm) == right_tokens(field)
        assert llm.transport == (SHARED if shm else "inline")
    assert not limit.reached


SILENCES = [c for c in LIES if c[1] is WorkerLost]  # these take the time of a deadline
OTHER_LIES = [c for c in LIES if c not in SILENCES]
WAYS = [("wide", True), ("compact", False), ("lattice", True)]
# The whole product is slow: each lie is told in one of the ways, in turn.
EVERY_LIE = [
    pytest.param(
        *lie,
        *way,
        id=f"{lie[0]}-{way[0]}-{SHARED if way[1] else 'inline'}",
        marks=[] if number % len(WAYS) == place else pytest.mark.slow,
    )
    for number, lie in enumerate(OTHER_LIES)
    for place, way in enumerate(WAYS)
] + [
    pytest.param(*lie, *way, id=f"{lie[0]}-{way[0]}-{SHARED if way[1] else 'inline'}")
    for lie, way in zip(SILENCES, WAYS, strict=False)
]


@pytest.mark.parametrize(("lie", "error", "words", "field", "shm"), EVERY_LIE)
def test_a_lie_ends_the_session(
    lie: str,
    error: type[WorkerError],
    words: str,
    field: str,
    shm: bool,
    liar: LyingWorker,
    sampled: list[int],
) -> None:
    timeout = IMPATIENCE_S if error is WorkerLost else DEADLINE_S
    message = fails(liar, Order(lie), error, sampled, field=field, shm=shm, timeout=timeout)
    assert re.search(words, message)
    if error is IntegrityError:
        assert name(0, "qkv") in message


@pytest.mark.parametrize(("lie", "error", "words"), INLINE_LIES, ids=[c[0] for c in INLINE_LIES])
def test_an_answer_of_another_size_ends_the_session(
    lie: str, error: type[WorkerError], words: str, liar: LyingWorker, sampled: list[int]
) -> None:
    assert words in fails(liar, Order(lie), error, sampled, shm=False)


@pytest.mark.parametrize(
    ("lie", "error", "words"), HANDSHAKE_LIES, ids=[c[0] for c in HANDSHAKE_LIES]
)
def test_a_wrong_handshake_is_refused(
    lie: str, error: type[WorkerError], words: str, liar: LyingWorker
) -> None:
    with pytest.raises(WorkerError, match=words) as caught:
        private(liar, Order(lie))
    assert caught.type is error
    assert liar.endpoint in str(caught.value)


def test_every_lie_that_the_worker_knows_is_tried() -> None:
    tried = {lie for lie, _, _ in LIES + INLINE_LIES + HANDSHAKE_LIES}
    known = {*WRONG_PRODUCTS, *WRONG_MESSAGES, *WRONG_WELCOMES}
    assert known - tried == {
        "the answer of another session"
    }  # in a test of its own, with two sessions


@pytest.mark.parametrize("field", FIELDS)
def test_an_answer_that_another_session_got_is_refused(
    field: str, liar: LyingWorker, sampled: list[int]
) -> None:
    with private(liar, field=field) as llm:
        assert complete(llm, max_tokens=1) == right_tokens(field)[:1]
    order = Order("the answer of another session")
    assert name(0, "qkv") in fails(liar, order, IntegrityError, sampled, field=field)


@pytest.mark.parametrize("shm", [True, False], ids=[SHARED, "inline"])
def test_answers_to_two_calls_exchanged_are_refused(
    shm: bool, liar: LyingWorker, sampled: list[int]
) -> None:
    two_blocks = list(range(1, 257))
    order = Order("exchanges two answers")
    message = fails(liar, order, IntegrityError, sampled, two_blocks, shm=shm)
    assert name(0, "qkv") in message
