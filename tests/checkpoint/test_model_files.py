"""The small files of a model are read once."""

import hashlib
from contextlib import closing
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tsqp.checkpoint import model_files
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.checkpoint.model_files import ModelFiles
from tsqp.errors import CheckpointError
from tsqp.tee.text.tokenizer import Tokenizer

SMALL = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
}


def test_a_file_that_changes_is_used_and_hashed_as_it_was_first_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"first")
    files = ModelFiles(tmp_path)
    assert files.read("config.json") == b"first"
    path.write_bytes(b"second")
    assert files.read("config.json") == b"first"
    assert files.sha256() == {"config.json": hashlib.sha256(b"first").hexdigest()}


def test_a_file_that_appears_later_stays_absent(tmp_path: Path) -> None:
    files = ModelFiles(tmp_path)
    assert files.read("chat_template.jinja") is None
    (tmp_path / "chat_template.jinja").write_bytes(b"late")
    assert files.read("chat_template.jinja") is None
    assert files.sha256() == {}


def test_what_cannot_be_read_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(CheckpointError, match=r"Cannot read .*tokenizer\.json"):
        ModelFiles(tmp_path).read("tokenizer.json")
    monkeypatch.setattr(model_files, "MAX_FILE_BYTES", 3)
    (tmp_path / "config.json").write_bytes(b"{  }")
    with pytest.raises(CheckpointError, match="larger than the 3 bytes"):
        ModelFiles(tmp_path).read("config.json")


def test_the_tokenizer_and_the_digest_read_one_copy(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    tokenizer = Tokenizer(str(tmp_path))
    assert tokenizer.files is not None
    with closing(open_checkpoint(str(tmp_path), tokenizer.files)) as checkpoint:
        assert tokenizer.files.read("tokenizer_config.json") == b"{}"
        (tmp_path / "tokenizer_config.json").write_text('{"changed": true}')
        digests = checkpoint.file_digests()
    assert digests["tokenizer_config.json"] == hashlib.sha256(b"{}").hexdigest()
