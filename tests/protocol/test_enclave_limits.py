"""The trusted side runs under those restrictions of Gramine that Linux can impose on a process."""

import json
import re
import secrets
import signal
import ssl
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import enclave_jail
import pytest
from protocol_helpers import SHARED, SHM, Commands, Result, Running, socket_endpoint, write_ids

import processes
from key_brokers import SIMULATED, start_broker
from tsqp import LLM, SamplingParams

pytestmark = pytest.mark.skipif(
    not enclave_jail.IS_POSSIBLE or not enclave_jail.landlock_version(),
    reason="needs Linux on x86-64 with Landlock",
)

PROMPT = list(range(1, 31))
LONGEST_S = 120.0
FORBIDDEN = {
    "fork": "import os; os.fork()",
    "another program": "import subprocess; subprocess.run(['true'])",
    "replace itself": "import os; os.execv('/bin/true', ['true'])",
    "netlink": "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
    "a resolver": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "a name service": "import socket; socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)",
    "wake another process": (
        "import ctypes; word = ctypes.c_int(0);"
        "ctypes.CDLL(None).syscall(202, ctypes.byref(word), 1, 1, None, None, 0)"
    ),
    "wait for another process": (
        "import ctypes; word = ctypes.c_int(0);"
        "ctypes.CDLL(None).syscall(202, ctypes.byref(word), 0, 1, None, None, 0)"
    ),
}
DENIED = {
    "a file": "open('{outside}/file', 'w')",
    "an old file": "open('{outside}/old', 'r+b')",
    "a new name in shared memory": "open('{segment}-2', 'wb')",
    "the segment, by making it": "open('{segment}', 'xb')",
    "removing a file": "import os; os.remove('{outside}/old')",
    "a folder": "import os; os.mkdir('{outside}/folder')",
    "sealed memory": "import os; os.memfd_create('x')",
}
ALLOWED = {
    "threads": "import threading; t = threading.Thread(target=print); t.start(); t.join()",
    "a pair of sockets": "import socket; socket.socketpair()",
    "tcp": "import socket; socket.socket().bind(('0.0.0.0', 0))",
    "the tmpfs": "open('{tmpfs}/file', 'w').write('text')",
}


@dataclass(frozen=True)
class Jail:
    """Runs commands in it.

    Attributes:
        name: the name of the shared memory.
        tmpfs: the folder in which they may write.
    """

    name: str
    tmpfs: Path

    @property
    def segment(self) -> Path:
        return SHM / self.name

    @property
    def before(self) -> list[str]:
        return [sys.executable, enclave_jail.__file__, str(self.segment), str(self.tmpfs)]

    def start(self, commands: Commands, *arguments: object) -> Running:
        """Start a command as a new interpreter: its imports are in the jail too."""
        with processes.from_nothing():
            env = {"TSQP_CACHE": str(self.tmpfs / "cache"), "TMPDIR": str(self.tmpfs)}
            return commands.start(*arguments, before=self.before, env=env)

    def run(self, commands: Commands, *arguments: object) -> Result:
        return self.start(commands, *arguments).ends(LONGEST_S)

    def try_out(self, program: str, outside: Path) -> subprocess.CompletedProcess[str]:
        places = {"segment": self.segment, "tmpfs": self.tmpfs, "outside": outside}
        return subprocess.run(
            [*self.before, sys.executable, "-c", program.format(**places)],
            capture_output=True,
            text=True,
            timeout=LONGEST_S,
        )


@pytest.fixture
def jail() -> Iterator[Jail]:
    name = f"tsqp-{secrets.token_hex(8)}"
    with tempfile.TemporaryDirectory(dir=SHM, prefix="jail-") as folder:
        yield Jail(name, Path(folder))
    assert not (SHM / name).exists()


def start_worker(commands: Commands, model: object, jail: Jail) -> str:
    """Start a worker outside of the jail; returns its endpoint, by number."""
    worker = commands.worker(
        model, "tcp://127.0.0.1:0", "--serve", "private", "--shm-name", jail.name
    )
    return socket_endpoint(worker.stderr)


@pytest.mark.parametrize("program", FORBIDDEN.values(), ids=FORBIDDEN)
def test_the_jail_ends_a_program_that_tries_to(program: str, jail: Jail, tmp_path: Path) -> None:
    assert jail.try_out(program, tmp_path).returncode == -signal.SIGSYS


@pytest.mark.parametrize("program", DENIED.values(), ids=DENIED)
def test_the_jail_denies(program: str, jail: Jail, tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    done = jail.try_out(program, tmp_path)
    assert done.returncode == 1
    assert re.search("PermissionError|OSError: .* Function not implemented", done.stderr)
    assert (tmp_path / "old").read_text() == "old"


@pytest.mark.parametrize("program", ALLOWED.values(), ids=ALLOWED)
def test_the_jail_allows(program: str, jail: Jail, tmp_path: Path) -> None:
    done = jail.try_out(program, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("field", ["wide", "lattice"])
def test_generate_runs_in_the_jail_with_its_worker_outside(
    field: str, jail: Jail, commands: Commands
) -> None:
    endpoint = start_worker(commands, "random:tiny", jail)
    result = jail.run(
        commands, "generate", "random:tiny", "--privacy", "pad", "--field", field,
        "--worker", endpoint, "--shm-name", jail.name, "--max-tokens", 8, "--json",
        "--prompt-ids", write_ids(commands.folder / "ids.json", PROMPT),
    )  # fmt: skip
    assert result.status == 0, result.stderr
    assert result.json["transport"] == SHARED
    assert result.json["transport_reason"].endswith(f"bytes at {jail.segment}")
    with LLM("random:tiny", privacy="tee", fixed_point=True, field=field) as llm:
        params = SamplingParams(temperature=0, max_tokens=8)
        assert result.token_ids == [list(llm.generate([PROMPT], params)[0].token_ids)]


def test_serve_runs_in_the_jail_with_its_worker_outside(
    jail: Jail, commands: Commands, speaking: Path, tmp_path: Path
) -> None:
    """A checkpoint from files, its cache in the tmpfs, attested TLS, and a key from a broker."""
    (tmp_path / "keys").write_text("key-from-the-broker")
    url, broker_key = start_broker(commands, tmp_path, SIMULATED, keys=tmp_path / "keys")
    endpoint = start_worker(commands, speaking, jail)
    server = jail.start(
        commands, "serve", speaking, "--privacy", "pad", "--worker", endpoint, "--port", 0,
        "--shm-name", jail.name, "--served-model-name", "m", "--pad-memory", "0.01",
        "--attest", "simulated", "--broker-url", url, "--broker-key", broker_key,
        "--fetch-api-keys", "keys",
    )  # fmt: skip
    server.says(f"transport {SHARED} (").says("serving m at ")
    address = re.search(r"https://127\.0\.0\.1:\d+", server.stderr)
    assert address is not None
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 4,
        "response_format": {"type": "json_object"},
        "stream": True,
    }
    request = urllib.request.Request(
        f"{address[0]}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": "Bearer key-from-the-broker"},
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with urllib.request.urlopen(request, timeout=LONGEST_S, context=context) as answer:
        assert answer.read().endswith(b"data: [DONE]\n\n")
    server.send(signal.SIGTERM)
    assert server.ends(LONGEST_S).status == 0, server.stderr
