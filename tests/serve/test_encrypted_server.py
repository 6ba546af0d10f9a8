"""An attested server that fetches its secrets: the key of an encrypted model, and API keys."""

import re
from contextlib import suppress
from pathlib import Path

import pytest
from attested_server import AttestedServer
from protocol_helpers import Commands
from serve_client import Server

from key_brokers import SIMULATED, start_broker
from tsqp.api.claims import Claims
from tsqp.api.evidence import Evidence

API_KEY = "key-from-the-broker"
# What an owner of weights demands of whoever gets the key of them.
POLICY = f"""{SIMULATED}privacy = ["tee"]

[configuration]
command = "serve"
"""


@pytest.fixture
def fetching(commands: Commands, model: Path, tmp_path: Path) -> tuple[Path, list[object]]:
    """An encrypted model, and the options that fetch its key and an API key from a broker."""
    owner, encrypted = tmp_path / "owner", tmp_path / "disk" / "encrypted"
    for folder in (owner, encrypted.parent):
        folder.mkdir()
    key, api_keys = owner / "model.key", owner / "api-keys"
    api_keys.write_text(f"{API_KEY}\n")
    result = commands.run("encrypt", model, encrypted, "--model-key-file", key)
    assert (result.status, result.stdout) == (0, ""), result
    assert "made a new key in" in result.stderr and "config.json" in result.stderr
    url, broker_key = start_broker(commands, owner, POLICY, model=key, keys=api_keys)
    return encrypted, [
        "--broker-url", url, "--broker-key", broker_key, "--fetch-model-key", "model",
        "--fetch-api-keys", "keys", "--attest", "simulated", "--port", 0, "--threads", 1,
    ]  # fmt: skip


def test_a_server_gets_the_key_and_answers_as_with_the_plain_model(
    commands: Commands,
    model: Path,
    attested_server: AttestedServer,
    fetching: tuple[Path, list[object]],
    tmp_path: Path,
) -> None:
    encrypted, options = fetching
    disk = encrypted.parent
    places = {name: str(disk / name) for name in ("TSQP_CACHE", "TMPDIR", "HOME")}
    for place in places.values():
        Path(place).mkdir()
    running = commands.start(
        "serve", encrypted, "--privacy", "tee", "--served-model-name", "tiny", *options, env=places
    ).says("attested by ")
    port = re.search(r"listening at \w+://127\.0\.0\.1:(\d+)", running.stderr)
    assert port is not None
    server = AttestedServer(int(port[1]), API_KEY)

    assert AttestedServer(int(port[1]), "another").complete("Hello").status == 401
    assert answer(server) == answer(attested_server)
    evidence, plain = server.evidence(bytes(32)), attested_server.evidence(bytes(32))
    assert digest(evidence) == digest(plain)
    assert evidence.configuration is not None
    served = evidence.configuration["server"]
    names = ("api_keys", "broker_url", "fetch_model_key", "fetch_api_keys")
    assert [served[name] for name in names] == [1, True, "model", "keys"]
    assert f"--broker-key {served['broker_key']}" in " ".join(map(str, options))
    secret = (tmp_path / "owner" / "model.key").read_text().split()[-1]
    for shown in (running.stderr, running.stdout, str(evidence.configuration)):
        assert secret not in shown and API_KEY not in shown
    texts = (secret.encode(), bytes.fromhex(secret), API_KEY.encode())
    check_holds_none_of([*pieces_of(model), *texts], disk, running.pid)


def test_a_server_in_another_mode_than_the_policy_demands_gets_no_key(
    commands: Commands, fetching: tuple[Path, list[object]]
) -> None:
    encrypted, options = fetching
    worker = ["--privacy", "pad", "--worker", "tcp://127.0.0.1:9"]
    assert "The broker refuses" in commands.fails("serve", encrypted, *worker, *options)


def test_a_secret_of_another_kind_is_refused(
    commands: Commands, fetching: tuple[Path, list[object]]
) -> None:
    encrypted, options = fetching
    options[options.index("model")] = "keys"
    result = commands.run("serve", encrypted, "--privacy", "tee", *options)
    assert result.status == 2
    assert "The broker's secret keys does not hold the key of a model" in result.error


def answer(server: Server) -> tuple[str, str]:
    chat = server.chat(max_tokens=8, temperature=0, ignore_eos=True)
    text = server.complete("Hello", max_tokens=8, temperature=0, ignore_eos=True)
    assert (chat.status, text.status) == (200, 200), (chat, text)
    return chat.json["choices"][0]["message"]["content"], text.json["choices"][0]["text"]


def digest(evidence: Evidence) -> str:
    return Claims.decode(evidence.claims).model_digest


def pieces_of(model: Path) -> list[bytes]:
    """Pieces of all files of a model."""
    pieces = []
    for path in model.iterdir():
        content = path.read_bytes()
        pieces += [content[place : place + 48] for place in range(64, len(content) - 48, 4096)]
    assert len(pieces) > 20
    return pieces


def check_holds_none_of(pieces: list[bytes], disk: Path, pid: int) -> None:
    """Check that neither the disk nor an open file of the process has any of the pieces."""
    files = [path for path in disk.rglob("*") if path.is_file()]
    assert len(files) >= 4  # the encrypted ones
    with suppress(PermissionError):  # only root sees the open files of a hardened process
        files += [path for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_file()]
    for path in files:
        content = path.read_bytes()
        assert not any(piece in content for piece in pieces), path
