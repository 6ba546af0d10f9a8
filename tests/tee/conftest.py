"""The real demo model, opened once, and one small random model."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tee_helpers import make_engine, write_llama
from transformers import LlamaForCausalLM

from tsqp.checkpoint import demo_model
from tsqp.checkpoint.checkpoint import Checkpoint, open_checkpoint
from tsqp.errors import CheckpointError
from tsqp.tee.engine.engine import Engine
from tsqp.tee.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Checkpoint, LlamaForCausalLM]]:
    """A small random checkpoint and transformers' model of it."""
    folder: Path = tmp_path_factory.mktemp("tiny")
    reference = write_llama(folder)
    checkpoint = open_checkpoint(str(folder))
    yield checkpoint, reference
    checkpoint.close()


@pytest.fixture(scope="session")
def smollm() -> Iterator[Checkpoint]:
    """SmolLM2-135M-Instruct."""
    try:
        demo_model.locate()
    except CheckpointError as exc:
        pytest.skip(str(exc))
    checkpoint = open_checkpoint("demo")
    yield checkpoint
    checkpoint.close()


@pytest.fixture(scope="session")
def tokenizer(smollm: Checkpoint) -> Tokenizer:
    """SmolLM2's."""
    return Tokenizer("demo")


@pytest.fixture(scope="session")
def real(smollm: Checkpoint, tokenizer: Tokenizer) -> Engine:
    """An engine with SmolLM2."""
    return make_engine(smollm, tokenizer)[0]
