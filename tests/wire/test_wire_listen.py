"""Where a worker can listen, and what is left of its socket."""

import errno
import socket
import stat
from pathlib import Path

import pytest
from wire_helpers import WorkerThread, echoes, hello

from tsqp.errors import WorkerUnavailable
from tsqp.wire.client import RemoteChannel
from tsqp.wire.endpoint import Endpoint, parse_endpoint
from tsqp.wire.server import Server

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def serves(worker: WorkerThread) -> bool:
    channel = RemoteChannel(worker.endpoint, hello(shm_bytes=0))
    try:
        return echoes(channel)
    finally:
        channel.close()


def refusal(endpoint: Endpoint) -> str:
    with pytest.raises(WorkerUnavailable, match=r"^Cannot listen on .*\.$") as caught:
        Server(endpoint)
    assert str(endpoint) in str(caught.value)
    return str(caught.value)


def test_the_socket_is_for_this_user_alone_and_goes_when_the_worker_does(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with WorkerThread(f"ipc://{path}") as worker:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert serves(worker)
    assert not path.exists()


def test_listening_leaves_the_umask_alone(tmp_path: Path) -> None:
    (tmp_path / "before").touch()
    with WorkerThread(f"ipc://{tmp_path}/socket"):
        (tmp_path / "after").touch()
    modes = [(tmp_path / name).stat().st_mode for name in ("before", "after")]
    assert modes[0] == modes[1]


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.exists()
    with WorkerThread(f"ipc://{path}") as worker:
        assert serves(worker)
    assert not path.exists()


def test_a_stale_socket_that_cannot_be_removed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as crashed:
        crashed.bind(str(path))

    def refused(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refused)
        assert "cannot be removed (Permission denied)" in refusal(Endpoint("ipc", str(path)))


def test_a_live_worker_is_not_replaced(tmp_path: Path) -> None:
    with WorkerThread(f"ipc://{tmp_path}/socket") as worker:
        assert "a worker already serves there" in refusal(worker.endpoint)
        assert serves(worker)


def test_a_file_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("keep me")
    assert "not a socket" in refusal(parse_endpoint(f"ipc://{path}"))
    assert path.read_text() == "keep me"


def test_a_folder_is_not_replaced(tmp_path: Path) -> None:
    assert "not a socket" in refusal(parse_endpoint(f"ipc://{tmp_path}"))
    assert tmp_path.is_dir()


def test_a_link_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert "not a socket" in refusal(parse_endpoint(f"ipc://{tmp_path}/link"))
    assert (tmp_path / "link").is_symlink()


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    words = refusal(parse_endpoint(f"ipc://{tmp_path}/absent/socket"))
    assert f"there is no folder {tmp_path}/absent" in words


def test_a_path_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "Not a directory" in refusal(parse_endpoint(f"ipc://{tmp_path}/file/socket"))


def test_a_path_too_long_for_zeromq_is_refused(tmp_path: Path) -> None:
    refusal(Endpoint("ipc", f"{tmp_path}/{'x' * 150}"))


def test_a_successor_keeps_its_socket_when_its_predecessor_goes(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    predecessor = Server(parse_endpoint(f"ipc://{path}"))
    path.unlink()
    with WorkerThread(f"ipc://{path}") as successor:
        predecessor.close()
        assert serves(successor)
    assert not path.exists()


def test_an_abstract_socket_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with WorkerThread(f"ipc://@{tmp_path}") as worker:
        assert serves(worker)
        assert "in use" in refusal(worker.endpoint)
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use_is_refused_and_its_worker_goes_on() -> None:
    with WorkerThread("tcp://127.0.0.1:0") as worker:
        assert worker.endpoint.address != "127.0.0.1:0"
        assert "Address already in use" in refusal(worker.endpoint)
        assert serves(worker)


def test_an_address_of_another_machine_is_refused() -> None:
    refusal(parse_endpoint("tcp://192.0.2.1:5555"))


def test_closing_twice_is_safe(tmp_path: Path) -> None:
    server = Server(parse_endpoint(f"ipc://{tmp_path}/socket"))
    server.close()
    (tmp_path / "socket").write_text("somebody else's")
    server.close()
    assert (tmp_path / "socket").exists()
