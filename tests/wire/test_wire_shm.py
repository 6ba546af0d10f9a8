"""Segments of shared memory, and the places in them."""

import errno
import mmap
import random
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tsqp.errors import ProtocolError, WorkerUnavailable
from tsqp.wire import shm
from tsqp.wire.shm import ALIGNMENT, MIN_SEGMENT, Arena, NamedSegment

SIZE = 2**20


@given(
    st.integers(1, 8000),
    st.integers(0, 500),
    st.lists(st.integers(0, 3000) | st.none(), max_size=40),
    st.data(),
)
def test_places_never_overlap_and_all_come_back(
    room: int, start: int, steps: list[int | None], data: st.DataObject
) -> None:
    """A number takes so many bytes, None gives one place back; a set of bytes is the reference."""
    size = start + room
    arena = Arena(size, start)
    taken: dict[int, set[int]] = {}
    for length in steps:
        if length is None and taken:
            offset = data.draw(st.sampled_from(sorted(taken)))
            arena.give_back(offset)
            del taken[offset]
        elif length is not None and (offset := arena.take(length)) is not None:
            place = set(range(offset, offset + max(length, 1)))
            assert offset % ALIGNMENT == 0
            assert start <= min(place) <= max(place) < size
            assert all(place.isdisjoint(other) for other in taken.values())
            taken[offset] = place
    for offset in taken:
        arena.give_back(offset)
    first = -(-start // ALIGNMENT) * ALIGNMENT
    whole = (size - first) // ALIGNMENT * ALIGNMENT
    assert arena.take(max(whole, 1)) == (first if whole > 0 else None)


def test_places_in_gaps_between_others_never_overlap() -> None:
    """An arena that is nearly full all the time, as most places then lie between two others."""
    dice = random.Random(0)
    lines = 64
    arena, taken = Arena(lines * ALIGNMENT), dict[int, set[int]]()
    gaps = 0
    for _ in range(5000):
        length = dice.randint(1, 8 * ALIGNMENT)
        offset = arena.take(length)
        if offset is None:
            given_back = dice.choice(sorted(taken))
            arena.give_back(given_back)
            del taken[given_back]
            continue
        place = set(range(offset // ALIGNMENT, -(-(offset + length) // ALIGNMENT)))
        assert max(place) < lines
        assert all(place.isdisjoint(other) for other in taken.values())
        gaps += offset < max(taken, default=0)
        taken[offset] = place
    assert gaps > 1000


def test_a_full_arena_has_no_room() -> None:
    arena = Arena(4 * ALIGNMENT)
    assert [arena.take(ALIGNMENT) for _ in range(5)] == [0, 64, 128, 192, None]
    arena.give_back(64)
    assert arena.take(ALIGNMENT + 1) is None
    assert arena.take(ALIGNMENT) == 64


def test_a_place_that_was_not_taken_cannot_be_given_back() -> None:
    arena = Arena(SIZE)
    arena.give_back(arena.take(100) or 0)
    with pytest.raises(AssertionError):
        arena.give_back(0)


@pytest.fixture
def segment(shm_folder: Path) -> Iterator[NamedSegment]:
    segment = NamedSegment.create(SIZE, shm_folder)
    yield segment
    segment.close()


def test_only_this_user_may_open_a_segment(segment: NamedSegment) -> None:
    assert stat.S_IMODE(segment.path.stat().st_mode) == 0o600


def test_a_segment_is_allocated_at_once(segment: NamedSegment) -> None:
    status = segment.path.stat()
    assert status.st_size == segment.size == SIZE
    assert status.st_blocks * 512 >= SIZE


def test_both_sides_see_the_same_tensors(segment: NamedSegment, shm_folder: Path) -> None:
    other = NamedSegment.open(segment.path.name, SIZE, shm_folder)
    mine = segment.tensor(128, (2, 3), torch.bfloat16)
    theirs = other.tensor(128, (2, 3), torch.bfloat16)
    mine.copy_(torch.arange(6).view(2, 3))
    assert torch.equal(theirs, mine)
    theirs[1, 2] = -1.0
    assert mine[1, 2] == -1.0
    assert mine.data_ptr() != theirs.data_ptr()
    other.close()


def test_a_tensor_lies_at_its_offset(segment: NamedSegment) -> None:
    segment.tensor(64, (4,), torch.int64).copy_(torch.tensor([1, -1, 2**40, 0]))
    data = segment.path.read_bytes()[64:96]
    assert [int.from_bytes(data[i : i + 8], "little", signed=True) for i in range(0, 32, 8)] == [
        1,
        -1,
        2**40,
        0,
    ]


@pytest.mark.parametrize(
    ("offset", "shape"),
    [
        (-64, (1,)),
        (1, (1,)),
        (63, (1,)),
        (SIZE, (1,)),
        (SIZE - 64, (17,)),
        (0, (SIZE // 4 + 1,)),
        (2**48, (1,)),
        (0, (2**31 - 1,) * 4),
    ],
)
def test_a_tensor_outside_is_refused(
    segment: NamedSegment, offset: int, shape: tuple[int, ...]
) -> None:
    assert segment.tensor(SIZE - 64, (16,), torch.float32).numel() == 16
    with pytest.raises(ProtocolError, match=f"{SIZE} bytes"):
        segment.tensor(offset, shape, torch.float32)


def test_a_closed_segment_gives_no_tensors(segment: NamedSegment) -> None:
    segment.close()
    with pytest.raises(ProtocolError, match="closed"):
        segment.tensor(0, (1,), torch.float32)


def _is_mapped(path: Path) -> bool:
    return path.name in Path("/proc/self/maps").read_text()


def test_closing_removes_the_name_and_the_mapping(segment: NamedSegment) -> None:
    assert _is_mapped(segment.path)
    segment.close()
    segment.close()
    assert not segment.path.exists()
    assert not _is_mapped(segment.path)


def test_a_tensor_that_is_still_held_keeps_its_memory(segment: NamedSegment) -> None:
    tensor = segment.tensor(0, (4,), torch.float32)
    segment.close()
    tensor.fill_(3.0)  # would crash if it were unmapped
    assert tensor.sum() == 12.0
    del tensor
    assert not _is_mapped(segment.path)


def test_no_descriptor_outlives_a_segment(shm_folder: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        NamedSegment.create(MIN_SEGMENT, shm_folder).close()
    with pytest.raises(WorkerUnavailable):
        NamedSegment.create(MIN_SEGMENT - 1, shm_folder)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_segment_takes_half_of_what_is_free_in_memory(
    shm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shm, "available_bytes", lambda: 2 * SIZE + 5000)
    segment = NamedSegment.create(2**30, shm_folder)
    assert segment.size == SIZE + (5000 // 2) // mmap.PAGESIZE * mmap.PAGESIZE
    segment.close()


def test_a_request_for_too_little_is_refused_with_both_figures(shm_folder: Path) -> None:
    with pytest.raises(WorkerUnavailable, match=rf"4096 bytes, and {MIN_SEGMENT} are needed"):
        NamedSegment.create(5000, shm_folder)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(WorkerUnavailable, match=r"absent: No such file"):
        NamedSegment.create(SIZE, tmp_path / "absent")


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkerUnavailable, match=r"file: Not a directory"):
        NamedSegment.create(SIZE, tmp_path / "file")


def test_a_segment_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(WorkerUnavailable, match=rf"not in this side's {tmp_path} \(No such file"):
        NamedSegment.open("tsqp-" + "0" * 32, SIZE, tmp_path)


def test_a_segment_that_is_too_short_is_refused(segment: NamedSegment, shm_folder: Path) -> None:
    with pytest.raises(WorkerUnavailable, match=f"{SIZE} bytes, not {SIZE + 1}"):
        NamedSegment.open(segment.path.name, SIZE + 1, shm_folder)


def test_a_link_is_not_followed(segment: NamedSegment, shm_folder: Path) -> None:
    link = shm_folder / "link"
    link.symlink_to(segment.path)
    with pytest.raises(WorkerUnavailable):
        NamedSegment.open("link", SIZE, shm_folder)
    link.unlink()


def test_a_segment_that_runs_out_of_room_leaves_no_file(
    shm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fallocate(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", fallocate)
    with pytest.raises(WorkerUnavailable, match=f"no segment in {shm_folder}: No space left"):
        NamedSegment.create(SIZE, shm_folder)
    assert list(shm_folder.iterdir()) == []


def test_the_ends_of_a_segment_are_read_and_written_apart(segment: NamedSegment) -> None:
    segment.write(b"nonce")
    segment.memory(4)[:] = b"head"
    assert segment.read(5) == b"nonce"
    data = segment.path.read_bytes()
    assert (data[:4], data[-5:]) == (b"head", b"nonce")
    assert set(data[4:-5]) == {0}
