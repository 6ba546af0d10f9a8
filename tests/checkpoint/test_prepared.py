"""Prepared files: whole, changed, and where the disk says no."""

import json
import math
import os
import struct
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import pytest
from prepared_helpers import (
    change_byte,
    check,
    expected,
    header_end,
    without_a_largest,
    write_changed,
)
from safetensors.torch import load_file, save_file

import processes
from tsqp.checkpoint.prepared import SUFFIX, PreparedFile, prepare
from tsqp.checkpoint.quantize import IntegerWeights, add_to_digest
from tsqp.checkpoint.weights_digest import WeightsDigest
from tsqp.errors import CheckpointError, UsageError
from tsqp.gpu.backends.cpu import CpuBackend
from tsqp.gpu.worker_weights import read_prepared


@pytest.fixture
def prepared(directory: Path, tmp_path: Path) -> Path:
    path = tmp_path / f"small{SUFFIX}"
    prepare(str(directory), path)
    return path


def test_a_prepared_file_holds_the_integers_of_the_checkpoint(
    prepared: Path, directory: Path
) -> None:
    file = PreparedFile(prepared)
    check(dict(file.groups()), directory)
    digest = WeightsDigest()
    for key, weights in expected(directory).items():
        add_to_digest(digest, key, weights)
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


def with_the_least_int8(weights: IntegerWeights) -> None:
    weights.weight_FD[3, 2] = -128


def with_scale(scale: float) -> Callable[[IntegerWeights], None]:
    def change(weights: IntegerWeights) -> None:
        weights.scale_F[3] = scale

    return change


def with_a_scaled_zero(weights: IntegerWeights) -> None:
    weights.weight_FD[3] = 0


NOT_OURS = {
    "no 127 in a row": without_a_largest,
    "-128": with_the_least_int8,
    "NaN": with_scale(math.nan),
    "infinity": with_scale(math.inf),
    "minus infinity": with_scale(-math.inf),
    "zero": with_scale(0.0),
    "negative": with_scale(-0.01),
    "too small": with_scale(1e-38),
    "a row of zeros with a scale": with_a_scaled_zero,
}


@pytest.mark.parametrize("what", NOT_OURS)
def test_integers_that_no_quantisation_makes_are_refused(
    what: str, directory: Path, tmp_path: Path
) -> None:
    path = tmp_path / f"x{SUFFIX}"
    write_changed(directory, path, NOT_OURS[what])
    with pytest.raises(
        CheckpointError, match=r"for layers\.1\.down\.weight that TSQP does not make"
    ):
        list(PreparedFile(path).groups())
    with pytest.raises(
        CheckpointError, match=r"for layers\.1\.down\.weight that TSQP does not make"
    ):
        read_prepared(path, CpuBackend())


def test_a_row_of_zeros_is_kept(directory: Path, tmp_path: Path) -> None:
    weights = directory / "model.safetensors"
    tensors = load_file(weights)
    tensors["lm_head.weight"][3] = 0
    save_file(tensors, weights)
    path = tmp_path / f"x{SUFFIX}"
    prepare(str(directory), path)
    check(dict(PreparedFile(path).groups()), directory)


def test_a_name_that_no_worker_would_know_is_refused(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"must end in \.tsqp\.safetensors"):
        prepare(str(directory), tmp_path / "model.int8")


def test_a_full_disk_is_named_and_nothing_is_left(directory: Path, tmp_path: Path) -> None:
    out = tmp_path / f"x{SUFFIX}"
    program = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from tsqp.checkpoint.prepared import prepare\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "prepare(sys.argv[1], Path(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", program, str(directory), str(out)]
    with processes.start(command, stderr=processes.PIPE) as run:
        assert run.stderr is not None
        assert f"WriteError: Cannot write {out}: File too large" in run.stderr.read()
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
