"""The digest names the numbers, not the file format."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType

from model_helpers import WriteGGUF
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.checkpoint.weights import read_embedding, read_linear, read_norm
from tsqp.checkpoint.weights_digest import WeightsDigest, weights_digest
from tsqp.model.config import linear_groups, norm_shapes

TENSOR = torch.arange(12.0).view(3, 4)


def digest_of(name: str, tensor: torch.Tensor) -> str:
    digest = WeightsDigest()
    digest.update(name, tensor)
    return digest.hexdigest()


def flip_one_bit(tensor: torch.Tensor) -> torch.Tensor:
    flipped = tensor.clone()
    flipped.view(torch.int32)[1, 2] ^= 1
    return flipped


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("b", TENSOR),
        ("a", flip_one_bit(TENSOR)),
        ("a", TENSOR.view(4, 3)),
        ("a", TENSOR.view(torch.int32)),
        ("a", TENSOR.half()),
    ],
    ids=["name", "bit", "shape", "dtype-of-the-same-bytes", "dtype"],
)
def test_a_change_changes_the_digest(name: str, tensor: torch.Tensor) -> None:
    assert digest_of(name, tensor) != digest_of("a", TENSOR)


def test_the_order_of_tensors_does_not_matter() -> None:
    one, other = WeightsDigest(), WeightsDigest()
    one.update("a", TENSOR)
    one.update("b", TENSOR + 1)
    other.update("b", TENSOR + 1)
    other.update("a", TENSOR)
    assert one.hexdigest() == other.hexdigest()


def test_exchanged_tensors_change_the_digest() -> None:
    one, other = WeightsDigest(), WeightsDigest()
    one.update("a", TENSOR)
    one.update("b", TENSOR + 1)
    other.update("a", TENSOR + 1)
    other.update("b", TENSOR)
    assert one.hexdigest() != other.hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gguf_and_safetensors_of_the_same_numbers_agree(
    model: Any, write_gguf: WriteGGUF, sharded: Path, dtype: torch.dtype
) -> None:
    gguf_digest = weights_digest(open_checkpoint(str(write_gguf(model))), dtype)
    assert gguf_digest == weights_digest(open_checkpoint(str(sharded)), dtype)


def test_quantised_gguf_and_the_safetensors_saved_from_it_agree(
    tied_model: Any, write_gguf: WriteGGUF, tmp_path: Path
) -> None:
    path = write_gguf(tied_model, quantization=GGMLQuantizationType.Q8_0)
    checkpoint = open_checkpoint(str(path))
    state = {k: v for k, v in tied_model.state_dict().items() if k != "lm_head.weight"}
    read = {name: checkpoint.read(name, tuple(v.shape)) for name, v in state.items()}
    tied_model.save_pretrained(tmp_path / "saved", state_dict=read)
    saved = open_checkpoint(str(tmp_path / "saved"))
    assert weights_digest(saved, torch.float32) == weights_digest(checkpoint, torch.float32)


@pytest.mark.parametrize("name", ["random:tiny", "tied"])
def test_fused_loading_gives_the_same_digest(name: str, tied_model: Any, tmp_path: Path) -> None:
    if name == "tied":
        tied_model.save_pretrained(tmp_path)
        name = str(tmp_path)
    checkpoint = open_checkpoint(name)
    digest = WeightsDigest()
    for group in reversed(linear_groups(checkpoint.config)):  # in another order
        read_linear(checkpoint, group, torch.bfloat16, digest)
    for name in norm_shapes(checkpoint.config):
        read_norm(checkpoint, name, torch.bfloat16, digest)
    read_embedding(checkpoint, torch.bfloat16, digest)
    assert digest.hexdigest() == weights_digest(checkpoint, torch.bfloat16)


def test_the_number_of_threads_does_not_matter() -> None:
    checkpoint = open_checkpoint("random:tiny")
    digests = {weights_digest(checkpoint, torch.float32, threads) for threads in (1, 2, 7)}
    assert len(digests) == 1
