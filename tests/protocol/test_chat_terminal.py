"""`tsqp chat` and progress in a terminal: bars, and keys that are signals."""

import io
import os
import pty
import re
import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from protocol_helpers import DEADLINE_S, PLAIN_OUTPUT, START_S, Commands, is_setting
from rich.console import Console

import processes
from processes import Process
from tsqp.cli.printing import prompt_progress

CTRL_C, CTRL_D = b"\x03", b"\x04"
ERASED = b"\x1b[1A\x1b[2K"  # the bar, before the first text


class Screen:
    """The other end of a terminal that a chat runs in."""

    def __init__(self, process: Process, descriptor: int) -> None:
        self.process = process
        self._descriptor = descriptor
        self._unread = b""

    def type(self, keys: bytes) -> None:
        os.write(self._descriptor, keys)

    def rests(self) -> None:
        """Wait until the program waits: a signal between its prompt and its read is seen late."""
        before = -1.0
        while (now := sum(psutil.Process(self.process.pid).cpu_times()[:2])) != before:
            before = now
            time.sleep(0.2)

    def shows(self, text: bytes, timeout: float = DEADLINE_S) -> None:
        """Wait for `text`, after what was waited for before."""
        end = time.monotonic() + timeout
        while text not in self._unread:
            ready, _, _ = select.select([self._descriptor], [], [], max(0, end - time.monotonic()))
            assert ready, self._unread
            self._unread += os.read(self._descriptor, 4096)
        self._unread = self._unread.partition(text)[2]


@contextmanager
def screen_of(commands: Commands, *arguments: str) -> Iterator[Screen]:
    """A program of Python in a terminal; Ctrl-D ends it."""
    ours, theirs = pty.openpty()
    kept = {name: value for name, value in os.environ.items() if not is_setting(name)}
    process = processes.start(
        [sys.executable, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=commands.folder,
        env=kept | PLAIN_OUTPUT | commands.tag | {"TERM": "xterm"},
        start_new_session=True,
        terminal=True,  # whose keys are signals only to the session that it controls
    )
    os.close(theirs)
    try:
        screen = Screen(process, ours)
        screen.shows(b"/help lists the commands, and Ctrl-D ends the chat.\r\n> ", START_S)
        yield screen
        screen.type(CTRL_D)
        assert process.wait(DEADLINE_S) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.fixture(scope="module")
def screen(shared_commands: Commands, speaking: Path) -> Iterator[Screen]:
    """A chat with a model that reads slowly and answers at length."""
    options = ["--privacy", "tee", "--seed", "1", "--max-tokens", "50000", "--prefill-chunk", "1"]
    with screen_of(shared_commands, "-m", "tsqp", "chat", str(speaking), *options) as screen:
        yield screen


def test_ctrl_c_stops_the_answer_and_not_the_program(screen: Screen) -> None:
    screen.type(b"Hello\n")
    screen.shows(ERASED)
    screen.shows(b" ")
    screen.type(CTRL_C)
    screen.shows(b"[stopped; the answer so far is kept]\r\n> ")
    screen.rests()
    screen.type(b"half a line" + CTRL_C)
    screen.shows(b"Ctrl-C once more, or Ctrl-D, ends the chat.\r\n> ")
    screen.type(b"/undo\n")
    screen.shows(b"its answer; 0 remain.\r\n> ")


def test_ctrl_c_while_a_prompt_is_read_keeps_nothing(screen: Screen) -> None:
    screen.type(b"word " * 800 + b"\n")
    screen.shows(b"Reading the prompt")
    screen.type(CTRL_C)
    screen.shows(b"[stopped before the answer; the message is not kept]\r\n> ")
    screen.type(b"/undo\n")
    screen.shows(b"There is nothing to undo.\r\n> ")


WITHOUT_READLINE = """
import sys
assert "readline" not in sys.modules
sys.modules["readline"] = None
from tsqp.cli import chat, streams
streams.open_streams()
streams.hide_native_messages()
chat._talk(None, None, "")
"""


def test_a_python_without_readline_shows_the_prompt(commands: Commands) -> None:
    with screen_of(commands, "-c", WITHOUT_READLINE) as screen:
        screen.type(b"/undo\n")
        screen.shows(b"There is nothing to undo.\r\n> ")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What standard error shows, as if it were a terminal."""
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, force_interactive=True, width=120)
    monkeypatch.setattr("tsqp.cli.printing._stderr", console)
    return shown


def test_a_long_prompt_shows_a_bar_that_goes_away(terminal: io.StringIO) -> None:
    with prompt_progress() as on_progress:
        assert on_progress is not None
        for done in (512, 1024):
            on_progress(done, 1100)
        assert re.search(
            r"Reading the prompt.*━.*1024/1100.* \d+ tokens a second", terminal.getvalue()
        )
        on_progress(1100, 1100)
        assert terminal.getvalue().rstrip("\n").endswith("\x1b[2K")  # before the first text


def test_a_short_prompt_shows_nothing(terminal: io.StringIO) -> None:
    with prompt_progress() as on_progress:
        assert on_progress is not None
        on_progress(40, 40)
    assert terminal.getvalue() == ""


def test_nobody_is_told_of_progress_where_there_is_no_terminal() -> None:
    with prompt_progress() as on_progress:
        assert on_progress is None
