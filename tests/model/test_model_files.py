"""The small files of a model are read once."""

import hashlib
from pathlib import Path

import pytest

from tsqp.errors import CheckpointError
from tsqp.model import model_files
from tsqp.model.model_files import ModelFiles


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
