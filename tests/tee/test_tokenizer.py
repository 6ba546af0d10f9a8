"""Text and tokens, offline."""

import json
import logging
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tsqp.errors import PromptError, TokenizerError
from tsqp.model import demo
from tsqp.model.checkpoint import Checkpoint
from tsqp.tee.tokenizer import Detokenizer, Tokenizer

TEXTS = [
    "The capital of France is",
    "naïve 漢字 👩‍👩‍👧!",
    "  two\n\nlines\t",
    "",
    "<|im_start|>user",
]
CHAT = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def reference(smollm: Checkpoint) -> PreTrainedTokenizerBase:
    path = demo.locate()
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)


@pytest.fixture(scope="module")
def folder(reference: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with the same tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    reference.save_pretrained(folder)
    return folder


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_gguf_text_is_encoded_as_by_transformers(
    text: str, tokenizer: Tokenizer, reference: PreTrainedTokenizerBase
) -> None:
    assert tokenizer.encode(text) == reference(text)["input_ids"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_directory_encodes_as_by_transformers(
    text: str, folder: Path, reference: PreTrainedTokenizerBase
) -> None:
    assert Tokenizer(str(folder)).encode(text) == reference(text)["input_ids"]


def test_a_chat_ends_where_the_assistant_begins(
    tokenizer: Tokenizer, reference: PreTrainedTokenizerBase
) -> None:
    text = reference.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert text.endswith("<|im_start|>assistant\n")
    assert tokenizer.encode_chat(CHAT) == reference(text)["input_ids"]


@given(text=st.text(max_size=30))
def test_streamed_pieces_add_up_to_the_text(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text)
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@given(ids=st.lists(st.integers(0, 49_151), max_size=30))
def test_any_tokens_stream_to_their_text(ids: list[int], tokenizer: Tokenizer) -> None:
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_of_several_tokens_comes_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("👩")
    assert len(ids) > 1
    assert stream(tokenizer, ids) == [""] * (len(ids) - 1) + ["👩", ""]


def test_half_a_character_is_released_at_the_end(tokenizer: Tokenizer) -> None:
    pieces = stream(tokenizer, tokenizer.encode("x👩")[:-1])
    assert pieces[0] == "x"
    assert set(pieces[-1]) == {"\ufffd"}


def test_special_tokens_give_no_text(tokenizer: Tokenizer) -> None:
    assert "".join(stream(tokenizer, tokenizer.encode("a<|im_end|>b"))) == "ab"


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


def test_code_beside_a_tokenizer_is_not_run(folder: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    settings = {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}, "tokenizer_class": "Evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert not Tokenizer(str(tmp_path)).exists
    assert not ran.exists()


def test_loading_opens_no_connection(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert Tokenizer(str(folder)).encode("hello")
    assert Tokenizer("demo").encode("hello")


def test_loading_prints_nothing_and_leaves_logging_alone(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = logging.getLogger("transformers").level
    assert Tokenizer("demo").encode("hello")
    assert Tokenizer(str(folder)).encode("hello " * 10_000)  # longer than its context
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("transformers").level == before
