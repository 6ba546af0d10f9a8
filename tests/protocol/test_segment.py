"""Of memory that a worker can map, the TEE writes residues, calls and a flag: an allow-list.

The segment is the real one of a session with a real server; see `watched_segment.py` for what
may change in it, and when.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from small_sessions import (
    DIGEST,
    QKV,
    SHAPES,
    ask,
    connect,
    pad_linear,
    serving,
    shares_linear,
)
from watched_segment import WatchedSegment

from tsqp.algebra.params import DIRECT_FIELDS, FIELDS, Field
from tsqp.algebra.residue_bytes import unpack
from tsqp.errors import NumericalError
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.offload.pad import PadLinear
from tsqp.tee.offload.shares import SharesLinear
from tsqp.wire.codec import encode, worker_decoder
from tsqp.wire.endpoint import Endpoint
from tsqp.wire.mailbox import CAN_POLL
from tsqp.wire.messages import (
    INLINE,
    Attach,
    Bye,
    Call,
    Hello,
    Probe,
    Product,
    SeedProduct,
    place_of,
)
from tsqp.wire.tensors import spec_of
from tsqp.wire.zmq import ClientSocket

EVERY = pytest.mark.parametrize("field", FIELDS.values(), ids=list(FIELDS))
DIRECT = pytest.mark.parametrize("field", DIRECT_FIELDS, ids=lambda field: field.name)
SIZES = (1, 2, 3, 17, 128, 300)


@pytest.fixture(scope="module")
def endpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Endpoint]]:
    with serving(tmp_path_factory.mktemp("workers"), 3) as endpoints:
        yield endpoints


def inputs(group: LinearGroup, rows: int) -> torch.Tensor:
    """Rows of every size of number, one of zeros among them."""
    x_TD = torch.randn(rows, group.width, generator=torch.Generator().manual_seed(rows))
    x_TD *= torch.logspace(-30, 30, rows)[:, None]
    x_TD[rows // 2] = 0
    return x_TD


def use(linear: PadLinear[Any] | SharesLinear) -> None:
    """All that a mode does: calls of all sizes, one that fails, and one after another."""
    for rows in SIZES:
        for group in SHAPES:
            ask(linear, group, inputs(group, rows))
    bad_TD = inputs(QKV, 3)
    bad_TD[2, 1] = float("inf")
    with pytest.raises(NumericalError):
        ask(linear, QKV, bad_TD)
    for _ in range(40):  # once round the ring and on
        ask(linear, QKV, inputs(QKV, 1))


@pytest.mark.skipif(not CAN_POLL, reason="this processor reorders stores")
@EVERY
def test_pad_writes_nothing_but_residues_and_calls(
    field: Field, endpoints: list[Endpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = connect(endpoints[0])
    watched = WatchedSegment(channel, monkeypatch)
    with closing(pad_linear(channel, field)) as linear:
        use(linear)
        watched.look()
    assert watched.gaps > 1000 and watched.looks > 100
    assert set(watched.operations) == {Product(*place_of(group), field.name) for group in SHAPES}


@pytest.mark.skipif(not CAN_POLL, reason="this processor reorders stores")
@DIRECT
def test_shares_writes_nothing_but_residues_and_calls(
    field: Field, endpoints: list[Endpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    channels = [connect(endpoint) for endpoint in endpoints]
    watched = [WatchedSegment(channel, monkeypatch) for channel in channels]
    with closing(shares_linear(channels, field)) as linear:
        use(linear)
        for each in watched:
            each.look()
    assert all(each.gaps > 1000 and each.looks > 100 for each in watched)
    assert set(watched[-1].operations) == {
        Product(*place_of(group), field.name) for group in SHAPES
    }
    seeded = [each for some in watched[:-1] for each in some.operations]
    assert all(isinstance(each, SeedProduct) for each in seeded)


@pytest.mark.parametrize(
    ("mode", "field"),
    [("pad", field) for field in FIELDS.values()] + [("shares", field) for field in DIRECT_FIELDS],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "inline"])
def test_a_socket_carries_nothing_but_messages_and_residues(
    mode: str,
    shared: bool,
    field: Field,
    endpoints: list[Endpoint],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[list[bytes]] = []
    send = ClientSocket.send

    def noting(socket: ClientSocket, frames: Sequence[bytes | memoryview]) -> None:
        sent.append([bytes(frame) for frame in frames])
        send(socket, frames)

    monkeypatch.setattr(ClientSocket, "send", noting)
    size = 2**20 if shared else 0
    if mode == "pad":
        linear: PadLinear[Any] | SharesLinear = pad_linear(connect(endpoints[0], size), field)
    else:
        linear = shares_linear([connect(endpoint, size) for endpoint in endpoints], field)
    with closing(linear):
        use(linear)
    calls = 0
    for first, *tensors in sent:
        ticket, message = worker_decoder().decode(first)
        assert encode(message, ticket) == first  # nothing is hidden in how it is written
        if isinstance(message, Hello):
            assert (message.weights_digest, message.dtype, message.evidence) == (
                DIGEST,
                "int8",
                b"",
            )
        if not isinstance(message, Call):
            assert isinstance(message, Hello | Attach | Probe | Bye) and not tensors
            continue
        calls += 1
        assert isinstance(message.operation, Product | SeedProduct)
        inline = [ref for ref in message.inputs if ref.offset == INLINE]
        assert [len(tensor) for tensor in tensors] == [spec_of(ref).nbytes for ref in inline]
        for tensor, ref in zip(tensors, inline, strict=True):
            c_TB = np.frombuffer(bytearray(tensor), np.uint8).reshape(ref.shape)
            c_TD = np.empty((ref.shape[0], ref.shape[1] // field.residue_bytes), field.dtype)
            unpack(c_TB, field, c_TD)
            assert 0 <= c_TD.min() <= c_TD.max() < field.p
    assert (calls == 0) is (shared and CAN_POLL)
