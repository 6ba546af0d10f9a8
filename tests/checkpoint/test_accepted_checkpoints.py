"""Directories that transformers accepts mean the same here; the rest is refused by name."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig

from model_helpers import WriteGGUF, make_model
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.checkpoint.integer_cache import load_integers
from tsqp.checkpoint.quantize import quantize_all
from tsqp.checkpoint.weights import parse_dtype
from tsqp.checkpoint.weights_digest import weights_digest
from tsqp.errors import CheckpointError, UnsupportedModel
from tsqp.model.config import tensor_shapes
from tsqp.model.linear_group import LinearGroup

INDEX = "model.safetensors.index.json"


def check_tensors(folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Every tensor is the one that transformers computes with."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()
    checkpoint = open_checkpoint(str(folder))
    shapes = tensor_shapes(checkpoint.config)
    assert shapes.keys() | {"lm_head.weight"} == theirs.keys()
    for name, shape in shapes.items():
        assert torch.equal(checkpoint.read(name, shape).to(dtype), theirs[name]), name
    checkpoint.close()


def rename(folder: Path, new_name: Callable[[str], str]) -> None:
    path = folder / "model.safetensors"
    tensors = {new_name(name): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


RENAMED: dict[str, Callable[[str], str]] = {
    "without its prefix": lambda name: name.removeprefix("model."),
    "head with the prefix": lambda name: name if name.startswith("model.") else f"model.{name}",
    "prefix twice": lambda name: f"model.{name}",
}


@pytest.mark.parametrize("how", RENAMED)
def test_prefixes_that_transformers_adds_or_removes(how: str, directory: Path) -> None:
    rename(directory, RENAMED[how])
    check_tensors(directory)


@pytest.mark.parametrize(
    "new_name",
    [
        lambda name: f"language_model.{name}",
        lambda name: name.replace("model.", "model.language_model.", 1),
    ],
)
def test_the_language_model_of_a_wrapper_with_its_prefix(
    new_name: Callable[[str], str], directory: Path
) -> None:
    before = weights_digest(open_checkpoint(str(directory)), torch.float32)
    rename(directory, new_name)
    assert weights_digest(open_checkpoint(str(directory)), torch.float32) == before


def test_a_base_model_that_automodel_has_saved(tied_model: Any, tmp_path: Path) -> None:
    tied_model.save_pretrained(tmp_path / "whole")
    AutoModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "base")
    names = load_file(tmp_path / "base" / "model.safetensors").keys()
    assert "embed_tokens.weight" in names
    check_tensors(tmp_path / "base")


def test_a_base_model_whose_head_is_gone_is_refused(model: Any, tmp_path: Path) -> None:
    model.model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"lacks tensor lm_head\.weight"):
        open_checkpoint(str(tmp_path))


def test_a_tensor_with_and_without_its_prefix_is_refused(directory: Path) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"norm.weight": tensors["model.norm.weight"] + 1}, path)
    with pytest.raises(CheckpointError, match=r"'(model\.)?norm\.weight' and '(model\.)?norm"):
        open_checkpoint(str(directory))


def test_a_layer_without_a_place_and_without_a_prefix_is_refused(directory: Path) -> None:
    edit_config(directory, num_hidden_layers=1)
    rename(directory, lambda name: name.removeprefix("model."))
    with pytest.raises(CheckpointError, match=r"holds tensor 'layers\.1\..*has no place"):
        open_checkpoint(str(directory))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", None])
def test_float64_tensors_are_rounded_as_transformers_rounds_them(
    dtype: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TSQP_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    model = make_model().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + torch.randn_like(parameter))
    model.save_pretrained(folder)
    edit_config(folder, dtype=dtype)
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.read("model.norm.weight", (32,)).dtype == torch.float64
    run = {"bfloat16": torch.bfloat16}.get(dtype or "", torch.float32)
    assert parse_dtype("auto", checkpoint.config) == run
    check_tensors(folder, run)
    found = dict(quantize_all(checkpoint))
    model.float().save_pretrained(tmp_path / "single")
    for key, weights in quantize_all(open_checkpoint(str(tmp_path / "single"))):
        assert torch.equal(found[key].weight_FD, weights.weight_FD)
        assert torch.equal(found[key].scale_F, weights.scale_F)


def move_shards(folder: Path, place: Callable[[int], str]) -> None:
    """Move each shard to another name, and say so in the index."""
    index = json.loads((folder / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    moved = {shard: place(number) for number, shard in enumerate(shards)}
    for old, new in moved.items():
        (folder / new).parent.mkdir(exist_ok=True)
        (folder / old).rename(folder / new)
    weight_map = {name: moved[shard] for name, shard in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index | {"weight_map": weight_map}))


def test_shards_in_folders(
    sharded: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TSQP_CACHE", str(tmp_path / "cache"))
    expected = dict(quantize_all(open_checkpoint(str(sharded))))
    move_shards(sharded, lambda number: f"part{number}/model.safetensors")
    check_tensors(sharded)
    for _ in range(2):
        found: dict[LinearGroup, Any] = {}
        load_integers(open_checkpoint(str(sharded)), found.__setitem__)
        assert all(torch.equal(found[k].weight_FD, expected[k].weight_FD) for k in expected)


def test_a_tensor_that_the_index_leaves_out_counts(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    del index["weight_map"]["model.layers.0.mlp.up_proj.bias"]
    (sharded / INDEX).write_text(json.dumps(index))
    check_tensors(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    (name, tensor), *_ = load_file(shards[0]).items()
    save_file(load_file(shards[1]) | {name: tensor + 1}, shards[1])
    with pytest.raises(CheckpointError, match=rf"Both .* and .* hold tensor '{name}'"):
        open_checkpoint(str(sharded))


@pytest.mark.parametrize(
    "text", [None, "", " \n", "{}", '{"eos_token_id": null}', '{"eos_token_id": [7, 8]}']
)
def test_a_generation_config_says_what_it_says_in_transformers(
    text: str | None, directory: Path
) -> None:
    edit_config(directory, eos_token_id=5)
    path = directory / "generation_config.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    theirs = AutoModelForCausalLM.from_pretrained(directory).generation_config.eos_token_id
    ids = theirs if isinstance(theirs, list) else [] if theirs is None else [theirs]
    assert list(open_checkpoint(str(directory)).config.eos_token_ids) == ids


@pytest.mark.parametrize(
    "text", ["{", "[1]", "null", '{"eos_token_id": true}', '{"eos_token_id": 7.0}']
)
def test_a_damaged_generation_config_is_refused(text: str, directory: Path) -> None:
    (directory / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"generation_config\.json|eos_token_id"):
        open_checkpoint(str(directory))


@pytest.mark.parametrize(
    "changes",
    [
        {"torch_dtype": "float16", "dtype": None},
        {"torch_dtype": "float16", "dtype": "bfloat16"},
        {"torch_dtype": None, "dtype": "bfloat16"},
    ],
)
def test_both_names_of_the_dtype_are_read(changes: dict[str, Any], directory: Path) -> None:
    edit_config(directory, **changes)
    theirs = AutoModelForCausalLM.from_pretrained(directory).dtype
    assert parse_dtype("auto", open_checkpoint(str(directory)).config) == theirs


OPTIONAL = ("num_key_value_heads", "head_dim", "eos_token_id", "rope_scaling", "architectures")


@pytest.mark.parametrize("key", OPTIONAL)
def test_null_means_what_it_means_in_transformers(key: str, tmp_path: Path) -> None:
    make_model(num_key_value_heads=4, head_dim=8).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    edit_config(tmp_path, **{key: None})
    theirs = LlamaConfig.from_pretrained(tmp_path)
    ours = open_checkpoint(str(tmp_path)).config
    assert (ours.num_kv_heads, ours.head_dim) == (theirs.num_key_value_heads, theirs.head_dim)
    check_tensors(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", True),
        ("attention_bias", 0),
        ("tie_word_embeddings", 1),
        ("hidden_size", 32.0),
        ("vocab_size", "96"),
    ],
)
def test_a_type_that_transformers_refuses_is_refused_by_name(
    key: str, value: object, directory: Path
) -> None:
    edit_config(directory, **{key: value})
    with pytest.raises(Exception, match=key):
        LlamaConfig.from_pretrained(directory)
    with pytest.raises(CheckpointError, match=key):
        open_checkpoint(str(directory))


def test_weights_under_a_name_of_their_own_are_refused(directory: Path) -> None:
    edit_config(directory, transformers_weights="other.safetensors")
    with pytest.raises(UnsupportedModel, match="transformers_weights"):
        open_checkpoint(str(directory))


def test_a_pipe_in_place_of_a_config_is_refused(directory: Path) -> None:
    path = directory / "generation_config.json"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match=r"Cannot read .*generation_config\.json"):
        open_checkpoint(str(directory))


@pytest.mark.parametrize("number", [0, 2])
def test_a_part_of_a_split_gguf_file_says_what_to_do(
    number: int, model: Any, write_gguf: WriteGGUF
) -> None:
    metadata = {"split.no": number, "split.count": 3, "split.tensors.count": 30}
    leave_out = () if number == 0 else ("token_embd.weight",)
    path = write_gguf(model, metadata=metadata, leave_out=leave_out)
    path = path.rename(path.with_name(f"model-0000{number + 1}-of-00003.gguf"))
    with pytest.raises(UnsupportedModel, match=r"one of the 3 parts.*llama-gguf-split --merge"):
        open_checkpoint(str(path))


def test_a_gguf_file_that_was_split_into_one_is_read(model: Any, write_gguf: WriteGGUF) -> None:
    open_checkpoint(str(write_gguf(model, metadata={"split.no": 0, "split.count": 1}))).close()
