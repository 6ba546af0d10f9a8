"""Small checkpoints, written by transformers and by llama.cpp's own writer."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from transformers import LlamaForCausalLM

from model_helpers import WriteGGUF, make_model, permute


@pytest.fixture(scope="session")
def model() -> LlamaForCausalLM:
    return make_model()


@pytest.fixture(scope="session")
def tied_model() -> LlamaForCausalLM:
    return make_model(tie_word_embeddings=True, attention_bias=False, mlp_bias=False)


@pytest.fixture
def directory(model: LlamaForCausalLM, tmp_path: Path) -> Path:
    """A checkpoint in one file."""
    model.save_pretrained(tmp_path / "single")
    return tmp_path / "single"


@pytest.fixture
def sharded(model: LlamaForCausalLM, tmp_path: Path) -> Path:
    """A checkpoint in several files with an index."""
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


NAMED = ("bos", "eos", "eot")  # the tokens 1, 2 and 3, if the metadata names no others


@pytest.fixture
def write_gguf(tmp_path: Path) -> WriteGGUF:
    """Writes a transformers model as llama.cpp's converter does."""

    def write(
        source: LlamaForCausalLM,
        *,
        quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
        architecture: str = "llama",
        leave_out: tuple[str, ...] = (),
        metadata: dict[str, Any] | None = None,
        tensors: dict[str, np.ndarray] | None = None,
        tokens: list[str] | None = None,
    ) -> Path:
        path = tmp_path / "model.gguf"
        config = source.config
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_bos_token_id(1)
        if tokens is not None:
            writer.add_token_list(tokens)
        ids = {f"tokenizer.ggml.{key}_token_id": place for place, key in enumerate(NAMED, 1)}
        for key, value in (ids | (metadata or {})).items():
            add = {
                bool: writer.add_bool,
                int: writer.add_uint32,
                float: writer.add_float32,
                str: writer.add_string,
                list: writer.add_array,
            }
            add[type(value)](key, value)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
        for name, tensor in source.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            values = tensor.numpy()
            if ".q_proj." in name:
                values = permute(values, config.num_attention_heads)
            if ".k_proj." in name:
                values = permute(values, config.num_key_value_heads)
            gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if gguf_name in leave_out:
                continue
            encoding = quantization if values.ndim == 2 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(gguf_name, gguf.quantize(values, encoding), raw_dtype=encoding)
        for name, values in (tensors or {}).items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
