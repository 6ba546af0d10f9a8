"""Hugging Face directories, whole and damaged."""

import json
import shutil
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model_helpers import make_model
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.checkpoint.files import BinaryFile
from tsqp.checkpoint.safetensors_file import SafetensorsFile
from tsqp.errors import CheckpointError, UnsupportedModel

NORM = "model.norm.weight"


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_header(path: Path, **changes: object) -> None:
    """Rewrite a safetensors header, leaving the data as it is."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header[NORM] |= changes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


@pytest.mark.parametrize("layout", ["directory", "sharded"])
def test_every_tensor_is_the_one_transformers_wrote(
    layout: str, model: Any, request: pytest.FixtureRequest
) -> None:
    checkpoint = open_checkpoint(str(request.getfixturevalue(layout)))
    theirs = model.state_dict()
    assert len(theirs) > 20
    for name, tensor in theirs.items():
        assert torch.equal(checkpoint.read(name, tuple(tensor.shape)), tensor), name
    checkpoint.close()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensors_keep_the_dtype_they_are_stored_in(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model().to(dtype)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    expected = model.state_dict()["lm_head.weight"]
    found = checkpoint.read("lm_head.weight", (96, 32))
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    assert checkpoint.config.dtype == str(dtype).removeprefix("torch.")


def test_a_tied_checkpoint_has_no_head_of_its_own(tied_model: Any, tmp_path: Path) -> None:
    tied_model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.config.tie_word_embeddings
    with pytest.raises(CheckpointError, match=r"lacks tensor lm_head\.weight"):
        checkpoint.read("lm_head.weight", (96, 32))


def test_a_tensor_outlives_its_file(directory: Path) -> None:
    checkpoint = open_checkpoint(str(directory))
    found = checkpoint.read("lm_head.weight", (96, 32))
    before = found.clone()
    file = directory / "model.safetensors"
    size = file.stat().st_size
    file.write_bytes(b"\0" * size)
    checkpoint.close()
    assert torch.equal(found, before)


def test_the_generation_config_is_read(directory: Path) -> None:
    (directory / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert open_checkpoint(str(directory)).config.eos_token_ids == (5, 6)


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nowhere"):
        open_checkpoint(str(tmp_path / "nowhere"))


def test_a_path_that_the_system_refuses_is_one_sentence() -> None:
    with pytest.raises(CheckpointError, match="File name too long"):
        open_checkpoint("x" * 5000)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"not a \.gguf file"):
        open_checkpoint(str(tmp_path / "model.onnx"))


def test_a_directory_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(str(tmp_path))


def test_a_directory_without_weights_is_named(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        open_checkpoint(str(directory))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_pickled_weights_are_refused(directory: Path, name: str) -> None:
    (directory / "model.safetensors").rename(directory / name)
    with pytest.raises(CheckpointError, match=r"pickle.*convert it to safetensors"):
        open_checkpoint(str(directory))


@pytest.mark.parametrize(
    "text", [b"{", b"\xff\xfe", b"[1]", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_unreadable_json_is_named(directory: Path, text: bytes) -> None:
    (directory / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"config\.json does not hold"):
        open_checkpoint(str(directory))


def test_a_config_larger_than_any_is_refused(directory: Path) -> None:
    edit_json(directory / "config.json", padding="x" * 2**23)
    with pytest.raises(CheckpointError, match=r"config\.json is larger than"):
        open_checkpoint(str(directory))


def test_a_missing_shard_is_named(sharded: Path) -> None:
    next(sharded.glob("model-00002-*")).unlink()
    with pytest.raises(CheckpointError, match=r"lacks its file .*model-00002-"):
        open_checkpoint(str(sharded))


def test_a_tensor_that_its_shard_lacks_is_named(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=weight_map | {"extra": weight_map[NORM]})
    with pytest.raises(CheckpointError, match="lacks tensor 'extra'"):
        open_checkpoint(str(sharded))


@pytest.mark.parametrize(
    "bad",
    [
        "../model.safetensors",
        "/model.safetensors",
        "a/../../model.safetensors",
        "./model.safetensors",
        "a//b.safetensors",
        "a\0.safetensors",
        "model.bin",
        "",
    ],
)
def test_an_index_that_points_outside_is_refused(sharded: Path, bad: str) -> None:
    shutil.copy(next(sharded.glob("*.safetensors")), sharded.parent / "model.safetensors")
    edit_json(sharded / "model.safetensors.index.json", weight_map={NORM: bad})
    with pytest.raises(CheckpointError, match="not a safetensors file in the same folder"):
        open_checkpoint(str(sharded))


def test_an_index_without_a_weight_map_is_refused(sharded: Path) -> None:
    edit_json(sharded / "model.safetensors.index.json", weight_map=[1])
    with pytest.raises(CheckpointError, match="weight_map"):
        open_checkpoint(str(sharded))


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_found_when_it_is_opened(directory: Path, keep: int) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is cut short"):
        open_checkpoint(str(directory))


def test_a_file_cut_after_opening_is_an_error_and_no_crash(directory: Path) -> None:
    checkpoint = open_checkpoint(str(directory))
    with (directory / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(CheckpointError, match="cut short"):
        checkpoint.read("lm_head.weight", (96, 32))


@pytest.mark.parametrize(
    "changes",
    [
        {"data_offsets": [0, 10**12]},
        {"data_offsets": [-4, 128]},
        {"data_offsets": [8, 4]},
        {"data_offsets": "all"},
        {"shape": ["32"]},
        {"shape": [-32]},
        {"shape": [-8, -4]},
        {"shape": [2**31, 0]},
        {"shape": [2**70, 0]},
    ],
)
def test_a_header_that_contradicts_the_file_is_refused(
    directory: Path, changes: dict[str, object]
) -> None:
    edit_header(directory / "model.safetensors", **changes)
    with pytest.raises(CheckpointError, match="cut short or not a safetensors file"):
        open_checkpoint(str(directory))


@pytest.mark.parametrize(
    "header",
    [b'{"x": [' + b"{}," * 100_000 + b"{}]}", b'{"__metadata__": {"a": [' + b"[]," * 100_000],
)
def test_a_header_of_other_types_ends_before_it_fills_the_memory(
    header: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"not a safetensors file"):
        SafetensorsFile(BinaryFile(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * len(header)  # twice the bytes; the objects would be twenty times as much


def test_metadata_may_have_the_names_of_fields(directory: Path, model: Any) -> None:
    path = directory / "model.safetensors"
    save_file(load_file(path), path, {"shape": "x", "dtype": "y", "data_offsets": "z"})
    checkpoint = open_checkpoint(str(directory))
    assert torch.equal(checkpoint.read(NORM, (32,)), model.state_dict()[NORM])
    checkpoint.close()


def test_a_tensor_whose_bytes_do_not_fill_its_shape_is_refused(directory: Path) -> None:
    edit_header(directory / "model.safetensors", data_offsets=[0, 64])
    with pytest.raises(CheckpointError, match="cut short or not a safetensors file"):
        open_checkpoint(str(directory)).read(NORM, (32,))


def test_a_wrong_shape_names_the_tensor_and_both_shapes(directory: Path) -> None:
    checkpoint = open_checkpoint(str(directory))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*\[32\].*\[33\]"):
        checkpoint.read(NORM, (33,))


def test_an_unreadable_dtype_is_named(directory: Path) -> None:
    file = directory / "model.safetensors"
    save_file(load_file(file) | {NORM: torch.zeros(32, dtype=torch.float8_e4m3fn)}, file)
    with pytest.raises(UnsupportedModel, match="F8_E4M3"):
        open_checkpoint(str(directory)).read(NORM, (32,))


TWIN = NORM.replace("model.", "model.language_model.")


@pytest.fixture
def twins(directory: Path) -> Path:
    """A checkpoint with another norm, by the name that it has in a model that sees images."""
    weights = load_file(directory / "model.safetensors")
    save_file(weights | {TWIN: weights[NORM] + 1}, directory / "model.safetensors")
    return directory


def test_a_language_model_has_no_prefixes(twins: Path, model: Any) -> None:
    checkpoint = open_checkpoint(str(twins))
    assert torch.equal(checkpoint.read(NORM, (32,)), model.state_dict()[NORM])
    checkpoint.close()


def test_two_tensors_for_one_place_are_refused_by_name(twins: Path) -> None:
    text = json.loads((twins / "config.json").read_text())
    for key in ("architectures", "hidden_act", "rope_parameters"):
        del text[key]
    config = {"model_type": "gemma3", "text_config": text}
    (twins / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"'{NORM}'.*'{TWIN}'|'{TWIN}'.*'{NORM}'"):
        open_checkpoint(str(twins))


def test_closing_twice_is_harmless(sharded: Path) -> None:
    checkpoint = open_checkpoint(str(sharded))
    checkpoint.close()
    checkpoint.close()
