"""The cache of prepared files: found again, passed over, and where the disk says no."""

import errno
import os
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prepared_helpers import (
    change_byte,
    change_byte_in_place,
    check,
    header_end,
    without_a_largest,
    write_changed,
)
from safetensors.torch import load_file, save_file

from model_helpers import make_model
from tsqp.checkpoint.checkpoint import Checkpoint, open_checkpoint
from tsqp.checkpoint.files import bytes_of
from tsqp.checkpoint.integer_cache import load_integers
from tsqp.checkpoint.prepared import SUFFIX, prepare
from tsqp.checkpoint.quantize import IntegerWeights
from tsqp.checkpoint.safetensors_file import SafetensorsCheckpoint
from tsqp.errors import CheckpointError
from tsqp.model.linear_group import LinearGroup


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, which a first start has yet to make."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("TSQP_CACHE", str(folder))
    return folder


def load(model: Path) -> tuple[dict[LinearGroup, IntegerWeights], str]:
    found: dict[LinearGroup, IntegerWeights] = {}
    digest = load_integers(open_checkpoint(str(model)), found.__setitem__)
    return found, digest


def refuse_to_quantize(checkpoint: Checkpoint, *_: object) -> None:
    raise AssertionError("computed again")


def test_a_cache_of_integers_that_no_quantisation_makes_is_passed_over(
    cache: Path, directory: Path
) -> None:
    _, digest = load(directory)
    (cached,) = (cache / "prepared").iterdir()
    cached.unlink()
    write_changed(directory, cached, without_a_largest)
    found, again = load(directory)
    assert again == digest
    check(found, directory)


def test_a_second_start_reads_the_cache(
    cache: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, digest = load(directory)
    check(first, directory)
    (cached,) = (cache / "prepared").iterdir()
    monkeypatch.setattr("tsqp.checkpoint.integer_cache.quantize_all", refuse_to_quantize)
    second, again = load(directory)
    assert digest == again
    assert list(second) == list(first)
    assert list((cache / "prepared").iterdir()) == [cached]


def test_a_damaged_cache_is_passed_over_and_written_again(cache: Path, directory: Path) -> None:
    _, digest = load(directory)
    (cached,) = (cache / "prepared").iterdir()
    whole = cached.read_bytes()
    change_byte(cached, len(whole) - 1)
    found, again = load(directory)
    assert again == digest
    check(found, directory)
    assert cached.read_bytes() == whole


def test_a_cache_of_another_model_is_passed_over(
    cache: Path, directory: Path, tmp_path: Path
) -> None:
    _, digest = load(directory)
    (cached,) = (cache / "prepared").iterdir()
    make_model(num_hidden_layers=1).save_pretrained(tmp_path / "shallow")
    other = tmp_path / f"other{SUFFIX}"
    prepare(str(tmp_path / "shallow"), other)
    other.rename(cached)
    found, again = load(directory)
    assert again == digest
    check(found, directory)


def test_a_changed_checkpoint_has_another_place(cache: Path, directory: Path) -> None:
    load(directory)
    weights = directory / "model.safetensors"
    change_byte(weights, weights.stat().st_size - 1)
    load(directory)
    assert len(list((cache / "prepared").iterdir())) == 2


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each tensor of a checkpoint was read."""
    names: Counter[str] = Counter()
    read = SafetensorsCheckpoint.read

    def counted(self: SafetensorsCheckpoint, name: str, *what: Any) -> torch.Tensor:
        names[name] += 1
        return read(self, name, *what)

    monkeypatch.setattr(SafetensorsCheckpoint, "read", counted)
    return names


def test_a_checkpoint_with_nan_is_refused_the_first_time(
    cache: Path, directory: Path, reads: Counter[str]
) -> None:
    weights = directory / "model.safetensors"
    tensors = load_file(weights)
    tensors["lm_head.weight"][3, 5] = float("nan")  # of the last group
    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight of .* holds NaN"):
        load(directory)
    assert set(reads.values()) == {1}
    assert list((cache / "prepared").iterdir()) == []


@pytest.mark.parametrize("fails_at", [0, 7, None], ids=["first-tensor", "middle", "end"])
def test_a_full_disk_costs_no_second_quantisation(
    fails_at: int | None,
    cache: Path,
    directory: Path,
    reads: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: list[torch.Tensor] = []

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(tensor: torch.Tensor) -> memoryview:
        if len(written) == fails_at:
            full()
        written.append(tensor)
        return bytes_of(tensor)

    monkeypatch.setattr("tsqp.checkpoint.prepared.bytes_of", write)
    if fails_at is None:
        monkeypatch.setattr(os, "fsync", full)
    found, digest = load(directory)
    assert set(reads.values()) == {1}
    check(found, directory)
    assert list((cache / "prepared").iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setenv("TSQP_CACHE", str(cache))
    assert load(directory)[1] == digest
    assert len(list((cache / "prepared").iterdir())) == 1


def replace_by_another_model(directory: Path) -> None:
    """Other weights in the same file, of the same size and with the same time."""
    weights = directory / "model.safetensors"
    before = weights.stat()
    tensors = {name: tensor.flip(0) for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_size == before.st_size


def test_another_model_of_the_same_size_and_time_gets_its_own_integers(
    cache: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsqp.checkpoint.integer_cache.PAGE_BYTES", 8)  # the header's length alone
    monkeypatch.setattr("tsqp.checkpoint.integer_cache.PAGES", 1)
    load(directory)
    replace_by_another_model(directory)
    check(load(directory)[0], directory)


@pytest.mark.parametrize("made_up", [False, True])
def test_a_link_that_is_turned_after_opening_gives_no_integers_to_the_new_model(
    made_up: bool, cache: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if made_up:  # only the path tells both models apart
        monkeypatch.setattr("tsqp.checkpoint.integer_cache._state", lambda file: ())
    new = directory.with_name("new")
    shutil.copytree(directory, new)
    replace_by_another_model(new)
    link = directory.with_name("link")
    link.symlink_to(directory)
    old = open_checkpoint(str(link))
    link.unlink()
    link.symlink_to(new)
    load_integers(old, lambda key, weights: None)
    check(load(link)[0], new)


def test_a_file_that_changes_while_it_is_quantised_leaves_no_cache(
    cache: Path, directory: Path
) -> None:
    checkpoint = open_checkpoint(str(directory))
    weights = directory / "model.safetensors"
    load_integers(checkpoint, lambda key, _: change_byte_in_place(weights, header_end(weights)))
    assert list((cache / "prepared").iterdir()) == []


def test_another_model_is_known_where_inodes_and_times_are_made_up(
    cache: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made_up(descriptor: int) -> SimpleNamespace:
        size = os.lseek(descriptor, 0, os.SEEK_END)
        return SimpleNamespace(st_ino=1, st_ctime_ns=0, st_mtime_ns=0, st_size=size)

    monkeypatch.setattr(os, "fstat", made_up)
    load(directory)
    replace_by_another_model(directory)
    check(load(directory)[0], directory)


def test_files_that_cannot_be_looked_at_cost_the_cache_alone(cache: Path, directory: Path) -> None:
    (directory / "folder.json").mkdir()
    found, _ = load(directory)
    check(found, directory)


def test_without_a_cache_folder_it_works_all_the_same(cache: Path, directory: Path) -> None:
    cache.write_text("not a folder")
    found, _ = load(directory)
    check(found, directory)
