"""Hints on disk: the same masks from them, and refused when they are not those of the weights."""

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tsqp import LLM, SamplingParams
from tsqp.algebra.hints import Polynomials
from tsqp.checkpoint import hints_file
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.checkpoint.hints_file import HintsFile, new_hints_file, write_hints
from tsqp.checkpoint.prepared import PreparedFile, prepare
from tsqp.errors import HintsError, UsageError
from tsqp.model.linear_group import LinearGroup
from tsqp.runtime import hints_cache
from tsqp.tee.offload import lattice_load
from tsqp.tee.offload.lattice_load import LatticeLoad

NOBODY = 65534
MODEL, OTHER = "random:tiny", "random:tiny:1"
QKV = LinearGroup(0, "qkv", 5, 64)
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PROMPT = [[3, 141, 59, 26]]


@pytest.fixture(scope="module")
def hints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of MODEL."""
    return written(MODEL, tmp_path_factory.mktemp("hints"))


def written(model: str, folder: Path) -> Path:
    prepare(model, folder / "model.tsqp.safetensors")
    with closing(PreparedFile(folder / "model.tsqp.safetensors")) as file:
        write_hints(file, folder / "model.tsqp.hints")
    return folder / "model.tsqp.hints"


@pytest.fixture
def making(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One item for each group whose hints are made in this process."""
    made: list[int] = []
    make = lattice_load.make_hints

    def noting(*arguments: object) -> Polynomials:
        made.append(1)
        return make(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(lattice_load, "make_hints", noting)
    return made


def private(hints: Path | None = None, model: str = MODEL) -> LLM:
    return LLM(model, worker="inproc", field="lattice", pad_memory=0, hints=hints)


def test_hints_from_a_file_are_checked_and_give_the_same_tokens(
    hints: Path, making: list[int]
) -> None:
    with LLM(MODEL, privacy="tee", fixed_point=True, field="lattice") as llm:
        expected = llm.generate(PROMPT, GREEDY)[0].token_ids
    with private(hints) as llm:
        assert llm.generate(PROMPT, GREEDY)[0].token_ids == expected
    assert making == []


def changed(hints: Path, folder: Path, change: Callable[[bytearray], bytes]) -> Path:
    path = folder / "changed.tsqp.hints"
    path.write_bytes(change(bytearray(hints.read_bytes())))
    return path


def header_of(content: bytearray) -> tuple[int, dict[str, dict[str, object]]]:
    start = 8 + int.from_bytes(content[:8], "little")
    return start, json.loads(content[8:start])


@pytest.mark.parametrize("place", [0.0, 0.31, 0.72, 0.999])
def test_one_flipped_bit_anywhere_is_refused(place: float, hints: Path, tmp_path: Path) -> None:
    def flip(content: bytearray) -> bytes:
        start, _ = header_of(content)
        content[start + int(place * (len(content) - start))] ^= 1
        return content

    with pytest.raises(HintsError, match=r"not those of its weights|values outside"):
        private(changed(hints, tmp_path, flip))


def with_header(name: str, value: str) -> Callable[[bytearray], bytes]:
    def change(content: bytearray) -> bytes:
        start, header = header_of(content)
        header["__metadata__"][name] = value
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + content[start:]

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_header("format", "tsqp-hints-0"), "not hold hints of this version"),
        (with_header("q", str(2**40 - 36863)), "not hold hints of this version"),
        (with_header("label", "another"), "not hold hints of this version"),
        (with_header("seed", "00"), "not hold hints of this version"),
        (with_header("seed", "zz" * 32), "not hold hints of this version"),
        (with_header("seed", "00" * 32), "not those of its weights"),
        (lambda content: content[: len(content) // 2], "cut short"),
        (lambda content: content[:-1], "cut short"),
        (lambda content: content[:5], "cut short"),
        (lambda content: b"", "cut short"),
    ],
    ids=["version", "modulus", "label", "short-seed", "no-seed", "other-seed", "half", "end",
         "beginning", "empty"],
)  # fmt: skip
def test_a_file_of_another_kind_or_cut_short_is_refused(
    change: Callable[[bytearray], bytes], words: str, hints: Path, tmp_path: Path
) -> None:
    with pytest.raises(HintsError, match=words):
        private(changed(hints, tmp_path, change))


def test_hints_of_another_model_are_refused(hints: Path) -> None:
    with pytest.raises(HintsError, match="group qkv of layer 0 are not those of its weights"):
        private(hints, OTHER)
    with pytest.raises(HintsError, match=r"lacks tensor|has shape"):
        private(hints, "random:smollm2-135m")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(HintsError, match=r"There is no file .*none\.tsqp\.hints"):
        private(tmp_path / "none.tsqp.hints")


@pytest.mark.parametrize("what", ["folder", "garbage", "huge header", "endless"])
def test_what_is_no_hints_file_is_told_with_the_command_that_makes_one(
    what: str, tmp_path: Path
) -> None:
    path = tmp_path / "some.tsqp.hints"
    if what == "folder":
        path.mkdir()
    elif what == "garbage":
        path.write_bytes(np.random.default_rng(0).bytes(9999))
    elif what == "huge header":
        path.write_bytes((2**62).to_bytes(8, "little") + bytes(9999))
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(HintsError, match=r"; make it again with `tsqp prepare --hints`\.$"):
        HintsFile(path)


