"""Parts of tensors: the same numbers as the whole, and no file mapped for them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType

from model_helpers import WriteGGUF
from tsqp.checkpoint.checkpoint import Checkpoint, open_checkpoint
from tsqp.checkpoint.quantize import quantize_all
from tsqp.checkpoint.weights import read_embedding, read_linear
from tsqp.checkpoint.weights_digest import WeightsDigest, weights_digest
from tsqp.model.config import layer_groups, tensor_shapes


@pytest.fixture(params=["sharded", "gguf", "gguf-q8", "random"])
def checkpoint(
    request: pytest.FixtureRequest, sharded: Path, model: Any, write_gguf: WriteGGUF
) -> Checkpoint:
    if request.param == "sharded":
        return open_checkpoint(str(sharded))
    if request.param == "random":
        return open_checkpoint("random:tiny")
    encoding = GGMLQuantizationType["Q8_0" if request.param == "gguf-q8" else "F32"]
    return open_checkpoint(str(write_gguf(model, quantization=encoding)))


def test_rows_are_those_of_the_whole_tensor(checkpoint: Checkpoint) -> None:
    shapes = tensor_shapes(checkpoint.config)
    assert len(shapes) > 10
    for name, shape in shapes.items():
        whole = checkpoint.read(name, shape)
        for start, stop in [(0, 1), (3, 4), (5, shape[0] - 1), (17, 23), (0, shape[0])]:
            part = checkpoint.read(name, shape, slice(start, stop))
            assert torch.equal(part, whole[start:stop]), (name, start, stop)


def test_blocks_of_any_size_give_the_same_integers_layout_and_digest(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def everything() -> tuple[list[torch.Tensor], list[str]]:
        digests = WeightsDigest(), WeightsDigest()
        gate_up = layer_groups(checkpoint.config, 1).gate_up
        found = [weights.weight_FD for _, weights in quantize_all(checkpoint)]
        found += [weights.scale_F for _, weights in quantize_all(checkpoint)]
        found.append(read_linear(checkpoint, gate_up, torch.float32, digests[0]).weight_FD)
        found.append(read_embedding(checkpoint, torch.float32, digests[1], multiplies=True))
        ends = [digest.hexdigest() for digest in digests]
        return found, [*ends, weights_digest(checkpoint, torch.bfloat16)]

    whole, digests = everything()
    monkeypatch.setattr("tsqp.algebra.fixed_point.BLOCK_ELEMENTS", 200)
    parts, again = everything()
    assert again == digests
    assert all(map(torch.equal, parts, whole))


def test_a_gguf_file_is_not_mapped(model: Any, write_gguf: WriteGGUF) -> None:
    path = write_gguf(model, tokens=["a"])
    checkpoint = open_checkpoint(str(path))
    checkpoint.read("model.embed_tokens.weight", (96, 32))
    assert str(path) not in Path("/proc/self/maps").read_text()
    checkpoint.close()


def test_reading_takes_a_block_and_no_whole_tensor(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsqp.algebra.fixed_point.BLOCK_ELEMENTS", 256)
    read, largest = type(checkpoint).read, 0

    def measured(self: Checkpoint, *what: Any) -> torch.Tensor:
        nonlocal largest
        found = read(self, *what)
        largest = max(largest, found.numel())
        return found

    monkeypatch.setattr(type(checkpoint), "read", measured)
    for _ in quantize_all(checkpoint):
        pass
    read_linear(checkpoint, layer_groups(checkpoint.config, 0).down, torch.float32)
    weights_digest(checkpoint, torch.float32)
    assert 0 < largest <= 256
