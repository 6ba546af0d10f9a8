"""An encrypted model, end to end: a broker gives its key to an attested server."""

import re
from contextlib import suppress
from pathlib import Path

from attested_server import AttestedServer
from protocol_helpers import Commands
from serve_client import Server
from test_key_release import SIMULATED
from test_life import write_certificate

from tsqp.api.claims import Claims
from tsqp.api.evidence import Evidence


def test_a_server_gets_the_key_and_answers_as_with_the_plain_model(
    commands: Commands, model: Path, attested_server: AttestedServer, tmp_path: Path
) -> None:
    owner, tee, disk = (tmp_path / name for name in ("owner", "tee", "disk"))
    for folder in (owner, tee, disk):
        folder.mkdir()
    key, encrypted = owner / "model.key", disk / "encrypted"
    result = commands.run("encrypt", model, encrypted, "--model-key-file", key)
    assert (result.status, result.stdout) == (0, ""), result
    assert "made a new key in" in result.stderr and "config.json" in result.stderr

    certfile, keyfile = write_certificate(owner)
    (owner / "policy.toml").write_text(SIMULATED)
    broker = commands.start(
        "keys", "serve", "--policy", owner / "policy.toml", "--secret", f"model={key}",
        "--ssl-certfile", certfile, "--ssl-keyfile", keyfile, "--port", 0,
    ).says("--broker-key ")  # fmt: skip
    found = re.search(r"(https://\S+); --broker-key (\w+)", broker.stderr)
    assert found is not None
    fetched = commands.run(
        "keys", "fetch", found[1], "model", "--out", tee / "model.key", "--broker-key", found[2],
        "--attest", "simulated",
    )  # fmt: skip
    assert fetched.status == 0, fetched

    places = {name: str(disk / name) for name in ("TSQP_CACHE", "TMPDIR", "HOME")}
    for place in places.values():
        Path(place).mkdir()
    running = commands.start(
        "serve", encrypted, "--privacy", "tee", "--model-key-file", tee / "model.key",
        "--served-model-name", "tiny", "--attest", "simulated", "--port", 0, "--threads", 1,
        env=places,
    ).says("attested by ")  # fmt: skip
    port = re.search(r"listening at \w+://127\.0\.0\.1:(\d+)", running.stderr)
    assert port is not None
    server = AttestedServer(int(port[1]))

    assert answer(server) == answer(attested_server)
    evidence, plain = server.evidence(bytes(32)), attested_server.evidence(bytes(32))
    assert digest(evidence) == digest(plain)
    assert evidence.configuration is not None and plain.configuration is not None
    options = evidence.configuration["options"], plain.configuration["options"]
    assert [each["model_key_file"] for each in options] == [True, False]
    check_holds_none_of(model, disk, running.pid)


def answer(server: Server) -> tuple[str, str]:
    chat = server.chat(max_tokens=8, temperature=0, ignore_eos=True)
    text = server.complete("Hello", max_tokens=8, temperature=0, ignore_eos=True)
    assert (chat.status, text.status) == (200, 200), (chat, text)
    return chat.json["choices"][0]["message"]["content"], text.json["choices"][0]["text"]


def digest(evidence: Evidence) -> str:
    return Claims.decode(evidence.claims).model_digest


def check_holds_none_of(model: Path, disk: Path, pid: int) -> None:
    """Check that neither the disk nor an open file of the process has pieces of a model's files."""
    pieces = []
    for path in model.iterdir():
        content = path.read_bytes()
        pieces += [content[place : place + 48] for place in range(64, len(content) - 48, 4096)]
    assert len(pieces) > 20
    files = [path for path in disk.rglob("*") if path.is_file()]
    assert len(files) >= 4  # the encrypted ones
    with suppress(PermissionError):  # only root sees the open files of a hardened process
        files += [path for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_file()]
    for path in files:
        content = path.read_bytes()
        assert not any(piece in content for piece in pieces), path
