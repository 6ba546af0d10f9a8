"""`tsqp chat`: lines go in, answers and remarks come out; where it matters, of a real process."""

import json
import shutil
import signal
import sys
from collections.abc import Callable
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
from protocol_helpers import (
    START_S,
    Commands,
    Main,
    Result,
    socket_endpoint,
)
from typed_chat import chatting

from tsqp.cli.console import for_terminal

QUESTION = "What is the capital of France? Answer in one sentence."
LONG = ["--privacy", "tee", "--seed", "1", "--max-tokens", "50000"]
SHORT = ["--privacy", "tee", "--seed", "1", "--max-tokens", "12"]


Talk = Callable[..., Result]


@pytest.fixture
def talk(main: Main, monkeypatch: pytest.MonkeyPatch) -> Talk:
    """Runs `tsqp chat MODEL` in this process; the lines, text or bytes, are its standard input."""

    def talk(model: Path, *lines: str | bytes) -> Result:
        content = b"".join((x if isinstance(x, bytes) else x.encode()) + b"\n" for x in lines)
        monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(content), encoding="utf-8"))
        result = main("chat", model, *SHORT)
        assert result.status == 0, result.stderr
        return result

    return talk


def messages(path: Path) -> list[dict[str, str]]:
    saved: list[dict[str, str]] = json.loads(path.read_text())["messages"]
    return saved


@pytest.mark.slow
def test_a_conversation_with_the_real_model(
    commands: Commands, main: Main, demo_path: Path
) -> None:
    lines = commands.folder / "lines.txt"
    typed = [QUESTION, "", "And of Italy?", "/save talk.jsonl", "/retry", "/stats"]
    lines.write_text("".join(f"{line}\n" for line in typed))
    command = ["chat", "demo", "--privacy", "tee", "--temperature", "0", "--max-tokens", "10"]
    result = commands.run(*command, stdin=lines)
    assert result.status == 0, result.stderr
    first, second, again = result.stdout.splitlines()
    assert first == "The capital of France is Paris."
    assert again == second
    saved = messages(commands.folder / "talk.jsonl")
    assert [each["role"] for each in saved] == ["user", "assistant"] * 2
    assert [each["content"] for each in saved] == [QUESTION, first, "And of Italy?", second]
    assert "At --temperature 0 the answer will be the same." in result.stderr
    # The whole conversation in the template, computed anew, has the same answer.
    whole = commands.folder / "whole.jsonl"
    whole.write_text(json.dumps({"messages": saved[:-1]}))
    command = ["generate", "demo", "--privacy", "tee", "--prompts", whole, "--max-tokens", "10"]
    assert main(*command, "--json").json["outputs"][0]["text"] == second
    # Nor did it compute the first exchange again.
    prefilled = int(result.stderr.split("prefill ")[1].split()[0])
    assert 42 < prefilled < 42 + 25


def test_an_interrupted_answer_ends_and_is_kept(commands: Commands, speaking: Path) -> None:
    with chatting(commands, speaking, *LONG) as terminal:
        terminal.type("Hello")
        terminal.running.answers().send(signal.SIGINT)
        terminal.running.says("[stopped; the answer so far is kept]")
        assert terminal.running.is_alive
        terminal.type("/save talk.json", "/exit")
        result = terminal.running.ends()
    assert result.status == 0, result.stderr
    question, answer = messages(commands.folder / "talk.json")
    assert question == {"role": "user", "content": "Hello"}
    assert for_terminal(answer["content"]) + "\n" == result.stdout
    assert "Traceback" not in result.stderr


def test_an_interrupt_at_the_prompt_is_no_end_and_two_are(
    commands: Commands, speaking: Path
) -> None:
    with chatting(commands, speaking, *SHORT) as terminal:
        terminal.type("/nonsense")
        terminal.running.says("There is no such command; /help lists the commands.")
        terminal.running.send(signal.SIGINT)
        terminal.running.says("Ctrl-C once more, or Ctrl-D, ends the chat.")
        assert terminal.running.is_alive
        terminal.running.send(signal.SIGINT)
        result = terminal.running.ends()
    assert (result.status, result.stdout) == (0, "")


def test_commands_change_the_conversation(talk: Talk, speaking: Path, tmp_path: Path) -> None:
    result = talk(
        speaking,
        "/undo", "/retry",
        "/system Be brief.", "one", "two", "/save two.json", "/undo", "/save one.json",
        "/retry", "/save retried.json",
        "/reset", "/save none.json", "/system", "three", "/save three.json", "/save three.json",
        "/save", "/save /no/such/folder/x", "/help", "/exit", "never asked",
    )  # fmt: skip

    def saved(name: str) -> list[dict[str, str]]:
        return messages(tmp_path / f"{name}.json")

    two, one, retried = saved("two"), saved("one"), saved("retried")
    assert [each["role"] for each in two] == ["system", *["user", "assistant"] * 2]
    assert [each["content"] for each in two[:2]] == ["Be brief.", "one"]
    assert one == two[:3]
    assert retried[:2] == one[:2]
    assert retried[2] != one[2]  # the next seed
    assert saved("none") == two[:1]
    assert [each["role"] for each in saved("three")] == ["user", "assistant"]
    assert (tmp_path / "three.json").stat().st_mode & 0o077 == 0
    for sentence in (
        "There is nothing to undo.",
        "There is nothing to retry.",
        "The system message is set.",
        "Removed the last message and its answer; 1 remain.",
        "Started a new conversation.",
        "There is no system message now.",
        "That file exists and is not overwritten; name a new file.",
        "/save needs the name of a new file.",
        "Cannot write that file: No such file or directory.",
        "/retry         answer the last message again",
        "[cut off by --max-tokens or the model's context length]",
    ):
        assert sentence in result.stderr
    assert "never asked" not in result.stdout + result.stderr


