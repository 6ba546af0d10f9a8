"""Real processes of the real command line, and what they must leave behind: nothing."""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import psutil

import processes
from processes import TAG, Process

SHM = Path("/dev/shm")
# For what hangs, on a machine as busy as may be: a test that passes takes seconds.
START_S = 120.0  # loading Python, torch and a model
DEADLINE_S = 60.0  # from a failure to the end of the command
PLAIN_OUTPUT = {"NO_COLOR": "1", "COLUMNS": "200"}
SHARED = "poll" if platform.machine() in ("x86_64", "AMD64") else "shm"


def is_setting(name: str) -> bool:
    """Whether a variable of the environment is one that tsqp reads, but for the cache folder."""
    return name.startswith(("TSQP_", "LLAMA_")) and name != "TSQP_CACHE"


def eventually(condition: Callable[[], bool], timeout: float = DEADLINE_S) -> bool:
    """Whether `condition` became true in time."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    status: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def json(self) -> dict[str, Any]:
        """The last line of standard output."""
        decoded: dict[str, Any] = json.loads(self.stdout.splitlines()[-1])
        return decoded

    @property
    def token_ids(self) -> list[list[int]]:
        return [output["token_ids"] for output in self.json["outputs"]]

    @property
    def error(self) -> str:
        """The one sentence of a command that failed, everything else about it checked."""
        assert "Traceback" not in self.stderr, self.stderr
        lines = self.stderr.splitlines()
        assert sum(line.startswith("error: ") for line in lines) == 1, self.stderr
        sentence = lines[-1].removeprefix("error: ")
        assert lines[-1].startswith("error: "), self.stderr
        assert sentence.endswith("."), sentence
        assert not re.search(r"[a-z]\. [A-Z]", sentence), sentence
        return sentence


def segments() -> set[Path]:
    """Shared memory with a name, but for what only processes of other tests map."""
    found = set(SHM.glob("tsqp-*"))
    family = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    for pid in set(psutil.pids()) - family if found else ():
        try:
            maps = Path(f"/proc/{pid}/maps").read_text()
        except OSError:
            continue  # it ended meanwhile, or is somebody else's
        found = {path for path in found if str(path) not in maps}
    return found


def mapped_segments(pid: int) -> int:
    """How much shared memory of sessions a process maps, with a name or without."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    return maps.count(f"{SHM}/tsqp-") + maps.count("/memfd:tsqp-")


class Running:
    """A command that runs; its output is collected as it comes."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self._began = time.monotonic()
        self._out: list[str] = []
        self._err: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=pipe, daemon=True)
            for pipe in ((process.stdout, self._out), (process.stderr, self._err))
            if pipe[0] is not None
        ]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def stdout(self) -> str:
        return "".join(self._out)

    @property
    def stderr(self) -> str:
        return "".join(self._err)

    @property
    def cpu_seconds(self) -> float:
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)

    def says(self, text: str, timeout: float = START_S) -> "Running":
        """Wait until standard error holds `text`."""
        assert eventually(lambda: text in self.stderr or not self.is_alive, timeout), self.stderr
        assert text in self.stderr, self.stderr
        return self

    def computes(self, seconds: float = 0.3) -> "Running":
        """Wait until this process has computed for so long from now."""
        begin = self.cpu_seconds
        assert eventually(lambda: self.cpu_seconds > begin + seconds, START_S), self.stderr
        return self

    def answers(self) -> "Running":
        """Wait for the first text of an answer."""
        assert eventually(lambda: bool(self.stdout) or not self.is_alive, START_S), self.stderr
        assert self.stdout, self.stderr
        return self

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ends(self, timeout: float = DEADLINE_S) -> Result:
        """Wait for the end; one that does not come in time is a failure."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s: {self.stderr}") from None
        for reader in self._readers:
            reader.join(DEADLINE_S)
        seconds = time.monotonic() - self._began
        return Result(self.process.returncode, self.stdout, self.stderr, seconds)

    def stop(self) -> None:
        """Kill what is left of it."""
        if self.is_alive:
            self.process.kill()
            self.process.wait()
        for reader in self._readers:
            reader.join(DEADLINE_S)

    @staticmethod
    def _read(stream: IO[str], pieces: list[str]) -> None:
        with stream:
            while piece := os.read(stream.fileno(), 65536):
                pieces.append(piece.decode())


GIVES_UP_SOON = {"TESTS_GIVE_UP_SOON": "1"}


