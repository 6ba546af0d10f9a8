"""Small files that hold a secret: who may read them, and how they are written."""

import os
import stat
from contextlib import suppress
from pathlib import Path


def is_open_to_others(status: os.stat_result) -> bool:
    """Whether users whom nobody has chosen may read or change a file.

    systemd and Kubernetes hand out secrets as files of root that a service's group may read.
    """
    is_handed_out = status.st_uid == 0 != os.geteuid()
    others = 0o037 if is_handed_out else 0o077
    return stat.S_ISREG(status.st_mode) and bool(status.st_mode & others)


def write_new_file(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Write a new file, which has this mode from the beginning; nothing is left after a failure.

    Raises:
        FileExistsError: the path is taken; it is left as it was.
        OSError: the file cannot be written.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise
