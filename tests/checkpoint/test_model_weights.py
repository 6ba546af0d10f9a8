"""Fused groups, memory and dtypes."""

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from model_helpers import WriteGGUF
from tsqp.checkpoint import memory
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.checkpoint.random_weights import GEOMETRIES
from tsqp.checkpoint.weights import (
    check_memory,
    embedding_bytes,
    linear_bytes,
    parse_dtype,
    read_embedding,
    read_linear,
    read_norm,
)
from tsqp.errors import ModelError, OutOfMemory
from tsqp.model.config import layer_groups, output_projection
from tsqp.model.linear_group import LayerGroups

PARTS = {
    "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "o": ["self_attn.o_proj"],
    "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "down": ["mlp.down_proj"],
}


@pytest.mark.parametrize("group", LayerGroups._fields)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_computes_its_layers_outputs_concatenated(
    model: Any, directory: Path, group: str, dtype: torch.dtype
) -> None:
    checkpoint = open_checkpoint(str(directory))
    groups = layer_groups(checkpoint.config, 1)
    found = read_linear(checkpoint, getattr(groups, group), dtype)
    state = model.state_dict()
    weights = [state[f"model.layers.1.{part}.weight"] for part in PARTS[group]]
    biases = [state[f"model.layers.1.{part}.bias"] for part in PARTS[group]]
    assert found.bias_F is not None
    assert torch.equal(found.weight_FD, torch.cat(weights).to(dtype))
    assert torch.equal(found.bias_F, torch.cat(biases).to(dtype))
    by_columns = found.weight_FD.t().is_contiguous()  # which a CPU multiplies fastest in float32
    assert by_columns if dtype == torch.float32 else found.weight_FD.is_contiguous()


def test_a_group_without_biases_has_none(tied_model: Any, tmp_path: Path) -> None:
    tied_model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    qkv = layer_groups(checkpoint.config, 0).qkv
    assert read_linear(checkpoint, qkv, torch.float32).bias_F is None


def test_a_tied_output_projection_is_the_embedding(tied_model: Any, tmp_path: Path) -> None:
    tied_model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    head = read_linear(checkpoint, output_projection(checkpoint.config), torch.float32)
    assert torch.equal(head.weight_FD, read_embedding(checkpoint, torch.float32))


def test_embedding_and_norms_are_converted(model: Any, directory: Path) -> None:
    checkpoint = open_checkpoint(str(directory))
    state = model.state_dict()
    embedding = read_embedding(checkpoint, torch.float16)
    assert torch.equal(embedding, state["model.embed_tokens.weight"].half())
    norm = read_norm(checkpoint, "model.layers.1.input_layernorm.weight", torch.float16)
    assert torch.equal(norm, state["model.layers.1.input_layernorm.weight"].half())


def test_bytes_are_those_of_the_tensors(model: Any, write_gguf: WriteGGUF) -> None:
    config = open_checkpoint(str(write_gguf(model))).config
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    expected = sum(p.numel() for module in linear for p in module.parameters())
    assert linear_bytes(config, torch.bfloat16) == 2 * expected
    assert embedding_bytes(config, torch.float32) == 4 * 96 * 32


def test_auto_is_the_dtype_of_the_checkpoint() -> None:
    config = GEOMETRIES["llama-3.2-1b"]
    assert parse_dtype("auto", config) == torch.bfloat16
    assert parse_dtype("float16", config) == torch.float16


def test_an_unknown_dtype_is_named_with_the_choices() -> None:
    with pytest.raises(ModelError, match=r"no such dtype.*float32, float16, bfloat16"):
        parse_dtype("int4", GEOMETRIES["tiny"])


def test_what_does_not_fit_is_refused_with_both_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsqp.checkpoint.weights.available_bytes", lambda: 1000)
    check_memory(1000, "The weights")
    with pytest.raises(OutOfMemory, match=r"The weights would take 1001 bytes.*1000"):
        check_memory(1001, "The weights")


def make_cgroup(folder: Path, **values: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / f"memory.{name}").write_text(value + "\n")


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "CGROUP_ROOT", tmp_path / "root")
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "cgroup")
    return tmp_path


def test_a_limit_of_an_ancestor_counts_and_dropped_cache_does_not(cgroups: Path) -> None:
    (cgroups / "cgroup").write_text("0::/pod/box\n")
    make_cgroup(cgroups / "root/pod/box", max="max", current="600")
    make_cgroup(
        cgroups / "root/pod", max="1000", current="700", stat="anon 5\ninactive_file 200\nx 1"
    )
    assert memory.available_bytes() == 1000 - 700 + 200


def test_version_1_control_groups_count(cgroups: Path) -> None:
    (cgroups / "cgroup").write_text("9:name=systemd:/\n4:cpu,memory:/box\n")
    make_cgroup(cgroups / "root/memory/box", limit_in_bytes="5000", usage_in_bytes="1000")
    assert memory.available_bytes() == 4000


@pytest.mark.parametrize("text", ["0::/\n", None])
def test_without_limits_the_machine_decides(
    cgroups: Path, text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is not None:
        (cgroups / "cgroup").write_text(text)
    free = type("Memory", (), {"available": 123})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert memory.available_bytes() == 123