class Commands:
    """Starts commands, and knows everything that they started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tag = {TAG: str(folder)}
        self._started: list[Running] = []
        self._segments = segments()

    def start(
        self,
        *arguments: object,
        env: Mapping[str, str] | None = None,
        before: Sequence[str] = (),
        stdin: Path = Path(os.devnull),
        streams: Mapping[str, processes.Stream] | None = None,
    ) -> Running:
        """Start `tsqp ARGUMENTS`; `before` is a command that runs it, as unshare does.

        `streams` replaces standard streams, by the names that subprocess.Popen has for them. With
        GIVES_UP_SOON in `env`, the command does not wait for a lost worker to come back.
        """
        kept = {name: value for name, value in os.environ.items() if not is_setting(name)}
        mounts = ""
        if tuple(before[:4]) == processes.WITH_MOUNTS and before[5:] == ["sh"]:
            mounts, before = before[4], []
        streams, pipe = streams or {}, processes.PIPE
        with stdin.open("rb") as stream:
            process = processes.start(
                [*before, sys.executable, "-m", "tsqp", *map(str, arguments)],
                stdin=streams.get("stdin", stream),
                stdout=streams.get("stdout", pipe),
                stderr=streams.get("stderr", pipe),
                cwd=self.folder,
                env=kept | PLAIN_OUTPUT | self.tag | dict(env or {}),
                mounts=mounts,
            )
        running = Running(process)
        self._started.append(running)
        return running

    def run(
        self,
        *arguments: object,
        env: Mapping[str, str] | None = None,
        before: Sequence[str] = (),
        stdin: Path = Path(os.devnull),
        streams: Mapping[str, processes.Stream] | None = None,
    ) -> Result:
        """Run `tsqp ARGUMENTS` to its end."""
        running = self.start(*arguments, env=env, before=before, stdin=stdin, streams=streams)
        return running.ends(START_S)

    def fails(self, *arguments: object, stdin: Path = Path(os.devnull)) -> str:
        """The error of `tsqp ARGUMENTS`, which fails soon, with exit status 1 and no output."""
        result = self.start(*arguments, stdin=stdin).ends(START_S)
        assert (result.status, result.stdout) == (1, ""), result
        return result.error

    def worker(self, model: object, endpoint: str, *arguments: object) -> Running:
        """Start a worker, and wait until it serves."""
        running = self.start("worker", model, "--listen", endpoint, *arguments)
        return running.says("serving ")

    def still_serve(self) -> None:
        """Fail if a worker has ended, and say how."""
        for running in self._started:
            if "worker" in running.process.args and not running.is_alive:
                raise AssertionError(f"A shared worker has ended: {running.ends()}")

    def ipc(self) -> str:
        """An endpoint of this folder."""
        return f"ipc://{self.folder}/worker.sock"

    def processes(self) -> list[psutil.Process]:
        """Every process that a command started, and that still runs, whoever its parent is."""
        found, name = [], processes.fork_name(self.tag[TAG])
        # Whose environment only root can read. An ended one's number may be another's by now.
        mine = {running.pid for running in self._started if running.is_alive}
        for process in psutil.process_iter():
            try:
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                # Only root can read the environment of a process that is not dumpable.
                is_mine = process.pid in mine or process.name() == name
                if is_mine or self.tag.items() <= process.environ().items():
                    found.append(process)
            except psutil.Error:
                continue  # it ended meanwhile
        return found

    def leftovers(self) -> list[str]:
        """Shared memory, sockets and processes that outlived the commands."""
        sockets = [str(path) for path in self.folder.rglob("*") if path.is_socket()]
        shared = [str(path) for path in segments() - self._segments]
        return sockets + shared + [f"process {process.pid}" for process in self.processes()]

    def finish(self) -> None:
        """End what serves, and check that nothing at all is left."""
        for running in self._started:
            if running.is_alive:
                running.send(signal.SIGCONT)
                running.send(signal.SIGTERM)
                running.ends()
        assert eventually(lambda: not self.leftovers()), self.leftovers()

    def close(self) -> None:
        """Kill everything."""
        for running in self._started:
            running.stop()
        for process in self.processes():
            process.kill()


class Main(Protocol):
    """Runs `tsqp ARGUMENTS` in this process: quick, for what needs no process of its own."""

    def __call__(self, *arguments: object, env: Mapping[str, str] | None = None) -> Result: ...


def write_ids(path: Path, *prompts: Sequence[int]) -> Path:
    """A file for --prompt-ids."""
    path.write_text(json.dumps([list(prompt) for prompt in prompts]))
    return path


def socket_endpoint(endpoint: str) -> str:
    """What a worker that chose its own port listens at."""
    match = re.search(r" at ((?:tcp|ipc)://\S+?):? ", endpoint)
    assert match, endpoint
    return match[1]
