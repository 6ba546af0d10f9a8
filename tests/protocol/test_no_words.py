"""What a user types is never repeated by an error, whatever is wrong with it, with --debug or not.

A prompt may be typed in the wrong place, or without quotes; and other libraries quote what they
cannot parse in exceptions that become causes of ours.
"""

import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from protocol_helpers import Main

from tsqp.cli import app
from tsqp.cli.prompts import read_ids, read_texts
from tsqp.errors import PromptError, TSQPError, printable_path
from tsqp.runtime.tracebacks import without_foreign_messages

CANARY = "zyzzyva"
WORDS = f"my {CANARY} words"
TEE = ["generate", "random:tiny", "--privacy", "tee"]

# What makes each command fail soon, so that only one option at a time is of interest.
FAILING: dict[str, list[str]] = {
    "generate": ["random:tiny", "--privacy", "tee"],
    "chat": ["random:tiny", "--privacy", "tee"],
    "worker": ["random:tiny", "--listen", "nowhere"],
    "prepare": ["random:tiny", "no-such-ending"],
    "keygen": ["/dev/null/keys"],
    "audit": ["nowhere", "--model", "random:tiny", "--prompt-ids", "nowhere"],
    "bench": ["random:tiny", "--modes", "nothing"],
    "bench-transport": ["--calls", "0"],
    "bench-scaling": ["--widths", "0"],
    "bench-kernels": ["--widths", "0"],
    "bench-trusted-side": ["random:tiny", "--modes", "nothing"],
    "bench-attention": ["random:tiny", "--tokens", "0"],
    "bench-accuracy": ["random:tiny", "--text", "nowhere"],
    "report": ["nowhere"],
    "doctor": ["--threads", "0"],
}


def options() -> Iterator[Any]:
    """Every command and every option that takes a value; slow if an earlier command has it."""
    seen: set[str] = set()
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        for parameter in command.params:
            is_option = parameter.param_type_name == "option" and not parameter.is_flag
            if name in FAILING and is_option:
                option = parameter.opts[0]
                yield pytest.param(name, option, marks=pytest.mark.slow if option in seen else ())
                seen.add(option)


@pytest.mark.parametrize("value", [CANARY, WORDS])
@pytest.mark.parametrize(("command", "option"), list(options()))
def test_a_value_in_the_wrong_place_is_not_repeated(
    command: str, option: str, value: str, main: Main
) -> None:
    result = main(command, *FAILING[command], option, value, "--debug")
    assert CANARY not in result.stdout + result.stderr
    if option != "--rpc-log":  # which takes any name, and fails for the lack of a prompt
        assert result.status in (1, 2)
        assert result.stderr.count("error: ") == 1


def test_the_options_are_found() -> None:
    assert len(list(options())) > 80


@pytest.mark.parametrize(
    "arguments",
    [
        [CANARY],
        [WORDS],
        ["generate", WORDS, "--privacy", "tee", "--prompt", "x"],
        ["generate", CANARY, "--privacy", "tee", "--prompt", "x"],
        [*TEE, WORDS],
        [*TEE, *WORDS.split()],
        [*TEE, "--prompt", *WORDS.split()],
        [*TEE, f"--promt={WORDS}"],
        [*TEE, "--promt", WORDS],
        [*TEE, f"--{CANARY}"],
        [*TEE, f"-{CANARY}"],
        [*TEE, f"--json={WORDS}"],
        [*TEE, "--logit-bias", f"{CANARY}=1"],
        [*TEE, "--prompt", WORDS, "--max-tokens"],
        ["chat", WORDS],
        ["chat", CANARY],
        ["chat", 200 * WORDS],
        ["generate", 200 * WORDS, "--privacy", "tee", "--prompt", "x"],
        ["worker", WORDS, "--listen", "ipc:///tmp/nothing.sock"],
        ["worker", f"{CANARY}.tsqp.safetensors", "--listen", "ipc:///tmp/nothing.sock"],
        ["prepare", WORDS, "x.tsqp.safetensors"],
        ["report", WORDS],
        ["audit", WORDS],
        ["--config", WORDS, "generate"],
        ["generate", f"random:{WORDS}", "--privacy", "tee", "--prompt", "x"],
    ],
)
def test_words_that_are_no_argument_are_not_repeated(arguments: list[str], main: Main) -> None:
    for debug in ([], ["--debug"]):
        result = main(*arguments, *debug)
        assert result.status in (1, 2)
        assert "error: " in result.stderr
        assert CANARY not in result.stdout + result.stderr


