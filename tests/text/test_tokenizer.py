"""Text and tokens, offline."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tsqp.errors import PromptError, TokenizerError
from tsqp.tee.text.tokenizer import Tokenizer

CHAT = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def reference(demo_file: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(demo_file.parent, gguf_file=demo_file.name)


@pytest.fixture(scope="module")
def folder(reference: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with the same tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    reference.save_pretrained(folder)
    return folder


def test_a_chat_ends_where_the_assistant_begins(
    tokenizer: Tokenizer, reference: PreTrainedTokenizerBase
) -> None:
    text = reference.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert text.endswith("<|im_start|>assistant\n")
    assert tokenizer.encode_chat(CHAT) == reference(text)["input_ids"]


def test_a_missing_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = Tokenizer(str(tmp_path))
    assert not tokenizer.exists
    with pytest.raises(TokenizerError, match="--prompt-ids"):
        tokenizer.encode("x")


def test_random_weights_have_no_tokenizer() -> None:
    tokenizer = Tokenizer("random:llama-3.2-1b")
    assert not tokenizer.exists
    with pytest.raises(TokenizerError, match="--prompt-ids"):
        tokenizer.encode("x")


def test_a_missing_chat_template_is_named(folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer(str(tmp_path))
    assert tokenizer.encode("x")
    with pytest.raises(TokenizerError, match="no chat template"):
        tokenizer.encode_chat(CHAT)


def test_messages_that_the_template_refuses_are_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="does not accept these messages"):
        tokenizer.encode_chat([{"no_role": "x"}])


def test_content_in_parts_is_refused(tokenizer: Tokenizer) -> None:
    parts: Any = [{"type": "text", "text": "x"}]
    with pytest.raises(PromptError, match="must be one text"):
        tokenizer.encode_chat([{"role": "user", "content": parts}])


def test_loading_opens_no_connection(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert Tokenizer(str(folder)).encode("hello")
    assert Tokenizer("demo").encode("hello")


def test_loading_prints_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert Tokenizer("demo").encode("hello")
    assert Tokenizer(str(folder)).encode("hello " * 10_000)  # longer than its context
    assert capfd.readouterr() == ("", "")
