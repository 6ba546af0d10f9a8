"""Output projections are tied to the embedding exactly where transformers ties them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_models import FAMILIES, logits_in_chunks, make_model, random_ids, reference_logits
from safetensors.torch import load_file, save_file
from test_family_gguf import MODELS as GGUF_MODELS
from test_family_gguf import our_logits, write_gguf
from transformers import (
    AutoModelForCausalLM,
)

from tsqp import LLM, SamplingParams
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.checkpoint.prepared import SUFFIX, PreparedFile, prepare
from tsqp.checkpoint.quantize import quantize_group
from tsqp.errors import CheckpointError, UnsupportedModel
from tsqp.model.config import output_projection
from tsqp.tee.decoder import Decoder
from tsqp.tee.offload.local import LocalOffload

TOKENS = 24
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def set_flag(folder: Path, flag: bool | None) -> None:
    """Write tie_word_embeddings, or leave it to the family's default."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("tie_word_embeddings", None)
    path.write_text(json.dumps(config if flag is None else config | {"tie_word_embeddings": flag}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def of_transformers(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return reference_logits(model, random_ids(TOKENS))


def check_logits(folder: Path, expected: torch.Tensor) -> None:
    checkpoint = open_checkpoint(str(folder))
    decoder = Decoder(checkpoint, torch.float32)
    offload = LocalOffload(checkpoint, torch.float32)
    found = logits_in_chunks(decoder, offload, random_ids(TOKENS), [TOKENS])
    checkpoint.close()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", *FAMILIES])
@pytest.mark.parametrize("shards", ["one file", "shards"])
def test_a_head_in_the_files_is_used_whatever_the_flag_says(
    name: str, shards: str, tmp_path: Path
) -> None:
    model = make_model(name, tie_word_embeddings=False)
    model.save_pretrained(tmp_path, max_shard_size="20KB" if shards == "shards" else "1GB")
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or shards == "shards"
    flag = True if shards == "one file" else None
    set_flag(tmp_path, flag)
    expected = of_transformers(tmp_path)
    torch.testing.assert_close(expected, reference_logits(model, random_ids(TOKENS)))
    check_logits(tmp_path, expected)


@pytest.mark.parametrize("name", ["llama", "gemma2", "smollm3"])
def test_a_tied_checkpoint_may_hold_either_of_the_two(name: str, tmp_path: Path) -> None:
    model = make_model(name, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    check_logits(tmp_path, of_transformers(tmp_path))
    edit_tensors(tmp_path, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    expected = of_transformers(tmp_path)
    torch.testing.assert_close(expected, reference_logits(model, random_ids(TOKENS)))
    check_logits(tmp_path, expected)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2"])
def test_a_checkpoint_without_a_head_that_is_not_tied_is_refused(name: str, tmp_path: Path) -> None:
    make_model(name, tie_word_embeddings=True).save_pretrained(tmp_path)
    set_flag(tmp_path, False)
    with pytest.raises(CheckpointError, match=r"lacks tensor lm_head\.weight.*tie_word_embed"):
        open_checkpoint(str(tmp_path))


MODES: dict[str, dict[str, Any]] = {
    "tee": {"privacy": "tee"},
    "open": {"privacy": "open", "worker": "inproc"},
    "layer": {"privacy": "open", "worker": "inproc", "fuse": "layer"},
    "fixed point": {"privacy": "tee", "fixed_point": True},
    "pad": {"privacy": "pad", "worker": "inproc", "pad_memory": 0},
    "shares": {"privacy": "shares", "worker": ["inproc"] * 2, "insecure_same_host": True},
}


def test_every_mode_uses_the_head_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TSQP_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    make_model("llama", tie_word_embeddings=False).save_pretrained(folder)
    set_flag(folder, True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = random_ids(6)
    answer = model.generate(
        torch.tensor([ids]), max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    expected = answer[0, len(ids) :].tolist()
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    for mode, options in MODES.items():
        with LLM(str(folder), dtype="float32", **options) as llm:
            assert list(llm.generate([ids], greedy)[0].token_ids) == expected, mode


def test_a_prepared_file_holds_the_head_of_the_file(tmp_path: Path) -> None:
    make_model("gemma2", tie_word_embeddings=False).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    lm_head = output_projection(checkpoint.config)
    right = quantize_group(checkpoint, lm_head)
    set_flag(tmp_path, True)
    path = tmp_path / f"x{SUFFIX}"
    prepare(str(tmp_path), path)
    found = dict(PreparedFile(path).groups())[lm_head]
    assert torch.equal(found.weight_FD, right.weight_FD)
    assert torch.equal(found.scale_F, right.scale_F)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "phi3", "gemma3"])
def test_a_gguf_file_is_tied_where_it_has_no_head(
    architecture: str, tied: bool, tmp_path: Path
) -> None:
    name, changes = GGUF_MODELS[architecture]
    model = make_model(name, **(changes | {"tie_word_embeddings": tied}))
    path = write_gguf(tmp_path / "model.gguf", model, architecture)
    theirs = AutoModelForCausalLM.from_pretrained(
        str(tmp_path), gguf_file=path.name, dtype=torch.float32
    ).eval()
    ids = random_ids(60)
    found = our_logits(path, ids)
    torch.testing.assert_close(found, reference_logits(theirs, ids), atol=1e-4, rtol=0)
    torch.testing.assert_close(found, reference_logits(model, ids), atol=1e-4, rtol=0)


def test_a_gguf_head_for_which_llama_cpp_has_no_place_is_refused_by_name(tmp_path: Path) -> None:
    name, changes = GGUF_MODELS["gemma2"]
    model = make_model(name, **changes)
    head = np.zeros((model.config.vocab_size, model.config.hidden_size), np.float32)
    path = write_gguf(tmp_path / "model.gguf", model, "gemma2", tensors={"output.weight": head})
    with pytest.raises(UnsupportedModel, match=r"holds tensor 'output\.weight', which gemma2"):
        open_checkpoint(str(path))
