"""Tiny models with random weights that have a tokenizer."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tee_helpers import make_engine, write_llama

from text_helpers import byte_level, sentencepiece_like
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.tee.engine.engine import Engine
from tsqp.tee.text.tokenizer import Tokenizer

PADDING = 13  # ids of the model that its tokenizer does not have


@pytest.fixture(scope="session", params=["byte-level", "sentencepiece"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer of this kind."""
    path = tmp_path_factory.mktemp("guided")
    backend = byte_level() if request.param == "byte-level" else sentencepiece_like()
    vocab_size = backend.get_vocab_size() + PADDING
    write_llama(path, vocab_size=vocab_size, eos_token_id=2, max_position_embeddings=2048)
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return path


@pytest.fixture(scope="session")
def guided_engine(folder: Path) -> Iterator[Engine]:
    checkpoint = open_checkpoint(str(folder))
    yield make_engine(checkpoint, Tokenizer(str(folder)))[0]
    checkpoint.close()


@pytest.fixture
def guided(guided_engine: Engine) -> Iterator[Engine]:
    """An engine with that checkpoint."""
    yield guided_engine
    guided_engine.abort_all()
