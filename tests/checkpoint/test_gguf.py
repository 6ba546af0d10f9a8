"""GGUF files, whole and damaged."""

import hashlib
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from model_helpers import LLAMA3_ROPE, WriteGGUF, make_model, rope_freqs
from tsqp.checkpoint import demo_model
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.checkpoint.files import BinaryFile
from tsqp.checkpoint.gguf_reader import StoredTensor, StringArray, read_header
from tsqp.errors import CheckpointError, ModelError, UnsupportedModel
from tsqp.model.hf_config import from_hf
from tsqp.model.rope import Llama3Scaling, Rope


def assert_equal_tensors(path: Path, expected: dict[str, torch.Tensor]) -> None:
    checkpoint = open_checkpoint(str(path))
    assert len(expected) > 10
    for name, tensor in expected.items():
        found = checkpoint.read(name, tuple(tensor.shape))
        assert found.dtype == torch.float32
        assert torch.equal(found, tensor), name
    checkpoint.close()


def test_every_tensor_with_biases_is_the_one_that_was_converted(
    model: Any, write_gguf: WriteGGUF
) -> None:
    assert_equal_tensors(write_gguf(model), model.state_dict())


def test_the_config_is_the_one_that_was_converted(model: Any, write_gguf: WriteGGUF) -> None:
    found = open_checkpoint(str(write_gguf(model))).config
    theirs = from_hf(model.config.to_dict(), {"eos_token_id": [2, 3]})
    assert found.rms_norm_eps == pytest.approx(theirs.rms_norm_eps, rel=1e-7)
    for field in theirs.__dataclass_fields__:
        if field != "rms_norm_eps":
            assert getattr(found, field) == getattr(theirs, field), field


def test_a_bias_that_is_left_out_is_zero(model: Any, write_gguf: WriteGGUF) -> None:
    path = write_gguf(model, leave_out=("blk.1.attn_output.bias",))
    checkpoint = open_checkpoint(str(path))
    assert not checkpoint.read("model.layers.1.self_attn.o_proj.bias", (32,)).any()
    assert checkpoint.read("model.layers.0.self_attn.o_proj.bias", (32,)).any()


@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "float32"), ("Q4_0", "float32")],
)
def test_encodings_are_undone_exactly(
    model: Any, write_gguf: WriteGGUF, quantization: str, dtype: str
) -> None:
    encoding = GGMLQuantizationType[quantization]
    checkpoint = open_checkpoint(str(write_gguf(model, quantization=encoding)))
    weight = model.state_dict()["model.layers.0.mlp.up_proj.weight"]
    expected = gguf.dequantize(gguf.quantize(weight.numpy(), encoding), encoding)
    found = checkpoint.read("model.layers.0.mlp.up_proj.weight", (64, 32))
    assert np.array_equal(found.numpy(), expected)
    assert checkpoint.config.dtype == dtype


def rope(path: Path) -> Rope:
    """That of all layers."""
    (found,) = {layer.rope for layer in open_checkpoint(str(path)).config.layers}
    assert found is not None
    return found


def test_llama3_scaling_is_recovered_from_the_factors(write_gguf: WriteGGUF) -> None:
    model = make_model(rope_parameters=dict(LLAMA3_ROPE), head_dim=64)
    path = write_gguf(model, tensors={"rope_freqs.weight": rope_freqs(model.config)})
    scaling = Llama3Scaling(8.0, 1.0, 4.0, 8192)
    assert rope(path) == Rope(LLAMA3_ROPE["rope_theta"], scaling)


def test_rotary_factors_of_another_scaling_are_refused(model: Any, write_gguf: WriteGGUF) -> None:
    factors = np.linspace(1, 7, 8, dtype=np.float32)
    path = write_gguf(model, tensors={"rope_freqs.weight": factors})
    with pytest.raises(UnsupportedModel, match="rope_freqs"):
        open_checkpoint(str(path))


def test_rotary_factors_of_one_change_nothing(model: Any, write_gguf: WriteGGUF) -> None:
    path = write_gguf(model, tensors={"rope_freqs.weight": np.ones(8, dtype=np.float32)})
    assert rope(path).scaling is None


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("llama.rope.scaling.type", "longrope", "longrope"),
        ("llama.rope.scaling.attn_factor", 2.0, "attn_factor"),
        ("llama.expert_count", 8, "expert_count"),
        ("llama.rope.scale_linear", 2.0, "scale_linear"),
        ("llama.rope.scaling.yarn_ext_factor", 0.5, "yarn_ext_factor"),
        ("llama.rope.scaling.yarn_attn_factor", 0.5, "yarn_attn_factor"),
        ("llama.rope.dimension_sections", 2, "dimension_sections"),
        ("llama.attention.scale", 0.5, "attention.scale"),
        ("llama.attention.causal", False, "attention.causal"),
        ("llama.attention.clamp_kqv", 2.0, "clamp_kqv"),
    ],
)
def test_options_that_are_not_implemented_are_named(
    model: Any, write_gguf: WriteGGUF, key: str, value: Any, word: str
) -> None:
    with pytest.raises(UnsupportedModel, match=word):
        open_checkpoint(str(write_gguf(model, metadata={key: value})))


