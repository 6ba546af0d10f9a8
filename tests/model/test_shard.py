"""Shards cover each group exactly, and no shard is cut inside a block."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqp.errors import UnsupportedModel, UsageError
from tsqp.model.linear_group import LinearGroup, Part
from tsqp.model.shard import MAX_SHARDS, Shard, all_shards, check_divisible, parse_shard


@given(st.integers(1, MAX_SHARDS), st.integers(0, 5000))
def test_shards_cover_all_features_once_and_evenly(count: int, more: int) -> None:
    features = 32 * (count - 1) + 1 + more  # the fewest that are enough
    check_divisible([LinearGroup(0, "o", features, 64)], count)
    rows = [shard.rows(features) for shard in all_shards(count)]
    assert [row for some in rows for row in range(some.start, some.stop)] == list(range(features))
    assert all(some.start % 32 == 0 for some in rows)
    blocks = [-(-(some.stop - some.start) // 32) for some in rows]
    assert max(blocks) - min(blocks) <= 1
    assert min(blocks) >= 1


def test_a_group_with_too_few_features_for_all_shards_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="64 output features, too few for 3 shards"):
        check_divisible([LinearGroup(1, "o", 64, 64)], 3)


def test_the_rows_of_a_group_are_found_in_its_parts() -> None:
    parts = tuple(
        Part(name, size, 8, bias=False) for name, size in (("q", 64), ("k", 32), ("v", 32))
    )
    group = LinearGroup.of(0, "qkv", parts)
    assert [(part.name, rows) for part, rows in group.pieces(slice(32, 100))] == [
        ("q", slice(32, 64)),
        ("k", slice(0, 32)),
        ("v", slice(0, 4)),
    ]


def test_a_shard_is_named_by_its_number_and_their_count() -> None:
    assert parse_shard("2/4") == Shard(2, 4)
    assert str(Shard(2, 4)) == "shard 2 of 4"


@pytest.mark.parametrize("text", ["0/2", "3/2", "1/65", "1/0", "2", "1/2/3", "1 / 2", "", "-1/2"])
def test_anything_else_is_not_a_shard(text: str) -> None:
    with pytest.raises(UsageError, match="NUMBER/COUNT"):
        parse_shard(text)
