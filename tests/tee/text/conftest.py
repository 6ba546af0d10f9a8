"""The demo model's tokenizer, and small ones, made once."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend

from text_helpers import byte_level, sentencepiece_like, unigram
from tsqp.checkpoint import demo_model
from tsqp.errors import CheckpointError
from tsqp.tee.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def demo_file() -> Path:
    """SmolLM2-135M-Instruct."""
    try:
        return demo_model.locate()
    except CheckpointError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tokenizer(demo_file: Path) -> Tokenizer:
    """SmolLM2's."""
    tokenizer = Tokenizer(str(demo_file))
    assert tokenizer.exists
    return tokenizer


@pytest.fixture(scope="session")
def backends() -> dict[str, Backend]:
    """One small tokenizer of each kind; copy before changing one."""
    return {
        "byte-level": byte_level(),
        "sentencepiece": sentencepiece_like(),
        "sentencepiece without prefix": sentencepiece_like(prefix=False),
        "unigram": unigram(),
    }
