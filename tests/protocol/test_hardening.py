"""The trusted process leaves no core dump, and no debugger of the same user gets at its memory."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from protocol_helpers import Commands, Main
from tokenizers import AddedToken, normalizers

from text_helpers import sentencepiece_like
from tsqp import harden_process
from tsqp.cli.app import TRUSTED, app
from tsqp.runtime import hardening

CANARY = "the-canary-of-this-prompt"
CORES_ALLOWED = ["sh", "-c", 'ulimit -c unlimited; exec "$@"', "sh"]
UNTRUSTED = {  # they see no prompt
    *("collateral", "worker", "prepare", "keygen", "report", "verify"),
    *("cluster-up", "cluster-status", "cluster-down"),
}
NOBODY = 65534
PROBE = """
import ctypes, json, os, resource, subprocess, sys
from tsqp import harden_process
def dumpable(): return ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)
said = {"before": dumpable(), "done": harden_process(), "after": dumpable()}
said["again"] = harden_process()
said["limit"] = resource.getrlimit(resource.RLIMIT_CORE)
child = "import ctypes; print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"
said["child"] = int(subprocess.run([sys.executable, "-c", child], capture_output=True).stdout)
said["threads"] = len(os.listdir("/proc/self/task"))  # what the product reads of itself
if os.getuid() == 0:
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setgid(NOBODY), os.setuid(NOBODY)
        harden_process()
        sibling = os.fork()
        if sibling == 0:
            try: open(f"/proc/{os.getppid()}/mem", "rb")
            except OSError as exc: os.write(writer, type(exc).__name__.encode())
            os._exit(0)
        os.waitpid(sibling, 0)
        os._exit(0)
    os.close(writer)
    said["same user"] = os.read(reader, 100).decode()
print(json.dumps(said))
""".replace("NOBODY", str(NOBODY))

linux = pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")


@linux
def test_a_hardened_process_is_not_dumpable_and_its_children_are_again() -> None:
    result = subprocess.run(
        [*CORES_ALLOWED, sys.executable, "-c", PROBE],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    said = json.loads(result.stdout)
    assert (said["before"], said["done"], said["after"], said["again"]) == (1, True, 0, True)
    assert said["limit"] == [0, 0]
    assert said["child"] == 1
    assert said.get("same user", "PermissionError") == "PermissionError"
    assert result.stderr == ""


def test_what_cannot_be_forbidden_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(hardening, "_forbid_core_files", lambda: None)
    monkeypatch.setattr(hardening, "_forbid_dumps", refuse)
    assert not harden_process()
    [message] = [record.getMessage() for record in caplog.records]
    assert message.startswith("this system does not allow TSQP to forbid debuggers (")


def test_every_command_that_sees_a_prompt_is_hardened_before_its_options_are_read(
    main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    hardened: list[str] = []
    module = sys.modules["tsqp.cli.app"]  # `tsqp.cli.app` is the Typer object in it
    monkeypatch.setattr(module, "harden_process", lambda: hardened.append("yes"))
    group = typer.main.get_command(app)
    commands = set(group.commands)  # type: ignore[attr-defined]
    assert set(TRUSTED) | UNTRUSTED == commands
    for name in sorted(commands):
        hardened.clear()
        result = main(name, "--no-such-option")
        assert (result.status, hardened) == (2, ["yes"] if name in TRUSTED else []), name


@linux
@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGSEGV, marks=pytest.mark.slow), signal.SIGBUS]
)
def test_a_crash_that_holds_a_prompt_leaves_nothing_of_it(
    number: signal.Signals, commands: Commands, speaking: Path
) -> None:
    prompt = commands.folder / "prompt.txt"
    prompt.write_text(CANARY)
    running = commands.start(
        "generate", speaking, "--privacy", "tee", "--prompt", "-", "--ignore-eos",
        "--max-tokens", 50_000, "--temperature", 1,
        stdin=prompt, before=CORES_ALLOWED, env={"PYTHONFAULTHANDLER": "1"},
    ).answers()  # fmt: skip
    limits = Path(f"/proc/{running.pid}/limits").read_text()
    assert [line.split()[4:6] for line in limits.splitlines() if "core file" in line] == [
        ["0", "0"]
    ]
    running.send(number)
    result = running.ends()
    assert result.status == -number
    assert "Fatal Python error" in result.stderr  # where it was, without any value
    assert CANARY not in result.stdout + result.stderr
    assert [path.name for path in commands.folder.iterdir()] == ["prompt.txt"]


@pytest.fixture
def panicking(small_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer panics, because it looks for spaces where it has cut the text."""
    folder = tmp_path_factory.mktemp("panicking")
    shutil.copytree(small_llama, folder, dirs_exist_ok=True)
    tokenizer = sentencepiece_like()
    tokenizer.normalizer = normalizers.Strip()
    tokenizer.add_special_tokens([AddedToken(" ", lstrip=True, normalized=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_panic_of_a_library_shows_nothing_of_the_prompt(
    panicking: Path, commands: Commands
) -> None:
    prompt = commands.folder / "prompt.txt"
    prompt.write_text("my passwörd x")
    arguments = ["generate", panicking, "--privacy", "tee", "--prompt", "-"]
    result = commands.run(*arguments, stdin=prompt)
    assert result.error == "The model's tokenizer failed on this text; pass token ids instead."
    assert "panicked" not in result.stderr
    assert "ö" not in result.stderr
    shown = commands.run(*arguments, "--debug", stdin=prompt).stderr
    assert "panicked" in shown
    assert "'ö'" in shown  # that is what has to be hidden


@linux
@pytest.mark.skipif(
    Path("/proc/sys/kernel/core_pattern").read_text().strip() != "core",
    reason="core dumps go elsewhere here",
)
def test_without_it_a_crash_would_leave_a_core_file(tmp_path: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    if hard == 0:
        pytest.skip("no core files are allowed here")
    code = "import os; os.kill(os.getpid(), 11)"
    crash = [*CORES_ALLOWED, sys.executable, "-c", code]
    assert subprocess.run(crash, cwd=tmp_path, check=False).returncode == -signal.SIGSEGV
    assert os.listdir(tmp_path)  # noqa: PTH208