def test_another_architecture_is_named(model: Any, write_gguf: WriteGGUF) -> None:
    with pytest.raises(UnsupportedModel, match=r"'gpt2'.*supports llama"):
        open_checkpoint(str(write_gguf(model, architecture="gpt2")))


def test_a_tensor_without_a_place_is_refused(model: Any, write_gguf: WriteGGUF) -> None:
    path = write_gguf(model, tensors={"blk.0.attn_q_norm.weight": np.ones(8, dtype=np.float32)})
    with pytest.raises(UnsupportedModel, match="attn_q_norm"):
        open_checkpoint(str(path))


def test_an_encoding_without_a_decoder_is_named(model: Any, write_gguf: WriteGGUF) -> None:
    path = write_gguf(model, tensors={"rope_freqs.weight": np.ones(8, dtype=np.int32)})
    with pytest.raises(UnsupportedModel, match="encoding I32"):
        open_checkpoint(str(path))


def test_an_unknown_encoding_is_named(model: Any, write_gguf: WriteGGUF) -> None:
    path = write_gguf(model)
    raw = bytearray(path.read_bytes())
    name = b"output_norm.weight"
    place = raw.index(name) + len(name) + 4 + 8  # after the number of dimensions, and one of them
    raw[place : place + 4] = (999).to_bytes(4, "little")
    path.write_bytes(raw)
    with pytest.raises(UnsupportedModel, match=r"output_norm.*encoding 999"):
        open_checkpoint(str(path))


def test_a_missing_tensor_is_named(model: Any, write_gguf: WriteGGUF) -> None:
    checkpoint = open_checkpoint(str(write_gguf(model, leave_out=("blk.1.ffn_up.weight",))))
    with pytest.raises(CheckpointError, match=r"lacks tensor model\.layers\.1\.mlp\.up_proj"):
        checkpoint.read("model.layers.1.mlp.up_proj.weight", (64, 32))


def test_a_wrong_shape_names_the_tensor_and_both_shapes(model: Any, write_gguf: WriteGGUF) -> None:
    checkpoint = open_checkpoint(str(write_gguf(model)))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*\[32\].*\[31\]"):
        checkpoint.read("model.norm.weight", (31,))


