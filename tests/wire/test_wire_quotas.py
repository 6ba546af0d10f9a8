"""What one client may take of a worker: sessions and shared memory."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import zmq
from wire_helpers import SEGMENT, SHARED, WorkerThread, echoes, eventually, hello
from wire_peers import RawClient

import tsqp.wire.offers
from tsqp.errors import HandshakeError, WorkerUnavailable
from tsqp.wire.client import RemoteChannel
from tsqp.wire.codec import encode
from tsqp.wire.endpoint import Endpoint
from tsqp.wire.messages import Bye, Failure, Welcome
from tsqp.wire.quotas import Quotas, client_name
from tsqp.wire.shm import MIN_SEGMENT

pytestmark = pytest.mark.usefixtures("nothing_is_left")


@contextmanager
def sessions(endpoint: Endpoint, count: int) -> Iterator[list[RawClient]]:
    """That many clients whose handshakes were taken."""
    with zmq.Context() as context, ExitStack() as stack:
        clients = [stack.enter_context(RawClient(endpoint, context)) for _ in range(count)]
        for client in clients:
            assert isinstance(client.shake_hands(shm_bytes=0), Welcome)
        yield clients


@pytest.mark.parametrize("endpoint", ["ipc", "tcp"])
@pytest.mark.parametrize(
    ("quotas", "count", "words"),
    [
        (Quotas(max_sessions=3), 3, "has 3 sessions already, which is its --max-sessions"),
        (
            Quotas(max_sessions_per_client=2),
            2,
            "has 2 sessions with this user or address already, which is its "
            "--max-sessions-per-client",
        ),
        (Quotas(), 16, "has 16 sessions with this user or address already"),
    ],
    ids=["all", "one client", "defaults"],
)
def test_a_session_too_many_is_refused_until_another_ends(
    quotas: Quotas, count: int, words: str, endpoint: str, tmp_path: Path
) -> None:
    address = f"ipc://{tmp_path}/socket" if endpoint == "ipc" else "tcp://127.0.0.1:0"
    with (
        WorkerThread(address, quotas=quotas) as worker,
        sessions(worker.endpoint, count) as clients,
    ):
        with pytest.raises(HandshakeError, match=words):
            RemoteChannel(worker.endpoint, hello(shm_bytes=0))
        assert len(worker.server.sessions) == count
        clients[0].send(encode(Bye()))
        assert eventually(lambda: len(worker.server.sessions) == count - 1)
        channel = RemoteChannel(worker.endpoint, hello(shm_bytes=0))
        assert echoes(channel)
        channel.close()


def test_a_client_with_all_its_sessions_leaves_room_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quotas = Quotas(max_sessions=4, max_sessions_per_client=3)
    names = iter(["uid 1"] * 4 + ["uid 2"])
    monkeypatch.setattr("tsqp.wire.server_socket.client_name", lambda scheme, address: next(names))
    with (
        WorkerThread(f"ipc://{tmp_path}/socket", quotas=quotas) as worker,
        sessions(worker.endpoint, 3),
        RawClient(worker.endpoint) as one_more,
    ):
        refusal = one_more.shake_hands(shm_bytes=0)
        assert isinstance(refusal, Failure)
        assert refusal.kind == "refused"
        other = RemoteChannel(worker.endpoint, hello(shm_bytes=0))
        assert echoes(other)
        other.close()


@pytest.mark.parametrize(
    ("scheme", "address", "name"),
    [
        ("ipc", "localhost:1000:1000:4242", "uid 1000"),
        ("ipc", "localhost:0:0:7", "uid 0"),
        ("ipc", "", "unknown"),
        ("tcp", "192.0.2.7", "192.0.2.7"),
        ("tcp", "::ffff:192.0.2.7", "192.0.2.7"),
        ("tcp", "2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("tcp", "2001:db8:1:2:ffff::1", "2001:db8:1:2::/64"),
        ("tcp", "fe80::1%eth0", "fe80::/64"),
        ("tcp", "", "unknown"),
    ],
)
def test_a_client_is_a_user_or_an_address(scheme: str, address: str, name: str) -> None:
    assert client_name(scheme, address) == name


@pytest.mark.parametrize(
    ("quotas", "wanted", "held", "free", "size"),
    [
        (Quotas(), 2**31, 0, 2**34, 2**30),
        (Quotas(), 2**30, 0, 2**30, 2**29),
        (Quotas(), 2**30, 2**29 - 2**20, 2**29 + 2**20, 2**20),
        (Quotas(max_total_shm_bytes=2**22), 2**22, 2**21, 2**34, 2**21),
        (Quotas(max_shm_bytes=2**20), 2**22, 2**21, 2**34, 2**20),
    ],
)
def test_all_segments_together_are_bounded(
    quotas: Quotas, wanted: int, held: int, free: int, size: int
) -> None:
    assert quotas.shm_bytes(wanted, held, free) == size
    assert held + size <= (held + free) // 2


def test_a_session_that_finds_no_shared_memory_left_goes_on_without(shm_folder: Path) -> None:
    quotas = Quotas(max_total_shm_bytes=2 * SEGMENT)
    with WorkerThread("tcp://127.0.0.1:0", quotas=quotas, shm_folder=shm_folder) as worker:
        channels = [
            RemoteChannel(worker.endpoint, hello(), shm_folder=shm_folder) for _ in range(3)
        ]
        assert [channel.transport for channel in channels] == [SHARED, SHARED, "inline"]
        assert channels[2].reason == (
            f"the worker has no shared memory left: all sessions together may have {2 * SEGMENT} "
            f"bytes, and the others have {2 * SEGMENT}"
        )
        assert all(echoes(channel) for channel in channels)
        channels.pop(0).close()
        assert eventually(lambda: len(worker.server.sessions) == 2)
        channels.append(RemoteChannel(worker.endpoint, hello(), shm_folder=shm_folder))
        assert channels[-1].transport == SHARED
        for channel in channels:
            channel.close()


def test_sessions_together_leave_half_of_what_is_free(
    shm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = 8 * SEGMENT

    def free(folder: Path) -> int:
        return total - sum(each.segment.size for each in books.values() if each.segment)

    monkeypatch.setattr(tsqp.wire.offers, "free_bytes", free)
    with WorkerThread("tcp://127.0.0.1:0", shm_folder=shm_folder) as worker:
        books = worker.server.sessions
        channels = [
            RemoteChannel(worker.endpoint, hello(), shm_folder=shm_folder) for _ in range(6)
        ]
        assert [channel.transport for channel in channels] == [SHARED] * 4 + ["inline"] * 2
        assert sum(each.segment.size for each in books.values() if each.segment) == total // 2
        for channel in channels:
            channel.close()


def test_what_is_left_of_shared_memory_may_be_too_little() -> None:
    with pytest.raises(WorkerUnavailable, match="the others have 1000"):
        Quotas().shm_bytes(MIN_SEGMENT, 1000, 2 * MIN_SEGMENT - 1000)
