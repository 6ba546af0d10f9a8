"""Files that were made to harm: nothing runs, nothing escapes, each is one sentence."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from text_helpers import Json, write_folder
from tsqp.checkpoint.model_files import ModelFiles
from tsqp.errors import PromptError, TokenizerError
from tsqp.tee.text import hf_folder, hf_tokens
from tsqp.tee.text.tokenizer import Tokenizer

AUTO_MAP = {"AutoTokenizer": [None, "evil.Evil"]}


@pytest.mark.parametrize(
    "named",
    [
        {"tokenizer_class": "RagTokenizer"},
        {"tokenizer_class": "RagTokenizer", "auto_map": AUTO_MAP},
        {"tokenizer_class": "Evil", "auto_map": AUTO_MAP},
        {"auto_map": ["evil.Evil", None]},
        {"tokenizer_class": ["LlamaTokenizer"]},
        {"tokenizer_class": "../evil"},
    ],
)
def test_code_in_a_folder_is_not_run_and_nothing_is_asked(
    named: Json, backends: dict[str, Backend], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    write_folder(tmp_path, backends["byte-level"], "rag", named)
    for name in ("question_encoder_tokenizer", "generator_tokenizer"):
        write_folder(tmp_path / name, backends["byte-level"], "llama", {"auto_map": AUTO_MAP})
        (tmp_path / name / "evil.py").write_bytes((tmp_path / "evil.py").read_bytes())

    def asked(*_: object) -> None:
        raise AssertionError("standard input was read")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr("sys.stdin", None)
    tokenizer = Tokenizer(str(tmp_path))
    if named.get("tokenizer_class") == "RagTokenizer":
        with pytest.raises(TokenizerError, match="class RagTokenizer"):
            tokenizer.encode("The sea")
    else:
        assert tokenizer.encode("The sea") == backends["byte-level"].encode("The sea").ids
    assert not ran.exists()


def test_text_needs_no_transformers(backends: dict[str, Backend], tmp_path: Path) -> None:
    """The whole run, in a process in which transformers cannot be imported and input ends it."""
    write_folder(tmp_path, backends["byte-level"], "llama", {"tokenizer_class": "GPT2Tokenizer"})
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import tsqp, tsqp.cli.printing, tsqp.cli.repl\n"
        "from tsqp.tee.text.tokenizer import Tokenizer\n"
        f"t = Tokenizer({str(tmp_path)!r}); print(t.decode(t.encode('The sea')))\n"
        "print(sorted({'huggingface_hub', 'sentencepiece'} & set(sys.modules)), sys.stdin.read())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        input="unread",
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (result.stdout, result.returncode) == ("The sea\n[] unread\n", 0), result.stderr


PANICS: dict[str, Callable[[Json], Any]] = {
    "a piece of no length": lambda d: d.update(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "a template without its token": lambda d: d.update(
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "q", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    ),
    "a table of characters that is none": lambda d: d.update(
        normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    ),
    "a table that points outside itself": lambda d: d.update(
        normalizer={"type": "Precompiled", "precompiled_charsmap": "BAAAAP///39hYg=="}
    ),
    "an unknown token that is none": lambda d: d["model"].update(
        unk_token="zzz", byte_fallback=False
    ),
}


@pytest.mark.parametrize("name", PANICS)
def test_a_panic_of_the_library_is_an_error(
    name: str, backends: dict[str, Backend], tmp_path: Path
) -> None:
    write_folder(tmp_path, backends["sentencepiece"], "llama", {})
    description = json.loads((tmp_path / "tokenizer.json").read_text())
    PANICS[name](description)
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    tokenizer = Tokenizer(str(tmp_path))
    with pytest.raises(TokenizerError, match="token ids") as found:
        tokenizer.encode("secret héllo 漢")
    assert "secret" not in repr(found.value)
    assert found.value.__cause__ is None


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b"\xff", b"null", b'{"model": 1}', b"[" * 100_000, b"", b'{"version": "1.0"}'],
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_a_damaged_file_is_one_sentence(
    name: str, content: bytes, backends: dict[str, Backend], tmp_path: Path
) -> None:
    write_folder(tmp_path, backends["byte-level"], "llama", {})
    (tmp_path / name).write_bytes(content)
    tokenizer = Tokenizer(str(tmp_path))
    try:
        assert tokenizer.encode("x")
    except TokenizerError as error:
        assert str(tmp_path) in str(error)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just("<s>"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["content", "0", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
SETTINGS = st.dictionaries(
    st.sampled_from(
        [
            *("added_tokens_decoder", "extra_special_tokens", "additional_special_tokens"),
            *("bos_token", "eos_token", "unk_token", "image_token", "add_bos_token", "legacy"),
            *("tokenizer_class", "chat_template", "split_special_tokens", "add_prefix_space"),
        ]
    ),
    VALUES,
    max_size=4,
)


@settings(max_examples=80)
@given(settings=SETTINGS, special=SETTINGS)
def test_any_settings_are_used_or_refused(
    settings: Json,
    special: Json,
    backends: dict[str, Backend],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.getbasetemp() / "settings"
    write_folder(folder, backends["byte-level"], "llama", settings, special_tokens_map=special)
    tokenizer = Tokenizer(str(folder))
    try:
        tokenizer.decode(tokenizer.encode("The <s> sea"))
        assert all(isinstance(text, str) for text in tokenizer.special_tokens.values())
    except TokenizerError as error:
        assert str(error).endswith(".")


def test_a_huge_file_is_refused(
    backends: dict[str, Backend], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path, backends["byte-level"], "llama", {})
    with (tmp_path / "tokenizer.json").open("r+b") as file:
        file.truncate(2**30)  # a hole, which takes no disk
    with pytest.raises(TokenizerError, match="larger than"):
        Tokenizer(str(tmp_path)).encode("x")


def test_a_vocabulary_without_end_is_refused(
    backends: dict[str, Backend], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_folder, "MAX_TOKENS", 100)
    write_folder(tmp_path, backends["byte-level"], "llama", {})
    with pytest.raises(TokenizerError, match="vocabulary of more than 100"):
        Tokenizer(str(tmp_path)).encode("x")


def test_added_tokens_without_end_are_refused(
    backends: dict[str, Backend], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_tokens, "MAX_ADDED", 100)
    write_folder(tmp_path, backends["byte-level"], "llama", {})
    assert Tokenizer(str(tmp_path)).encode("x")
    added = {str(number): {"content": f"<{number}>"} for number in range(500, 601)}
    write_folder(tmp_path, backends["byte-level"], "llama", {"added_tokens_decoder": added})
    with pytest.raises(TokenizerError, match="adds more than 100 tokens"):
        Tokenizer(str(tmp_path)).encode("x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_named(backends: dict[str, Backend], tmp_path: Path) -> None:
    write_folder(tmp_path, backends["byte-level"], "llama", {})
    (tmp_path / "tokenizer.json").chmod(0)
    with pytest.raises(TokenizerError, match=r"Cannot read .*tokenizer\.json"):
        Tokenizer(str(tmp_path)).encode("x")


def test_templates_are_found_in_every_place(backends: dict[str, Backend], tmp_path: Path) -> None:
    listed = [{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}]
    write_folder(tmp_path, backends["byte-level"], "llama", {"chat_template": listed})
    found = Tokenizer(str(tmp_path)).chat_template_source
    assert found == {"default": "a", "rag": "b"}
    (tmp_path / "chat_template.json").write_text('{"chat_template": "c"}')
    assert Tokenizer(str(tmp_path)).chat_template_source == {"default": "a", "rag": "b"}
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer(str(tmp_path)).chat_template_source == "c"
    (tmp_path / "chat_template.jinja").write_text("d")
    tokenizer = Tokenizer(str(tmp_path))
    assert tokenizer.chat_template_source == "d"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("e")
    (tmp_path / "additional_chat_templates" / "..jinja").write_text("f")
    tokenizer = Tokenizer(str(tmp_path))
    assert tokenizer.chat_template_source == {"default": "d", "tool_use": "e"}
    assert tokenizer.files is not None
    assert {
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
    } <= tokenizer.files.sha256().keys()


def test_a_template_that_is_no_text_is_refused(
    backends: dict[str, Backend], tmp_path: Path
) -> None:
    write_folder(tmp_path, backends["byte-level"], "llama", {"chat_template": [{"name": 1}]})
    with pytest.raises(TokenizerError, match="chat_template"):
        Tokenizer(str(tmp_path)).check_chat()


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_half_a_surrogate_pair_is_refused(
    text: str, backends: dict[str, Backend], tmp_path: Path
) -> None:
    write_folder(tmp_path, backends["byte-level"], "llama", {})
    with pytest.raises(PromptError, match="not valid Unicode"):
        Tokenizer(str(tmp_path), ModelFiles(tmp_path)).encode(text)
