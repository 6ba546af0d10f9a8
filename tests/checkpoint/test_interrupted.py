"""Preparations that end in the middle, in processes of their own."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import processes
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.checkpoint.integer_cache import load_integers
from tsqp.checkpoint.prepared import SUFFIX, PreparedFile, prepare
from tsqp.checkpoint.quantize import IntegerWeights, quantize_all
from tsqp.model.linear_group import LinearGroup

DEADLINE_S = 60
PAUSED = """
import sys
from pathlib import Path
from tsqp.checkpoint.prepared import prepare

def progress(done, total):
    if done > total / 2:
        print("half", flush=True)
        sys.stdin.readline()

prepare(sys.argv[1], Path(sys.argv[2]), progress)
"""

Start = Callable[[Path], processes.Process]


@pytest.fixture
def start(directory: Path) -> Iterator[Start]:
    """Prepares in another process, which stops half-way until it is told to go on."""
    running: list[processes.Process] = []

    def begin(out: Path) -> processes.Process:
        process = processes.start(
            [sys.executable, "-c", PAUSED, str(directory), str(out)],
            stdin=processes.PIPE,
            stdout=processes.PIPE,
        )
        running.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        return process

    yield begin
    for process in running:
        process.kill()
        with process:
            process.wait(DEADLINE_S)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def check_whole(path: Path, directory: Path) -> None:
    expected = dict(quantize_all(open_checkpoint(str(directory))))
    file = PreparedFile(path)
    found = dict(file.groups())
    file.close()
    assert list(found) == list(expected)
    assert all(torch.equal(found[key].weight_FD, expected[key].weight_FD) for key in expected)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / f"x{SUFFIX}"


def test_ctrl_c_leaves_nothing(start: Start, out: Path) -> None:
    process = start(out)
    assert len(names(out.parent)) == 1
    process.send_signal(signal.SIGINT)
    assert process.wait(DEADLINE_S) != 0
    assert names(out.parent) == set()


def test_what_a_killed_process_left_is_no_prepared_file_and_goes_with_the_next(
    start: Start, out: Path, directory: Path
) -> None:
    for _ in range(2):
        process = start(out)
        process.kill()
        process.wait(DEADLINE_S)
        (left,) = names(out.parent)
        assert not left.endswith(SUFFIX)
    prepare(str(directory), out)
    assert names(out.parent) == {out.name}
    check_whole(out, directory)


@pytest.mark.slow
def test_two_at_once_do_not_hurt_each_other(start: Start, out: Path, directory: Path) -> None:
    process = start(out)
    other = out.with_name(f"other{SUFFIX}")
    prepare(str(directory), other)
    prepare(str(directory), out)
    assert process.stdin is not None
    print("\n" * 100, file=process.stdin, flush=True)
    assert process.wait(DEADLINE_S) == 0
    assert names(out.parent) == {out.name, other.name}
    check_whole(out, directory)
    check_whole(other, directory)


def test_files_of_others_stay(out: Path, directory: Path) -> None:
    others = [".x.part", ".notes.txt.0123456789abcdef.part", f"x{SUFFIX}.0123456789abcdef.part"]
    for name in others:
        out.with_name(name).write_text("mine")
    abandoned = out.with_name(f".y{SUFFIX}.0123456789abcdef.part")
    abandoned.symlink_to(out.with_name(others[0]))  # not ours either, and not followed
    prepare(str(directory), out)
    assert names(out.parent) == {*others, abandoned.name, out.name}


def test_integers_of_a_checkpoint_that_was_replaced_meanwhile_are_not_those_of_the_new_one(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TSQP_CACHE", str(tmp_path / "cache"))
    weights = directory / "model.safetensors"
    old = open_checkpoint(str(directory))
    tensors = {name: tensor.flip(0) for name, tensor in load_file(weights).items()}
    save_file(tensors, tmp_path / "new", metadata={"format": "pt"})
    os.replace(tmp_path / "new", weights)  # noqa: PTH105  after it was opened

    load_integers(old, lambda key, weights: None)
    found: dict[LinearGroup, IntegerWeights] = {}
    load_integers(open_checkpoint(str(directory)), found.__setitem__)

    assert len(names(tmp_path / "cache" / "prepared")) == 2
    expected = dict(quantize_all(open_checkpoint(str(directory))))
    assert all(torch.equal(found[key].weight_FD, expected[key].weight_FD) for key in expected)
