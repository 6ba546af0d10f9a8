"""A posted call that comes again is done again, and checked again only where that may differ."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from wire_helpers import Echo, WorkerThread, eventually
from wire_peers import PostingClient

import tsqp.wire.known_calls
from tsqp.errors import ProtocolError
from tsqp.wire.codec import encode
from tsqp.wire.mailbox import CAN_POLL
from tsqp.wire.messages import Call, Failure, Linear, Operation, Result, TensorRef, Truncate
from tsqp.wire.tensors import Spec

pytestmark = [
    pytest.mark.usefixtures("nothing_is_left"),
    pytest.mark.skipif(not CAN_POLL, reason="no mailboxes here"),
]

ROOM = 2**15


def call(count: int = 4, *, layer: int = 0, place: int = ROOM) -> Call:
    refs = [TensorRef("float32", (count,), offset) for offset in (place, place + ROOM)]
    return Call(Linear(layer, "echo"), (refs[0],), (refs[1],))


class Counting(Echo):
    """Counts its checks, and allows only one about kept state."""

    def __init__(self) -> None:
        super().__init__()
        self.checked: list[Operation] = []

    def check(self, operation: Operation, inputs: Sequence[Spec], outputs: Sequence[Spec]) -> None:
        self.checked.append(operation)
        if not isinstance(operation, Truncate):
            super().check(operation, inputs, outputs)
        elif self.checked.count(operation) > 1:
            raise ProtocolError("there is nothing left to truncate")

    def run(
        self, operation: Operation, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        if isinstance(operation, Linear):
            super().run(operation, inputs, outputs)


@pytest.fixture
def service() -> Counting:
    return Counting()


@pytest.fixture
def client(service: Counting, shm_folder: Path) -> Iterator[PostingClient]:
    with (
        WorkerThread("tcp://127.0.0.1:0", service, shm_folder=shm_folder) as worker,
        PostingClient(worker.endpoint) as client,
    ):
        yield client


def echoed(client: PostingClient, message: Call, ticket: int, value: float) -> list[float]:
    """What the worker writes for an input of this value."""
    given, wanted = message.inputs[0], message.outputs[0]
    client.segment.tensor(given.offset, given.shape, torch.float32).fill_(value)
    client.post(encode(message, ticket))
    number, answer = client.take()
    assert number == ticket
    assert isinstance(answer, Result)
    found: list[float] = client.segment.tensor(wanted.offset, wanted.shape, torch.float32).tolist()
    return found


def test_a_call_that_comes_again_is_done_again_and_not_checked_again(
    client: PostingClient, service: Counting
) -> None:
    for ticket in range(1, 6):
        assert echoed(client, call(), ticket, float(ticket)) == [float(ticket)] * 4
    assert len(service.checked) == 1


def test_a_call_that_differs_from_a_known_one_is_checked(
    client: PostingClient, service: Counting
) -> None:
    others = [call(), call(5), call(layer=1), call(place=3 * ROOM)]
    for ticket, other in enumerate(others, 1):
        assert echoed(client, other, ticket, 7.0) == [7.0] * other.inputs[0].shape[0]
    assert len(service.checked) == len(others)
    beyond = call(place=2**40)
    client.post(encode(beyond, 9))
    assert isinstance(client.receive(), Failure)


def test_a_call_about_kept_state_is_checked_each_time(client: PostingClient) -> None:
    client.post(encode(Call(Truncate(1, 0), (), ()), 1))
    assert client.take()[0] == 1
    client.post(encode(Call(Truncate(1, 0), (), ()), 2))
    assert eventually(lambda: client.mailbox.has_mail or client._socket.poll(1) != 0)
    assert not client.mailbox.has_mail
    assert isinstance(client.receive(), Failure)


def test_a_client_that_makes_up_calls_replaces_those_that_are_known(
    client: PostingClient, service: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tsqp.wire.known_calls, "MAX_CALLS", 4)
    for ticket in range(1, 41):
        assert echoed(client, call(ticket % 10 + 1), ticket, 1.0) == [1.0] * (ticket % 10 + 1)
    assert len(service.checked) == 40