@contextmanager
def without_rights() -> Iterator[None]:
    """As a user who may read only what everybody may, also if root runs the tests."""
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(NOBODY)
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_file_that_may_not_be_read_is_told_with_what_to_change(what: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        path = Path(folder) / "inner" / "some.tsqp.hints"
        path.parent.mkdir()
        path.touch()
        (path if what == "file" else path.parent).chmod(0)
        try:
            with without_rights(), pytest.raises(HintsError) as caught:
                HintsFile(path)
        finally:
            path.parent.chmod(0o700)
    assert str(caught.value) == (
        f"Cannot use the hints in {path}: Cannot open {path}: Permission denied; let this user "
        "read it."
    )


def test_a_file_that_names_other_weights_is_refused(hints: Path, tmp_path: Path) -> None:
    with pytest.raises(HintsError, match="was written for other weights; make it again"):
        private(changed(hints, tmp_path, with_header("digest", "0" * 64)))


def test_every_file_has_a_seed_of_its_own(hints: Path, tmp_path: Path) -> None:
    with (
        closing(HintsFile(hints)) as first,
        closing(HintsFile(written(MODEL, tmp_path))) as second,
    ):
        assert first.seed != second.seed
        assert first.digest == second.digest


def test_a_disk_with_too_little_room_is_told_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hints_file.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(hints_file, "public_polynomials", pytest.fail)
    with pytest.raises(HintsError, match=r"takes \d{7,} bytes, and 1000 are free; free some space"):
        written(MODEL, tmp_path)
    assert not list(tmp_path.glob("*.hints*"))


def test_hints_belong_to_lattice_masks(hints: Path) -> None:
    with pytest.raises(UsageError, match="--hints is for --privacy pad with --field lattice"):
        LLM(MODEL, worker="inproc", field="wide", hints=hints)


def test_a_file_that_changes_after_the_check_changes_nothing(hints: Path, tmp_path: Path) -> None:
    path = changed(hints, tmp_path, bytes)
    with private(path) as llm:
        expected = llm.generate(PROMPT, GREEDY)[0].token_ids
        with path.open("r+b") as file:
            file.seek(4096)
            file.write(np.random.default_rng(0).bytes(path.stat().st_size - 4096))
        assert llm.generate(PROMPT, GREEDY)[0].token_ids == expected


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where the hints of the model of a folder are kept."""
    path = tmp_path / "cache" / "kept.tsqp.hints"
    monkeypatch.setattr(hints_cache, "MIN_WEIGHTS", 0)
    monkeypatch.setattr(hints_cache, "cached_file", lambda *_: path)
    yield path


def test_the_cache_spares_the_second_start_the_making(cached: Path, making: list[int]) -> None:
    with private() as llm:
        expected = llm.generate(PROMPT, GREEDY)[0].token_ids
    assert len(making) == 9
    assert [path.name for path in cached.parent.iterdir()] == [cached.name]
    with private() as llm:
        assert llm.generate(PROMPT, GREEDY)[0].token_ids == expected
    assert len(making) == 9
    with closing(HintsFile(cached)) as file:
        assert len(file.digest) == 64


def test_hints_of_a_worker_are_kept_for_starts_that_make_none(
    cached: Path, making: list[int]
) -> None:
    told: list[tuple[int, int]] = []
    with LLM(
        MODEL,
        worker="inproc",
        field="lattice",
        pad_memory=0,
        hints="worker",
        on_load=lambda done, total: told.append((done, total)),
    ) as llm:
        expected = llm.generate(PROMPT, GREEDY)[0].token_ids
    done, [total] = [done for done, _ in told], {total for _, total in told}
    assert done == sorted(done)
    assert done[-1] == total
    assert sum(total / 4 < each < total for each in done) >= 9  # while hints are made, too
    assert cached.exists()
    with private() as llm:
        assert llm.generate(PROMPT, GREEDY)[0].token_ids == expected
    assert making == []


def test_a_damaged_cache_is_passed_over_and_made_again(
    cached: Path, making: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    private().close()
    content = bytearray(cached.read_bytes())
    content[-100] ^= 4
    cached.write_bytes(content)
    with caplog.at_level(logging.WARNING, "tsqp"):
        private().close()
    assert "ignoring the hints in the cache" in caplog.text
    assert len(making) == 18
    private().close()
    assert len(making) == 18


def test_a_cache_that_cannot_be_written_costs_nothing_but_a_warning(
    cached: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cached.parent.write_text("a file in the way")
    with caplog.at_level(logging.WARNING, "tsqp"):
        private().close()
    assert "cannot keep hints" in caplog.text


def test_small_models_keep_no_hints() -> None:
    with closing(open_checkpoint("random:tiny")) as checkpoint:
        assert hints_cache.hints_path(checkpoint, {QKV: (64, 64)}) is None


def test_a_writer_that_is_interrupted_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "new.tsqp.hints"
    with (
        pytest.raises(KeyboardInterrupt),
        new_hints_file(path, bytes(32), [QKV]) as writer,
    ):
        writer.add(QKV, Polynomials.empty(2048, QKV.features))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_no_two_loads_share_a_seed() -> None:
    shapes = {QKV: QKV.shape}
    assert LatticeLoad(shapes, {}).seed != LatticeLoad(shapes, {}).seed