def test_a_message_may_begin_with_a_slash(talk: Talk, speaking: Path, tmp_path: Path) -> None:
    talk(speaking, "//etc is a folder", "  ///x", "//", "/save talk.json")
    asked = [each["content"] for each in messages(tmp_path / "talk.json")][::2]
    assert asked == ["/etc is a folder", "//x", "/"]


def test_after_a_reset_nothing_is_kept(
    talk: Talk, speaking: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reused: list[int] = []
    monkeypatch.setattr(
        "tsqp.cli.local_chat.print_statistics", lambda llm: reused.append(llm.stats.reused_tokens)
    )
    talk(speaking, "Hello", "/stats", "/reset", "Hello", "/stats", "/retry", "/stats")
    first, second, third = reused
    assert first == second == 0
    assert third > 0


def test_a_seed_repeats_a_conversation(talk: Talk, speaking: Path) -> None:
    first, second = (talk(speaking, "one", "two") for _ in range(2))
    assert first.stdout == second.stdout
    one, two = first.stdout.splitlines()
    assert one != two


def test_a_conversation_that_outgrows_the_context_loses_nothing(
    talk: Talk, speaking: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(speaking, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100}))
    result = talk(
        model, "one", "many words " * 60, "/save one.json", "/reset", "two", "/save two.json"
    )
    assert "the model's context is 100, including the answer: /reset starts over" in result.stderr
    assert "error" not in result.stderr
    assert [each["content"] for each in messages(tmp_path / "one.json")][::2] == ["one"]
    assert [each["content"] for each in messages(tmp_path / "two.json")][::2] == ["two"]


def test_a_line_that_is_not_unicode_is_passed_over(
    talk: Talk, speaking: Path, tmp_path: Path
) -> None:
    result = talk(speaking, b"caf\xe9", b"/system caf\xe9", "Hello", "/save talk.json")
    assert result.stderr.count("This line is not valid UTF-8, and was ignored.") == 2
    assert len(messages(tmp_path / "talk.json")) == 2


def test_a_worker_that_is_lost_ends_a_chat_that_nobody_watches(
    commands: Commands, speaking: Path
) -> None:
    worker = commands.worker(speaking, "tcp://127.0.0.1:0")
    endpoint = socket_endpoint(worker.stderr)
    mode = ["--privacy", "open", "--worker", endpoint, "--max-tokens", "5", "--seed", "1"]
    with chatting(commands, speaking, *mode) as terminal:
        terminal.type("Hello")
        terminal.running.says("[cut off")
        worker.send(signal.SIGKILL)
        worker.ends()
        terminal.type("Are you there?")
        result = terminal.running.ends(START_S)
    assert result.status == 1
    assert "is gone" in result.error
    assert "Are you there?" not in result.stderr


def test_no_message_or_answer_is_logged(talk: Talk, speaking: Path) -> None:
    result = talk(speaking, "Cinnamon", "/stats")
    assert "Cinnamon" not in result.stderr
    assert "prefill" in result.stderr
    assert result.stdout.strip() not in result.stderr


@pytest.fixture
def silent(speaking: Path, tmp_path: Path) -> Path:
    """A model whose tokenizer has no chat template."""
    folder = tmp_path / "silent"
    shutil.copytree(speaking, folder)
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.mark.parametrize("command", [["chat"], ["generate", "--chat", "--prompt", "Hello"]])
def test_a_missing_chat_template_is_one_sentence(
    command: list[str], main: Main, silent: Path
) -> None:
    result = main(*command, silent, "--privacy", "tee")
    assert (result.status, result.stdout) == (1, "")
    assert "no chat template" in result.error


def test_a_missing_chat_template_is_found_before_a_worker_is_started(
    main: Main, silent: Path
) -> None:
    result = main("chat", silent, "--worker", "local")
    assert result.status == 1
    assert "starting a worker" not in result.stderr


def test_random_weights_cannot_chat(main: Main) -> None:
    result = main("chat", "random:tiny", "--privacy", "tee")
    assert (result.status, result.stdout) == (1, "")
    assert "no tokenizer" in result.error


@pytest.mark.parametrize(
    ("options", "status", "sentence"),
    [
        (["--temperature", "-1"], 1, "temperature must be"),
        (["--min-p", "2"], 1, "min_p must be"),
        (["--worker", "local"], 2, "--privacy tee has no --worker"),
        (["--pad-memory", "inf"], 2, "--pad-memory is inf"),
    ],
)
def test_impossible_options_are_refused(
    options: list[str], status: int, sentence: str, main: Main, speaking: Path
) -> None:
    result = main("chat", speaking, "--privacy", "tee", *options)
    assert (result.status, result.stdout) == (status, "")
    assert sentence in result.error
