"""Standard streams that are closed, full, unread or too narrow: no traceback, no lost answer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from protocol_helpers import Commands, write_ids

import processes

WITH_STREAMS = "from tsqp.cli.streams import open_streams; open_streams()\n"


def shell(redirection: str) -> list[str]:
    """Runs a command with streams as a shell makes them."""
    return ["sh", "-c", f'exec "$@" {redirection}', "sh"]


def python(
    code: str, redirection: str = "", stdin: bytes = b"", **env: str
) -> tuple[int, str, str]:
    """Status, standard output and standard error of a small program."""
    result = subprocess.run(
        [*shell(redirection), sys.executable, "-c", WITH_STREAMS + code],
        input=stdin,
        capture_output=True,
        timeout=60,
        env=os.environ | env,
        check=False,
    )
    return result.returncode, result.stdout.decode(), result.stderr.decode()


def test_standard_output_that_is_full_or_closed_is_one_error(commands: Commands) -> None:
    for redirection, reason in ((">/dev/full", "No space left on device"), (">&-", "it is closed")):
        result = commands.run("--help", before=shell(redirection))
        assert (result.status, result.stdout) == (1, "")
        assert result.error == f"Cannot write to standard output: {reason}."


def test_an_answer_that_cannot_be_written_is_one_error(commands: Commands) -> None:
    ids = write_ids(commands.folder / "ids.json", [1, 2, 3])
    command = ["generate", "random:tiny", "--privacy", "tee", "--prompt-ids", ids, "--json"]
    with Path("/dev/full").open("w") as full:
        result = commands.run(*command, streams={"stdout": full})
    assert result.status == 1
    assert result.error == "Cannot write to standard output: No space left on device."


def test_output_that_nobody_reads_ends_a_command_quietly(commands: Commands) -> None:
    pipe = 'mkfifo pipe; { exec 3<pipe; } & exec 4>pipe; wait; exec "$@" >&4'
    result = commands.run("--help", before=["sh", "-c", pipe, "sh"])
    assert (result.status, result.stderr) == (141, "")


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "<&- 2>&-"])
def test_messages_that_cannot_be_written_cost_no_answer(
    redirection: str, commands: Commands
) -> None:
    result = commands.run("keygen", commands.folder / "keys", before=shell(redirection))
    assert (result.status, result.stderr) == (0, "")
    assert (commands.folder / "keys" / "worker.pub").read_text().endswith(f" {result.stdout}")


def test_a_whole_answer_without_standard_input_and_standard_error(commands: Commands) -> None:
    ids = write_ids(commands.folder / "ids.json", [1, 2, 3])
    command = ["generate", "random:tiny", "--privacy", "open", "--worker", "local", "--json"]
    closed = {"stdin": processes.CLOSED, "stderr": processes.CLOSED}
    result = commands.run(*command, "--prompt-ids", ids, streams=closed)
    assert result.status == 0
    assert len(json.loads(result.stdout)["outputs"][0]["token_ids"]) == 128


@pytest.mark.slow
def test_a_chat_without_standard_input_ends_at_once(commands: Commands, speaking: Path) -> None:
    result = commands.run("chat", speaking, "--privacy", "tee", before=shell("<&-"))
    assert (result.status, result.stdout) == (0, "")
    assert "rror" not in result.stderr


def test_no_file_gets_the_number_of_a_closed_stream() -> None:
    code = "import os, sys; print(os.open('/dev/null', os.O_RDONLY) > 2, repr(sys.stdin.read()))"
    assert python(code, "<&- 2>&-") == (0, "True ''\n", "")


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"PYTHONIOENCODING": "ascii"}, r"\xe9 \u2192"),
        ({"PYTHONIOENCODING": "latin-1"}, "\udce9 \\u2192"),
        ({"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}, r"\xe9 \u2192"),
        ({"LC_ALL": "C"}, "é →"),
    ],
    ids=["ascii", "latin-1", "C without coercion", "C"],
)
def test_text_that_the_encoding_does_not_hold_is_written_in_escapes(
    env: dict[str, str], expected: str
) -> None:
    code = "import sys\nfor stream in (sys.stdout, sys.stderr): print('\\xe9 \\u2192', file=stream)"
    result = subprocess.run(
        [sys.executable, "-c", WITH_STREAMS + code],
        capture_output=True,
        timeout=60,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUTF8"} | env,
        check=True,
    )
    assert result.stdout.decode(errors="surrogateescape") == expected + "\n"
    assert result.stderr == result.stdout


def test_a_prompt_in_utf8_is_read_where_the_encoding_is_ascii() -> None:
    code = "import sys; print(sys.stdin.read() == '\\xe9 \\u2192')"
    found = python(code, stdin="é →".encode(), PYTHONIOENCODING="ascii")
    assert found == (0, "True\n", "")
