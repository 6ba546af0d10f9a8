"""Prepared files and the cache of them: whole, changed, and where the disk says no."""

import errno
import json
import os
import struct
import subprocess
import sys
from collections import Counter
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model_helpers import make_model
from safetensors.torch import load_file, save_file

from tsqp.errors import CheckpointError, UsageError
from tsqp.model.checkpoint import Checkpoint, open_checkpoint
from tsqp.model.digest import WeightsDigest
from tsqp.model.files import bytes_of
from tsqp.model.integer_cache import load_integers
from tsqp.model.prepared import SUFFIX, PreparedFile, prepare
from tsqp.model.quantize import IntegerWeights, add_to_digest, quantize_all
from tsqp.model.safetensors_file import SafetensorsCheckpoint

Key = tuple[int, str]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, which a first start has yet to make."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("TSQP_CACHE", str(folder))
    return folder


@pytest.fixture
def prepared(directory: Path, tmp_path: Path) -> Path:
    path = tmp_path / f"small{SUFFIX}"
    prepare(str(directory), path)
    return path


def expected(model: Path) -> dict[Key, IntegerWeights]:
    return dict(quantize_all(open_checkpoint(str(model))))


def check(found: dict[Key, IntegerWeights], model: Path) -> None:
    right = expected(model)
    assert list(found) == list(right)
    for key, weights in right.items():
        assert torch.equal(found[key].weight_FD, weights.weight_FD), key
        assert torch.equal(found[key].scale_F, weights.scale_F), key


def load(model: Path) -> tuple[dict[Key, IntegerWeights], str]:
    found: dict[Key, IntegerWeights] = {}
    digest = load_integers(open_checkpoint(str(model)), found.__setitem__)
    return found, digest


def refuse_to_quantize(checkpoint: Checkpoint, *_: object) -> None:
    raise AssertionError("computed again")


def header_end(path: Path) -> int:
    return 8 + int(struct.unpack("<Q", path.read_bytes()[:8])[0])


def change_byte(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def test_a_prepared_file_holds_the_integers_of_the_checkpoint(
    prepared: Path, directory: Path
) -> None:
    file = PreparedFile(prepared)
    check(dict(file.groups()), directory)
    digest = WeightsDigest()
    for key, weights in expected(directory).items():
        add_to_digest(digest, *key, weights)
    assert file.digest == digest.hexdigest()


def test_progress_is_told_group_by_group(directory: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    prepare(str(directory), tmp_path / f"x{SUFFIX}", lambda *step: told.append(step))
    groups = expected(directory).values()
    sizes = [weights.weight_FD.numel() + 4 * len(weights.scale_F) for weights in groups]
    assert told == [(done, sum(sizes)) for done in accumulate(sizes, initial=0)]


def test_every_changed_byte_of_a_tensor_is_noticed(prepared: Path) -> None:
    first, size = header_end(prepared), prepared.stat().st_size
    for place in [first, first + 1000, (first + size) // 2, size - 1]:
        change_byte(prepared, place)
        with pytest.raises(CheckpointError, match="was changed after it was written"):
            list(PreparedFile(prepared).groups())
        change_byte(prepared, place)
    list(PreparedFile(prepared).groups())


def test_a_file_that_is_cut_short_is_refused(prepared: Path) -> None:
    prepared.write_bytes(prepared.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cut short"):
        PreparedFile(prepared)


def test_another_safetensors_file_is_no_prepared_one(directory: Path) -> None:
    with pytest.raises(CheckpointError, match="not a prepared file of this version"):
        PreparedFile(directory / "model.safetensors")


def set_shape(path: Path, shape: list[int]) -> None:
    """Change the shape of one group in the header."""
    raw = path.read_bytes()
    end = header_end(path)
    header = json.loads(raw[8:end])
    header["layers.0.qkv.weight"]["shape"] = shape
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[end:])


def test_a_group_that_is_too_wide_is_refused(prepared: Path) -> None:
    set_shape(prepared, [1, 2**18])
    with pytest.raises(CheckpointError, match="was changed"):
        list(PreparedFile(prepared).groups())


# As many elements as there are bytes, none, and fewer than none.
@pytest.mark.parametrize("shape", [[-64, -64], [2**70, 0], [-1, 4096], [64, -64], [2**63, 2]])
def test_an_impossible_shape_is_refused(prepared: Path, shape: list[int]) -> None:
    set_shape(prepared, shape)
    with pytest.raises(CheckpointError, match="cut short or not a safetensors file"):
        PreparedFile(prepared)


def test_an_existing_file_is_left_alone(prepared: Path, directory: Path) -> None:
    before = prepared.read_bytes()
    with pytest.raises(UsageError, match="exists; name a new file"):
        prepare(str(directory), prepared)
    assert prepared.read_bytes() == before


def test_a_name_that_no_worker_would_know_is_refused(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"must end in \.tsqp\.safetensors"):
        prepare(str(directory), tmp_path / "model.int8")


def test_a_full_disk_is_named_and_nothing_is_left(directory: Path, tmp_path: Path) -> None:
    out = tmp_path / f"x{SUFFIX}"
    program = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from tsqp.model.prepared import prepare\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "prepare(sys.argv[1], Path(sys.argv[2]))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(directory), str(out)], capture_output=True, text=True
    )
    assert f"WriteError: Cannot write {out}: File too large" in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == [directory.name]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_no_space_left_is_an_error_of_its_own(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        with Path("/dev/full").open("wb", buffering=0) as file:
            file.write(b"x")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device; free some space"):
        prepare(str(directory), tmp_path / f"x{SUFFIX}")
    assert [path.name for path in tmp_path.iterdir()] == [directory.name]


def test_a_second_start_reads_the_cache(
    cache: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, digest = load(directory)
    check(first, directory)
    (cached,) = (cache / "prepared").iterdir()
    monkeypatch.setattr("tsqp.model.integer_cache.quantize_all", refuse_to_quantize)
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

    monkeypatch.setattr("tsqp.model.prepared.bytes_of", write)
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
    monkeypatch.setattr("tsqp.model.integer_cache.PAGE_BYTES", 8)  # the header's length alone
    monkeypatch.setattr("tsqp.model.integer_cache.PAGES", 1)
    load(directory)
    replace_by_another_model(directory)
    check(load(directory)[0], directory)


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
