"""What is shown while weights are loaded, and where nothing is."""

import io
import re
from pathlib import Path

import pytest
from protocol_helpers import Commands, Main, write_ids
from rich.console import Console

from tsqp import LLM
from tsqp.cli.printing import loading_progress

MIB = 2**20
LINE = r"^loaded 2 layers, 1 MiB in \d+\.\d s \([\d,]+ MiB/s\)$"


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    return write_ids(tmp_path / "ids.json", [1, 2, 3])


@pytest.mark.parametrize("options", [("tee",), ("tee", "--fixed-point")])
def test_a_command_says_in_one_line_what_it_loaded(
    options: tuple[str, ...], main: Main, ids: Path
) -> None:
    result = main("generate", "random:tiny", "--prompt-ids", ids, "--json", "--privacy", *options)
    assert result.status == 0
    line = LINE if len(options) == 1 else LINE.replace("1 MiB", "0 MiB")
    assert len(re.findall(line, result.stderr, re.MULTILINE)) == 1


def test_a_worker_says_what_it_loaded_before_it_serves(commands: Commands) -> None:
    worker = commands.worker("random:tiny", commands.ipc())
    before, _, _ = worker.stderr.partition("serving random:tiny")
    assert re.search(LINE, before, re.MULTILINE)


def test_a_preparation_says_how_fast_it_was(main: Main, tmp_path: Path) -> None:
    result = main("prepare", "random:tiny", tmp_path / "x.tsqp.safetensors")
    assert result.status == 0
    assert re.search(LINE.replace("1 MiB", "0 MiB"), result.stderr, re.MULTILINE)


@pytest.mark.parametrize("privacy", ["tee", "pad", "open"])
def test_the_library_is_silent_and_tells_bytes_to_whoever_asks(
    privacy: str, capfd: pytest.CaptureFixture[str]
) -> None:
    told: list[tuple[int, int]] = []
    workers = None if privacy == "tee" else "inproc"
    with LLM("random:tiny", privacy=privacy, worker=workers, on_load=lambda *s: told.append(s)):
        pass
    [total] = {total for _, total in told}
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1] == (total, total)
    assert capfd.readouterr() == ("", "")


def test_a_terminal_shows_a_bar_with_bytes_and_rate_that_goes_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, force_interactive=True, width=120)
    monkeypatch.setattr("tsqp.cli.printing._stderr", terminal)
    with loading_progress() as loading:
        loading(100 * MIB, 300 * MIB)
        loading(200 * MIB, 300 * MIB)
        loading(300 * MIB, 300 * MIB)
        shown = screen.getvalue()
        loading.say_rate(30)
    assert re.search(r"Loading .*━.*200\.0/300\.0 MiB.*\d+\.\d .?B/s", shown)
    assert shown.rstrip("\n").endswith("\x1b[2K")  # the last line is erased
    assert screen.getvalue() == shown  # and none is left in its place
