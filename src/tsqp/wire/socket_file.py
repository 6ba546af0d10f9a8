"""Handles the file of a Unix socket, which libzmq would overwrite or leave behind."""

import socket
import stat
from pathlib import Path

from tsqp.errors import WorkerUnavailable


def identify(path: Path) -> tuple[int, int]:
    """The device and inode of the file at `path`."""
    status = path.lstat()
    return status.st_dev, status.st_ino


def remove_own(path: Path, identity: tuple[int, int]) -> None:
    """Remove the file at `path` unless it has been replaced by another file."""
    try:
        if identify(path) == identity:
            path.unlink()
    except OSError:
        return  # already removed, or out of reach


def remove_stale(path: Path) -> None:
    """Remove a socket file on which nobody listens. libzmq itself would even replace one in use.

    Raises:
        WorkerUnavailable: a worker listens there, the file is not a socket, or its folder does not
            exist.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise WorkerUnavailable(
                f"Cannot listen on ipc://{path}: there is no folder {path.parent}; make it first."
            ) from None
        return
    except OSError as exc:
        raise WorkerUnavailable(f"Cannot listen on ipc://{path}: {exc.strerror}.") from exc
    if not stat.S_ISSOCK(mode):
        raise WorkerUnavailable(
            f"Cannot listen on ipc://{path}: that is not a socket; choose another path."
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            _remove(path)
            return
        except OSError as exc:
            raise WorkerUnavailable(f"Cannot listen on ipc://{path}: {exc}.") from exc
    raise WorkerUnavailable(
        f"Cannot listen on ipc://{path}: a worker already serves there; choose another path, "
        "or stop that worker."
    )


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as exc:
        raise WorkerUnavailable(
            f"Cannot listen on ipc://{path}: an old socket file is there and cannot be removed "
            f"({exc.strerror}); remove it, or choose another path."
        ) from exc