def test_a_file_cut_anywhere_is_refused_when_it_is_opened(
    model: Any, write_gguf: WriteGGUF
) -> None:
    path = write_gguf(model, tokens=["a", "bc"])
    raw = path.read_bytes()
    header = read_header(BinaryFile(path))
    data_end = max(tensor.offset + tensor.size for tensor in header.tensors.values())
    for keep in [0, 4, 7, *range(8, 3000, 37), data_end // 2, data_end - 1]:
        path.write_bytes(raw[:keep])
        with pytest.raises(CheckpointError, match=r"model\.gguf (is cut short|is not a GGUF)"):
            open_checkpoint(str(path))


def test_flipped_header_bytes_raise_nothing_but_model_errors(
    model: Any, write_gguf: WriteGGUF
) -> None:
    path = write_gguf(model, tokens=["a", "bc"])
    raw = path.read_bytes()
    first = min(tensor.offset for tensor in read_header(BinaryFile(path)).tensors.values())
    refused = 0
    for place in range(0, first, 11):
        damaged = bytearray(raw)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            open_checkpoint(str(path)).close()
        except ModelError:
            refused += 1
    assert refused > first / 11 / 2


def test_a_big_endian_file_is_refused_by_name(model: Any, write_gguf: WriteGGUF) -> None:
    path = write_gguf(model)
    raw = path.read_bytes()
    path.write_bytes(raw[:4] + raw[4:8][::-1] + raw[8:])
    with pytest.raises(UnsupportedModel, match=r"big-endian GGUF file.*use a little-endian"):
        open_checkpoint(str(path))


def test_an_unknown_version_is_named(model: Any, write_gguf: WriteGGUF) -> None:
    path = write_gguf(model)
    raw = path.read_bytes()
    path.write_bytes(raw[:4] + (99).to_bytes(4, "little") + raw[8:])
    with pytest.raises(UnsupportedModel, match="GGUF version 99"):
        open_checkpoint(str(path))


def test_every_kind_of_value_is_the_one_that_the_library_reads(tmp_path: Path) -> None:
    path = tmp_path / "values.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("u8", 255)
    writer.add_int8("i8", -128)
    writer.add_uint16("u16", 65_535)
    writer.add_int16("i16", -32_768)
    writer.add_uint32("u32", 2**32 - 1)
    writer.add_int32("i32", -(2**31))
    writer.add_uint64("u64", 2**64 - 1)
    writer.add_int64("i64", -(2**63))
    writer.add_float32("f32", 1.5)
    writer.add_float64("f64", 1e300)
    writer.add_bool("yes", True)
    writer.add_bool("no", False)
    writer.add_string("text", "é" * 300)
    writer.add_array("strings", ["", "é漢", "x" * 1000])
    writer.add_array("integers", [1, -2, 3])
    writer.add_array("floats", [0.5, -1.25])
    writer.add_array("flags", [True, False])
    writer.add_tensor("a.weight", np.ones((2, 3, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    theirs = gguf.GGUFReader(path)
    expected = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    header = read_header(BinaryFile(path))
    found = {
        key: value.decode() if isinstance(value, StringArray) else value
        for key, value in header.metadata.items()
    }
    assert found == expected
    assert {key: type(value) for key, value in found.items()} == {
        key: type(value) for key, value in expected.items()
    }
    [tensor] = theirs.tensors
    assert header.tensors["a.weight"] == StoredTensor(
        "a.weight", GGMLQuantizationType.F32, (2, 3, 4), tensor.data_offset, tensor.n_bytes
    )


def test_the_digest_is_of_the_headers_bytes(model: Any, write_gguf: WriteGGUF) -> None:
    path = write_gguf(model, tokens=["a", "bc"])
    header = read_header(BinaryFile(path))
    raw = bytearray(path.read_bytes())
    first = min(tensor.offset for tensor in header.tensors.values())
    padding = len(raw[:first]) - len(raw[:first].rstrip(b"\0"))
    digests = {hashlib.sha256(raw[: first - skip]).hexdigest() for skip in range(padding + 1)}
    assert header.sha256 in digests
    raw[-1] ^= 1  # data of a tensor
    path.write_bytes(raw)
    assert read_header(BinaryFile(path)).sha256 == header.sha256
    raw[raw.index(b"bc")] = ord("x")
    path.write_bytes(raw)
    assert read_header(BinaryFile(path)).sha256 != header.sha256


@pytest.mark.parametrize(
    ("kind", "count"),
    [(8, 2**22 + 1), (8, 2**63), (4, 2**22 + 1), (0, 2**64 - 1), (9, 1), (13, 1), (8, 1000)],
)
def test_arrays_that_cannot_be_there_are_refused(kind: int, count: int, tmp_path: Path) -> None:
    path = tmp_path / "hostile.gguf"
    array = (9).to_bytes(4, "little") + kind.to_bytes(4, "little") + count.to_bytes(8, "little")
    numbers = [int.to_bytes(number, 8, "little") for number in (0, 1, 1)]
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + b"".join(numbers) + b"k" + array)
    with pytest.raises(CheckpointError, match="cut short or corrupt"):
        read_header(BinaryFile(path))


@pytest.mark.parametrize("counts", [(2**64 - 1, 0), (0, 2**64 - 1), (2**17, 0)])
def test_more_entries_than_any_model_has_are_refused(
    counts: tuple[int, int], tmp_path: Path
) -> None:
    path = tmp_path / "hostile.gguf"
    numbers = b"".join(int.to_bytes(count, 8, "little") for count in counts)
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + numbers + bytes(100))
    with pytest.raises(CheckpointError, match="cut short or corrupt"):
        read_header(BinaryFile(path))


def test_a_large_vocabulary_is_read_without_an_object_for_each_token(
    model: Any, write_gguf: WriteGGUF
) -> None:
    tokens = [f"token{i}" for i in range(50_000)]
    path = write_gguf(model, tokens=tokens, metadata={"zz.after": 77})
    tracemalloc.start()
    metadata = read_header(BinaryFile(path)).metadata
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5_000_000  # a string object alone takes 60 bytes
    assert metadata["zz.after"] == 77
    assert metadata["tokenizer.ggml.tokens"].decode() == tokens


@pytest.fixture(scope="module")
def demo_file() -> Path:
    try:
        return demo_model.locate()
    except CheckpointError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_the_demo_model_equals_what_transformers_dequantises(demo_file: Path) -> None:
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    theirs = load_gguf_checkpoint(demo_file, return_tensors=True, model_to_load=model)
    assert len(theirs["tensors"]) == 272
    assert_equal_tensors(demo_file, theirs["tensors"])
    assert rope(demo_file).theta == theirs["config"]["rope_theta"]
