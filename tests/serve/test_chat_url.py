"""`tsqp chat --url`: the command, a real server, and servers that fail."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from plain_http import PlainServer, models, refused, stream_of
from protocol_helpers import Commands, Result, eventually
from serve_client import KEY, Server
from serve_process import begin
from typed_chat import chatting

from certificates import write_certificate

CHAT, MODELS = "/v1/chat/completions", "/v1/models"
WITH_KEY = {"TSQP_API_KEY": KEY}


def talk(
    commands: Commands, url: str, *arguments: object, lines: tuple[str, ...] = (), key: str = KEY
) -> Result:
    """A whole chat; the lines are its standard input."""
    typed = commands.folder / "lines.txt"
    typed.write_text("".join(f"{line}\n" for line in lines))
    env = {"TSQP_API_KEY": key} if key else {}
    return commands.run("chat", *arguments, "--url", url, stdin=typed, env=env)


def saved(commands: Commands, name: str = "talk.json") -> list[dict[str, str]]:
    messages: list[dict[str, str]] = json.loads((commands.folder / name).read_text())["messages"]
    return messages


def address(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}"


@pytest.fixture
def plain() -> Iterator[PlainServer]:
    server = PlainServer({MODELS: models()})
    yield server
    server.close()


def test_a_chat_has_the_answers_of_the_server(commands: Commands, server: Server) -> None:
    lines = ("Hello", "/save one.json", "And then?", "/save talk.json", "/reset", "Hello", "/stats")
    options = ["--temperature", 0, "--max-tokens", 6, "--system", "Be brief."]
    result = talk(commands, address(server), *options, lines=lines)
    assert result.status == 0, result.stderr
    talked = saved(commands)
    assert [each["role"] for each in talked] == ["system", *["user", "assistant"] * 2]
    assert talked[:3] == saved(commands, "one.json")
    for asked in (talked[:2], talked[:4]):
        fields = {"messages": asked, "temperature": 0, "top_p": 0.95, "max_tokens": 6}
        answer = server.ask("/v1/chat/completions", fields).json["choices"][0]["message"]
        assert answer["content"] == talked[len(asked)]["content"]
    assert "talking to tiny" in result.stderr
    assert "[cut off by --max-tokens" in result.stderr
    assert "3 answers: " in result.stderr and " 18 tokens in " in result.stderr
    assert "in clear" not in result.stderr
    assert "HTTP" not in result.stderr  # httpx2 logs each request
    for message in talked[1:]:
        assert message["content"] not in result.stderr


def test_a_model_is_chosen_by_its_name(commands: Commands, server: Server) -> None:
    result = talk(commands, address(server), "alias", "--max-tokens", 2, lines=("Hello",))
    assert result.status == 0 and "talking to alias" in result.stderr
    wrong = talk(commands, address(server), "gpt", lines=("Hello", "never asked"))
    assert wrong.status == 1
    assert "It lists tiny, alias." in wrong.stderr
    assert "has no such model" in wrong.error


def test_keys_come_from_the_variable_or_a_file(commands: Commands, server: Server) -> None:
    file = commands.folder / "keys"
    file.write_text(f"{KEY}\n")
    file.chmod(0o600)
    options = ["--api-key-file", file, "--max-tokens", 2]
    assert talk(commands, address(server), *options, lines=("Hi",), key="wrong").status == 0
    for key, sentence in (("wrong", "refuses the API key"), ("", "wants an API key")):
        result = talk(commands, address(server), lines=("Hi",), key=key)
        assert (result.status, result.stdout) == (1, "")
        assert sentence in result.error
    file.chmod(0o644)
    result = talk(commands, address(server), *options)
    assert result.status == 2 and "chmod 600" in result.error


def test_ctrl_c_ends_the_answer_and_frees_its_sequence(commands: Commands, server: Server) -> None:
    options = ["--url", address(server), "--max-tokens", 4000, "--logit-bias", "256=-100"]
    with chatting(commands, *options, env=WITH_KEY) as terminal:
        terminal.type("Hello")
        terminal.running.answers().send(signal.SIGINT)
        terminal.running.says("[stopped; the answer so far is kept]")
        server.settles(lambda: server.running() == 0)
        terminal.type("/save talk.json", "/undo", "/exit")
        result = terminal.running.ends()
    assert result.status == 0, result.stderr
    assert [each["role"] for each in saved(commands)] == ["user", "assistant"]
    assert "its answer; 0 remain." in result.stderr
    assert "Traceback" not in result.stderr


def test_ctrl_c_ends_the_wait_for_an_answer(commands: Commands, plain: PlainServer) -> None:
    plain.stays_open = True
    plain.replies = {MODELS: models(), CHAT: b""}
    with chatting(commands, "--url", plain.url) as terminal:
        terminal.running.says("talking to one")
        terminal.type("Hello")
        assert eventually(lambda: len(plain.asked) == 2)
        plain.hung_up.clear()
        terminal.running.send(signal.SIGINT)
        terminal.running.says("[stopped before the answer; the message is not kept]")
        assert plain.hung_up.wait(60)
        terminal.type("/exit")
        assert terminal.running.ends().status == 0


def test_a_conversation_that_is_too_long_ends_nothing(commands: Commands, server: Server) -> None:
    lines = ("word " * 1000, "Hello", "/save talk.json")
    result = talk(commands, address(server), "--max-tokens", 2, lines=lines)
    assert result.status == 0
    assert "error: The conversation is too long for the model's context" in result.stderr
    assert len(saved(commands)) == 2


def test_a_server_that_fails_ends_a_chat_that_nobody_watches(
    commands: Commands, plain: PlainServer
) -> None:
    plain.replies[CHAT] = refused("The queue is full.", "503 Busy", "Retry-After: 7\r\n")
    result = talk(commands, plain.url, lines=("Hello", "never asked"))
    assert (result.status, result.stdout) == (1, "")
    assert result.error.endswith("cannot answer now: The queue is full; try again in 7 seconds.")
    assert len(plain.asked) == 2
    gone = talk(commands, "http://127.0.0.1:1", lines=("Hello",))
    assert gone.status == 1 and "(Connection refused)" in gone.error


def test_no_control_character_of_an_answer_reaches_the_terminal(
    commands: Commands, plain: PlainServer
) -> None:
    text = "\x1b]0;owned\x07naïve\r\n\x9b2Jend"
    plain.replies[CHAT] = stream_of(text[:3], text[3:])
    result = talk(commands, plain.url, lines=("Hello", "/save talk.json"))
    assert result.stdout == "\ufffd]0;owned\ufffdnaïve\n\ufffd2Jend\n"
    assert saved(commands)[-1]["content"] == text


def test_sampling_options_become_fields_of_the_request(
    commands: Commands, plain: PlainServer
) -> None:
    plain.replies[CHAT] = stream_of("Hi")
    options = [
        "--temperature", 0.5, "--top-p", 0.9, "--max-tokens", 7, "--top-k", 3, "--min-p", 0.1,
        "--seed", 40, "--stop", "END", "--stop-token-id", 5, "--logit-bias", "7=-1.5",
        "--repetition-penalty", 1.1, "--presence-penalty", 0.2, "--frequency-penalty", 0.3,
        "--split-special",
    ]  # fmt: skip
    talk(commands, plain.url, *options, lines=("Hello", "More"))
    talk(commands, plain.url, lines=("Hello",), key="")
    fixed = {"model", "messages", "stream", "stream_options"}
    fields = [
        {name: value for name, value in asked.json.items() if name not in fixed}
        for asked in plain.asked
        if asked.path == CHAT
    ]
    assert fields[0] == {
        "temperature": 0.5, "top_p": 0.9, "max_tokens": 7, "top_k": 3, "min_p": 0.1, "seed": 40,
        "stop": ["END"], "stop_token_ids": [5], "logit_bias": {"7": -1.5},
        "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.3,
        "split_special": True,
    }  # fmt: skip
    assert fields[1] == fields[0] | {"seed": 41}
    assert fields[2] == {"temperature": 0.7, "top_p": 0.95, "max_tokens": 1024}
    assert "authorization" not in plain.asked[-1].headers


def test_certificates_are_checked(commands: Commands, model: Path) -> None:
    certificate, key = write_certificate(commands.folder)
    _, server = begin(
        commands, model, "--privacy", "tee", "--ssl-certfile", certificate, "--ssl-keyfile", key
    )
    url = f"https://localhost:{server.port}"
    unknown = talk(commands, url, lines=("Hello",))
    assert unknown.status == 1
    assert "is not accepted (self-signed certificate)" in unknown.error
    named = talk(commands, url, "--cacert", certificate, "--max-tokens", 2, lines=("Hello",))
    assert named.status == 0, named.stderr
    other = talk(
        commands, url.replace("localhost", "127.0.0.1"), "--cacert", certificate, lines=("Hi",)
    )
    assert other.status == 1 and "IP address mismatch" in other.error
    in_clear = talk(commands, url.replace("https", "http"), lines=("Hello",))
    assert in_clear.status == 1 and "whether it is http or https" in in_clear.error


def test_tls_with_a_server_that_has_none_is_one_sentence(
    commands: Commands, server: Server
) -> None:
    result = talk(commands, f"https://127.0.0.1:{server.port}", lines=("Hello",))
    assert result.status == 1 and "check whether the server uses TLS" in result.error


def test_an_address_in_clear_is_warned_of(commands: Commands, plain: PlainServer) -> None:
    exposed = plain.url.replace("127.0.0.1", "localhost.")
    result = talk(commands, exposed, "--quiet", lines=())
    assert "Prompts, the API key and answers travel to http://localhost." in result.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--url", "http://127.0.0.1:1", "--worker", "local"], "--worker is for a model in this"),
        (["--url", "http://127.0.0.1:1", "--no-shm"], "--no-shm is for a model in this process"),
        (["--url", "host:8000"], "--url must be the address of a server"),
        (["--url", "http://127.0.0.1:1", "--cacert", "x"], "--cacert is for an https address"),
        (["--url", "https://127.0.0.1:1", "--cacert", "x"], "The file of --cacert cannot be used"),
        (["demo", "--privacy", "tee", "--cacert", "x"], "--cacert is for --url only"),
        (["demo", "--privacy", "tee", "--api-key-file", "x"], "--api-key-file is for --url only"),
        ([], "MODEL is missing"),
    ],
)
def test_options_that_contradict_each_other_are_wrong_usage(
    commands: Commands, arguments: list[str], sentence: str
) -> None:
    result = commands.run("chat", *arguments)
    assert (result.status, result.stdout) == (2, "")
    assert sentence in result.error


def test_variables_of_a_local_model_have_no_effect(commands: Commands, plain: PlainServer) -> None:
    plain.replies[CHAT] = stream_of("Hi")
    env = {"TSQP_MODEL": "demo", "TSQP_WORKER": "tcp://nowhere", "TSQP_PRIVACY": "nonsense"}
    result = commands.run("chat", "--url", plain.url, env=env)
    assert result.status == 0, result.stderr
    assert "talking to one" in result.stderr


@pytest.mark.fresh
def test_a_chat_with_a_server_starts_without_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "tsqp", "chat", "--debug", "--url"]
    result = subprocess.run(  # --debug shows what Python itself prints
        [*command, "http://127.0.0.1:1"], capture_output=True, text=True, timeout=100, check=False
    )
    assert "Connection refused" in result.stderr
    assert "httpx2" in result.stderr
    assert " torch" not in result.stderr
