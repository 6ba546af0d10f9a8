"""The digest of a model on the command line: printed, computed, expected."""

import re
import shutil
from pathlib import Path

import pytest
from protocol_helpers import Main, write_ids

from tsqp import LLM
from tsqp.errors import UnexpectedModel

OTHER = "sha256:" + "0" * 64


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    return write_ids(tmp_path / "ids.json", [1, 2, 3])


@pytest.mark.parametrize(
    ("form", "mode"),
    [
        ("pad", ["--privacy", "tee", "--fixed-point"]),
        ("shares", ["--privacy", "tee", "--fixed-point"]),
        ("tee", ["--privacy", "tee"]),
        ("open", ["--privacy", "tee"]),
    ],
)
def test_a_run_has_the_digest_that_is_printed_without_one(
    form: str, mode: list[str], main: Main, ids: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="tsqp")
    printed = main("digest", "random:tiny", "--privacy", form)
    assert printed.status == 0
    digest = printed.stdout.strip()
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", digest)
    run = ["generate", "random:tiny", "--prompt-ids", ids, "--max-tokens", "1", "--json", *mode]
    result = main(*run, env={"TSQP_EXPECT_MODEL": digest})
    assert result.status == 0
    assert result.json["model_digest"] == digest
    assert caplog.messages.count(f"model digest {digest}") == 1


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_another_model_is_one_sentence(command: str, main: Main, speaking: Path, ids: Path) -> None:
    prompt = ["--prompt-ids", ids] if command == "generate" else []
    result = main(command, speaking, "--privacy", "tee", "--expect-model", OTHER, *prompt)
    assert (result.status, result.stdout) == (1, "")
    assert re.search(
        rf"has the digest sha256:.{{64}}, but --expect-model asks for {OTHER}", result.error
    )


def test_what_is_hashed_is_what_the_tokenizer_uses(speaking: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(speaking, folder)
    question = [{"role": "user", "content": "Why?"}]
    with LLM(str(folder), privacy="tee") as llm:
        before = llm.tokenize(question)
    with LLM(str(folder), privacy="tee", expect_model=llm.model_digest) as again:
        (folder / "chat_template.jinja").write_text("Something else")
        (folder / "tokenizer.json").write_text("{}")
        assert again.tokenize(question) == before
    with pytest.raises(UnexpectedModel):
        LLM(str(folder), privacy="tee", expect_model=llm.model_digest)


@pytest.mark.slow
def test_a_gguf_header_is_read_once(demo_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "demo.gguf"
    shutil.copy(demo_path, path)
    with LLM(str(path), privacy="tee") as llm, path.open("r+b") as file:
        before = LLM("demo", privacy="tee")
        file.write(b"\0" * 2**20)
        assert llm.model_digest == before.model_digest
        assert llm.tokenize("The sea") == before.tokenize("The sea")
        before.close()


def test_a_mode_without_a_name_is_refused(main: Main) -> None:
    result = main("digest", "random:tiny", "--privacy", "none")
    assert (result.status, result.stdout) == (2, "")
    assert "There is no such privacy mode" in result.error