@pytest.mark.parametrize("name", ["TSQP_DEBUG", "TSQP_THREADS", "TSQP_PRIVACY", "TSQP_CONFIG"])
def test_settings_are_not_repeated(name: str, main: Main) -> None:
    result = main(*TEE, "--prompt", "x", env={name: WORDS})
    assert result.status in (1, 2)
    assert CANARY not in result.stdout + result.stderr


def test_an_error_says_where_a_wrong_setting_comes_from(main: Main, tmp_path: Path) -> None:
    result = main(*TEE, "--prompt", "x", env={"TSQP_THREADS": WORDS})
    expected = "--threads must be an integer, 1 or more; it comes from the environment."
    assert result.error == expected
    path = tmp_path / "settings.toml"
    path.write_text("threads = 0")
    result = main("--config", path, *TEE, "--prompt", "x")
    assert result.error == expected.replace("environment", "settings file")


def test_a_misspelt_option_and_command_are_helped(main: Main) -> None:
    assert "did you mean --prompt" in main(*TEE, "--promt=x").error
    assert "choose one of demo, generate, chat" in main("genrate").error


FILES: dict[str, tuple[str, bytes]] = {
    "text that is not UTF-8": ("p.txt", WORDS.encode() + b" \xff"),
    "JSON that is cut": ("p.jsonl", b'{"prompt": "%b' % WORDS.encode()),
    "JSON with an escape that does not exist": (
        "p.jsonl",
        b'{"prompt": "\\z %b"}' % WORDS.encode(),
    ),
    "JSON that is not UTF-8": ("p.jsonl", b'{"prompt": "\xff %b"}' % WORDS.encode()),
    "an unknown key": ("p.jsonl", b'{"%b": 1}' % CANARY.encode()),
    "a message of another type": ("p.jsonl", b'{"messages": ["%b"]}' % WORDS.encode()),
    "a role of another type": ("p.jsonl", b'{"messages": [{"role": {"%b": 1}}]}' % CANARY.encode()),
    "a part of another type": (
        "p.jsonl",
        b'{"messages": [{"role": "user", "content": [{"type": "%b"}]}]}' % CANARY.encode(),
    ),
    "a message that is nested too deep": (
        "p.jsonl",
        b'{"messages": [{"role": "user", "%b": %b}]}' % (CANARY.encode(), 99 * b"[" + 99 * b"]"),
    ),
    "a prompt of another type": ("p.jsonl", b'{"prompt": ["%b"]}' % WORDS.encode()),
    "half a surrogate pair": ("p.jsonl", b'{"prompt": "%b \\ud800"}' % WORDS.encode()),
    "no JSON at all": ("p.jsonl", WORDS.encode()),
    "another suffix": ("p.csv", WORDS.encode()),
    "ids that are text": ("p.json", b'[1, "%b"]' % WORDS.encode()),
    "ids under a key": ("p.json", b'{"%b": [1]}' % CANARY.encode()),
    "ids that are no JSON": ("p.json", WORDS.encode()),
    "a settings file": ("p.toml", f'[generate]\nprompt = "{WORDS}\n'.encode()),
    "a settings file that is not UTF-8": ("p.toml", f'prompt = "{WORDS}"'.encode() + b"\xff"),
    "a settings file with a key twice": ("p.toml", f"{CANARY}=1\n{CANARY}=2".encode()),
    "a settings file with a sentence as a key": ("p.toml", f'"{WORDS}" = 1'.encode()),
    "a settings file with a sentence as a command": ("p.toml", f'["{WORDS}"]'.encode()),
    "a settings file with a sentence for a command": (
        "p.toml",
        f'[generate]\n"{WORDS}" = 1'.encode(),
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_cannot_be_read_is_not_repeated(
    kind: str, main: Main, tmp_path: Path, speaking: Path
) -> None:
    name, content = FILES[kind]
    path = tmp_path / name
    path.write_bytes(content)
    arguments: list[object] = ["generate", speaking, "--privacy", "tee"]
    if path.suffix == ".toml":
        arguments = ["--config", path, *arguments]
    else:
        arguments += ["--prompt-ids" if path.suffix == ".json" else "--prompts", path]
    result = main(*arguments, "--debug")
    assert result.status in (1, 2)
    assert str(path) in result.stderr or kind == "half a surrogate pair"
    assert CANARY not in result.stdout + result.stderr


def test_standard_input_that_is_not_utf8_is_not_repeated(
    main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = io.BytesIO(WORDS.encode() + b" \xff")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(content, encoding="utf-8"))
    result = main(*TEE, "--prompt", "-", "--debug")
    assert "not valid UTF-8" in result.stderr
    assert CANARY not in result.stdout + result.stderr


@pytest.mark.parametrize("option", ["--prompt", "--stop", "--stop-token-id", "--logit-bias"])
def test_what_a_model_cannot_take_is_not_repeated(option: str, main: Main) -> None:
    result = main(*TEE, option, os.fsdecode(WORDS.encode() + b"\xff"), "--debug")
    assert result.status in (1, 2)
    assert CANARY not in result.stdout + result.stderr


def test_a_template_that_fails_on_a_message_does_not_repeat_it(
    main: Main, speaking: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(speaking, folder)
    template = "{{ {}[messages[0]['content']].length }}"
    (folder / "chat_template.jinja").write_text(template)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": template}))
    result = main("generate", folder, "--privacy", "tee", "--chat", "--prompt", WORDS, "--debug")
    assert result.status == 1
    assert "template" in result.stderr
    assert CANARY not in result.stdout + result.stderr


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, its causes and their contexts."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize("kind", [kind for kind, (name, _) in FILES.items() if "toml" not in name])
def test_no_exception_keeps_what_it_could_not_read(kind: str, tmp_path: Path) -> None:
    name, content = FILES[kind]
    path = tmp_path / name
    path.write_bytes(content)
    read: Callable[[Path], object] = read_ids if path.suffix == ".json" else read_texts
    try:
        read(path)
    except PromptError as exc:
        for error in chain(exc):
            assert CANARY not in repr(error.args) + repr(vars(error))


def test_a_traceback_has_the_messages_of_our_errors_only() -> None:
    def fail() -> None:
        try:
            try:
                int(WORDS)
            except ValueError:
                raise KeyError(WORDS) from None
        except KeyError as exc:
            exc.add_note(WORDS)
            raise TSQPError("Ours is shown.") from exc

    with pytest.raises(TSQPError) as caught:
        fail()
    shown_text = without_foreign_messages(caught.value)
    assert CANARY not in shown_text
    assert "KeyError: (message withheld" in shown_text
    assert "tsqp.errors.TSQPError: Ours is shown." in shown_text
    assert "raise TSQPError(" in shown_text  # the frames are there
    assert "ValueError" not in shown_text  # as Python does after `from None`


def test_a_traceback_follows_what_was_being_handled() -> None:
    try:
        try:
            int(WORDS)
        except ValueError:
            raise TSQPError("Second.")  # noqa: B904  what this test is about
    except TSQPError as exc:
        text = without_foreign_messages(exc)
    assert text.index("ValueError: (message withheld") < text.index("During handling")
    assert CANARY not in text


def test_only_what_is_sure_to_be_a_path_is_shown(tmp_path: Path) -> None:
    assert printable_path("/no/such/file") == "/no/such/file"
    assert printable_path(tmp_path) == str(tmp_path)
    spaced = tmp_path / "with a space"
    assert printable_path(spaced) == "that file"
    spaced.touch()
    assert printable_path(spaced) == str(spaced)
    for words in (CANARY, WORDS, f"{WORDS}/or not", "a" * 5000, "\0"):
        assert printable_path(words, "OUT") == "OUT"
