"""Models that cannot be run: the command line says in one sentence what is wrong with which."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from protocol_helpers import Main


def edited(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def with_a_broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


BAD = {
    "unknown family": (edited(model_type="mamba"), "model_type 'mamba', but TSQP supports llama,"),
    "mixture of experts": (edited(model_type="qwen3_moe"), "'qwen3_moe', but TSQP supports"),
    "rope type": (edited(rope_parameters={"rope_type": "su"}), "rope_type 'su', but TSQP supports"),
    "too many heads": (edited(num_key_value_heads=4), "the config asks for [64, 64]"),
    "too few layers": (edited(num_hidden_layers=1), "holds tensor 'model.layers.1."),
    "too many layers": (edited(num_hidden_layers=3), "lacks tensor model.layers.2."),
    "smaller vocabulary": (edited(vocab_size=1000), "the config asks for [1000, 64]"),
    "quantized": (edited(quantization_config={"quant_method": "awq"}), "quantized with 'awq'"),
    "no tokenizer": (without_tokenizer, "has no tokenizer that can be read: add its tokenizer"),
    "broken tokenizer": (with_a_broken_tokenizer, "has no tokenizer that can be read"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_model_that_cannot_be_run_is_one_sentence(
    what: str, main: Main, speaking: Path, tmp_path: Path
) -> None:
    damage, sentence = BAD[what]
    folder = tmp_path / "model"
    shutil.copytree(speaking, folder)
    damage(folder)
    result = main("generate", folder, "--privacy", "tee", "--prompt", "Cinnamon")
    assert (result.status, result.stdout) == (1, "")
    assert sentence in result.error
    assert "Cinnamon" not in result.stderr


def test_a_gguf_file_of_an_unreadable_quantization_is_one_sentence(
    main: Main, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    kind = gguf.GGMLQuantizationType.Q8_K  # which no library decodes
    writer.add_tensor("token_embd.weight", np.zeros((4, 292), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    result = main("generate", path, "--privacy", "tee", "--prompt", "x")
    assert (result.status, result.stdout) == (1, "")
    assert "holds tensors in the encoding Q8_K, which TSQP cannot read" in result.error
