"""openai-python, the proxy, an attested server and its worker: all real processes."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from attested_server import AttestedServer, begin_attested
from openai import APIStatusError, OpenAI
from protocol_helpers import Commands, eventually
from recording_relay import RecordingRelay
from serve_client import KEY

POLICY = """
platforms = []
allow_simulated = true
any_measurement = true
model_digest = ["{digest}"]
privacy = ["{privacy}"]
field = ["{field}"]

[configuration.options]
privacy = "pad"
"""
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AttestedServer]:
    """A server in mode pad, with a worker of its own."""
    commands = Commands(tmp_path_factory.mktemp("attested"))
    try:
        yield begin_attested(
            commands, model, "--privacy", "pad", "--worker", "local", "--pad-memory", 0.01,
            "--served-model-name", "tiny", "--attest", "simulated",
        )  # fmt: skip
        commands.finish()
    finally:
        commands.close()


def write_policy(folder: Path, served: AttestedServer, **other: str) -> Path:
    claims = served.claims()
    wanted = {"digest": claims.model_digest, "privacy": "pad", "field": str(claims.field)}
    path = folder / "policy.toml"
    path.write_text(POLICY.format(**(wanted | other)))
    return path


def test_openai_python_streams_from_a_verified_server(
    commands: Commands, served: AttestedServer, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_text(KEY)
    key.chmod(0o600)
    running = commands.start(
        "proxy", f"https://127.0.0.1:{served.port}", "--port", 0, "--api-key-file", key,
        "--policy", write_policy(tmp_path, served),
    ).says("forwarding http://")  # fmt: skip
    assert "simulated: proves nothing" in running.stderr
    [port] = re.findall(r"forwarding http://127\.0\.0\.1:(\d+)", running.stderr)
    url = f"http://127.0.0.1:{port}/v1"
    with OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        wanted = {"model": "tiny", "messages": HELLO, "max_tokens": 8, "seed": 1}
        answer = client.chat.completions.create(**wanted)
        chunks = list(client.chat.completions.create(**wanted, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == answer.choices[0].message.content
        with pytest.raises(APIStatusError) as caught:  # the server's own errors pass as well
            client.chat.completions.create(model="other", messages=HELLO)
    assert caught.value.status_code == 404


@pytest.mark.parametrize(
    "other", [{"digest": "sha256:" + "00" * 32}, {"privacy": "shares"}, {"field": "lattice"}]
)
def test_a_server_with_another_model_or_mode_is_refused(
    commands: Commands, served: AttestedServer, tmp_path: Path, other: dict[str, str]
) -> None:
    if other.get("field") == served.claims().field:
        other = {"field": "wide"}
    policy = write_policy(tmp_path, served, **other)
    result = commands.run("verify", f"https://127.0.0.1:{served.port}", "--policy", policy)
    assert result.status == 1
    assert result.stdout.count("FAIL") == 1


def test_a_server_that_does_not_meet_the_policy_gets_nothing_of_a_prompt(
    commands: Commands, served: AttestedServer, attested_server: AttestedServer, tmp_path: Path
) -> None:
    """Between a client and two real servers, one with another mode, stands somebody who records.

    What he sees is encrypted, so he counts: fewer bytes than the prompt has leave the proxy.
    """
    prompt = "A secret. " * 6000
    with RecordingRelay(served.port) as relay:
        policy = write_policy(tmp_path, served)
        running = commands.start(
            "proxy", f"https://127.0.0.1:{relay.port}", "--port", 0, "--policy", policy,
            "--reverify-seconds", 0.001,
        ).says("forwarding http://")  # fmt: skip
        [port] = re.findall(r"forwarding http://127\.0\.0\.1:(\d+)", running.stderr)
        url = f"http://127.0.0.1:{port}/v1"
        with OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:

            def refusal() -> str:
                with pytest.raises(APIStatusError) as caught:
                    client.completions.create(model="tiny", prompt=prompt, max_tokens=1)
                return str(caught.value)

            assert "not verified" not in refusal()  # the real server says that it is too long
            assert len(relay.received) > len(prompt)
            relay.received.clear()
            relay.target = attested_server.port
            assert "not verified. model digest: " in (told := refusal()), told
            assert 'configuration.options.privacy: "tee"' in told
            relay.target = served.port
            write_policy(tmp_path, served, digest="sha256:" + "00" * 32)
            assert eventually(lambda: "options.privacy" not in refusal())
            assert "not verified. model digest: " in refusal()
        assert b"secret" not in relay.received
        assert 0 < len(relay.received) < len(prompt) / 2


def test_the_simulated_platform_is_refused_by_default(
    commands: Commands, served: AttestedServer, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('platforms = ["sgx", "tdx", "sev-snp"]\nany_measurement = true\n')
    for command in ("verify", "proxy"):
        result = commands.run(command, f"https://127.0.0.1:{served.port}", "--policy", policy)
        assert result.status == 1
        assert "simulated: proves nothing" in result.stdout + result.stderr
