"""A worker with a shard reads its part, and has the digest that the trusted side expects."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tsqp.checkpoint import integer_cache
from tsqp.checkpoint.checkpoint import Checkpoint, open_checkpoint
from tsqp.checkpoint.files import BinaryFile
from tsqp.checkpoint.prepared import prepare
from tsqp.checkpoint.quantize import quantize_all
from tsqp.checkpoint.shard_digests import ShardDigests, float_shard_digests
from tsqp.gpu.backends.cpu import CpuBackend
from tsqp.gpu.worker_weights import load_integers, load_shard, load_weights, read_prepared
from tsqp.model.config import linear_groups
from tsqp.model.linear_group import LinearGroup
from tsqp.model.shard import all_shards

MODEL = "random:tiny"
CPU = CpuBackend()
HALVES = all_shards(2)


@pytest.fixture
def checkpoint() -> Iterator[Checkpoint]:
    with closing(open_checkpoint(MODEL)) as checkpoint:
        yield checkpoint


def joined(parts: list[dict[LinearGroup, Tensor]]) -> dict[LinearGroup, Tensor]:
    return {group: torch.cat([part[group] for part in parts]) for group in parts[0]}


def same(one: dict[LinearGroup, Tensor], other: dict[LinearGroup, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_shards_of_integers_are_the_rows_of_the_whole(checkpoint: Checkpoint) -> None:
    whole = load_integers(checkpoint, CPU)
    parts = [load_integers(checkpoint, CPU, shard=shard) for shard in HALVES]
    assert same(joined([part.linear_FD for part in parts]), whole.linear_FD)
    digests = ShardDigests(2)
    for _ in range(2):  # a second pass counts alone
        integer_cache.load_integers(checkpoint, digests.add)
    found = [part.digest for part in parts]
    assert list(digests.hexdigests()) == found
    assert len({*found, whole.digest}) == 3


def test_what_was_loaded_before_a_damage_was_noticed_is_forgotten(checkpoint: Checkpoint) -> None:
    digests, right = ShardDigests(2), ShardDigests(2)
    groups = list(quantize_all(checkpoint))
    group, weights = groups[0]
    damaged = type(weights)(weights.weight_FD.clone(), weights.scale_F)
    damaged.weight_FD[0, 0] ^= 1
    digests.add(group, damaged)
    for each in groups:
        digests.add(*each)
        right.add(*each)
    assert digests.hexdigests() == right.hexdigests()


def test_only_the_shard_of_a_prepared_file_is_read(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.tsqp.safetensors"
    prepare(MODEL, path)
    read: list[int] = []
    read_into = BinaryFile.read_into

    def counting(file: BinaryFile, offset: int, into: memoryview) -> None:
        read.append(len(into))
        read_into(file, offset, into)

    monkeypatch.setattr(BinaryFile, "read_into", counting)
    for shard in HALVES:
        read.clear()
        part = read_prepared(path, CPU, shard=shard)
        assert part.digest == load_integers(checkpoint, CPU, shard=shard).digest
        sizes = [(shard.size_of(group), group.width) for group in linear_groups(checkpoint.config)]
        # The first two are the header.
        assert sum(read[2:]) == sum(features * (width + 4) for features, width in sizes)


def test_shards_of_numbers_are_the_rows_of_the_whole(checkpoint: Checkpoint) -> None:
    dtype = torch.float32
    whole = load_weights(checkpoint, dtype, CPU)
    parts = [load_shard(checkpoint, dtype, CPU, shard) for shard in HALVES]
    assert same(joined([part.linear_FD for part in parts]), whole.linear_FD)
    columns_VD = torch.cat([part.embedding_VD for part in parts], dim=1)
    assert torch.equal(columns_VD, whole.embedding_VD)
    digests = [part.digest for part in parts]
    assert list(float_shard_digests(checkpoint, dtype, 2)) == digests
    assert len({*digests, whole.digest}) == 3
