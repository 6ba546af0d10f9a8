"""A word of a prompt is in the answer, and in nothing else that a command or the library says."""

import io
import json
import logging
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from protocol_helpers import Main

from tsqp import LLM, SamplingParams
from tsqp.errors import TSQPError
from tsqp.tee.text.tokenizer import Tokenizer

CANARY = "zyzzyva"
WORDS = f"my {CANARY} words"
ID = 41_234
SHOWS_ID = re.compile(rf"(?<![\d.]){ID}(?!\d)")  # not the digits of a time
SHORT = ["--privacy", "tee", "--max-tokens", "4", "--seed", "1", "--debug"]

WAYS: dict[str, tuple[list[str], str]] = {  # arguments, with IN for a file of the text beside them
    "--prompt": (["generate", "--prompt", WORDS], ""),
    "--prompt --chat": (["generate", "--chat", "--prompt", WORDS], ""),
    "standard input": (["generate", "--prompt", "-"], WORDS),
    "lines of a file": (["generate", "--prompts", "IN.txt"], f"{WORDS}\n{WORDS}"),
    "JSON": (["generate", "--prompts", "IN.jsonl"], json.dumps({"prompt": WORDS})),
    "messages": (
        ["generate", "--prompts", "IN.jsonl"],
        json.dumps({"messages": [{"role": "user", "content": WORDS, CANARY: WORDS}]}),
    ),
    "token ids": (["generate", "--prompt-ids", "IN.json"], json.dumps([ID, ID])),
    "chat": (
        ["chat", "--system", WORDS],
        f"{WORDS}\n/{CANARY}\n/system {WORDS}\n//{WORDS}\n/retry\n/save {WORDS}\n/save {WORDS}\n",
    ),
}


@pytest.fixture
def ask(main: Main, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    """Runs a command in one of the ways; all that it says, checked to hold no word of it."""

    def ask(way: str, model: object, *options: str, status: int = 0) -> str:
        (command, *arguments), text = WAYS[way]
        stdin = io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", stdin)
        for place, name in enumerate(arguments):
            if name.startswith("IN"):
                arguments[place] = str(tmp_path / name)
                (tmp_path / name).write_text(text)
        result = main(command, model, *arguments, *(options or SHORT))
        assert result.status == status, result.stderr
        said = result.stdout + result.stderr
        assert CANARY not in said
        assert not SHOWS_ID.search(said)
        return said

    return ask


@pytest.mark.parametrize("way", WAYS)
def test_what_is_said_of_an_answer_holds_no_word_of_the_prompt(
    way: str, ask: Callable[..., str], speaking: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    assert "prefill" in ask(way, speaking) or way == "chat"
    assert CANARY not in caplog.text
    assert not SHOWS_ID.search(caplog.text)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "token ids"])
def test_a_failure_that_quotes_the_prompt_is_not_shown(
    way: str, ask: Callable[..., str], speaking: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object, text: object, *rest: object, **options: object) -> None:
        raise ValueError(text, rest, options)

    for name in ("encode", "encode_chat"):
        monkeypatch.setattr(Tokenizer, name, fail)
    assert "ValueError: (message withheld" in ask(way, speaking, status=1)


def test_nor_does_the_log_of_calls_hold_a_word(
    ask: Callable[..., str], speaking: Path, tmp_path: Path
) -> None:
    log = tmp_path / "calls.jsonl"
    ask("standard input", speaking, "--worker", "local", "--max-tokens", "2", "--rpc-log", str(log))
    assert log.stat().st_size > 0
    assert CANARY not in log.read_text()


def test_no_exception_of_the_library_holds_a_word(speaking: Path) -> None:
    with LLM(str(speaking), privacy="tee") as llm:
        long = SamplingParams(max_tokens=10**6)
        fails: list[Callable[[], object]] = [
            lambda: llm.generate(f"{WORDS} \ud800"),
            lambda: llm.generate([WORDS, 1]),  # type: ignore[list-item]
            lambda: llm.generate({WORDS: WORDS}),  # type: ignore[arg-type]
            lambda: llm.generate(50_000 * WORDS),
            lambda: llm.generate([[ID, 10**9]]),
            lambda: llm.generate(WORDS, long, max_tokens=WORDS),  # type: ignore[call-arg]
            lambda: llm.chat([{"role": WORDS}]),
            lambda: llm.chat([{"role": "user", "content": {WORDS: object()}}]),
            lambda: llm.chat([{"role": "user", "content": [{"type": WORDS}]}]),
            lambda: llm.chat(WORDS),  # type: ignore[arg-type]
        ]
        for fail in fails:
            with pytest.raises((TSQPError, TypeError)) as caught:
                fail()
            shown = "".join(traceback.format_exception(caught.value))
            assert CANARY not in shown and not SHOWS_ID.search(shown)
