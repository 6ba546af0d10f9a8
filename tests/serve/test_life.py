"""Clients that hang up, full queues, signals, and a server with a worker."""

import http.client
import json
import signal
import socket
import ssl
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from protocol_helpers import Commands
from serve_client import DEADLINE_S, KEY, OTHER_KEY, Server
from serve_process import begin

from certificates import write_certificate

ENDLESS = {"max_tokens": 4000, "ignore_eos": True, "temperature": 0}


def open_request(server: Server, stream: bool) -> http.client.HTTPConnection:
    """A request that takes long, and whose answer nobody has read yet."""
    connection = server.connect()
    body = json.dumps({"prompt": [1, 2, 3], "stream": stream, **ENDLESS})
    headers = {"Authorization": f"Bearer {server.key}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", body, headers)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_sequence(server: Server, stream: bool) -> None:
    reason = 'tsqp_request_success_total{finished_reason="abort"}'
    before = server.metrics()
    connection = open_request(server, stream)
    # Before it runs, it would end without being counted.
    server.settles(lambda: server.metrics()["tsqp_num_requests_running"] == 1)
    if stream:
        assert connection.getresponse().read(20)
    assert connection.sock is not None or stream
    if connection.sock is not None:
        connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    server.settles(lambda: server.running() == 0)
    after = server.metrics()
    assert after[reason] - before[reason] == 1
    made = "tsqp_generation_tokens_total"
    assert after[made] - before[made] < 4000


def test_one_key_cannot_fill_the_queue_and_has_room_again(server: Server) -> None:
    """8 answers run and 24 may wait: one key may have half of what the others leave."""
    other = Server(server.port, OTHER_KEY)
    connections = [open_request(server, True) for _ in range(8 + 12)]
    server.settles(lambda: server.counts() == (8, 12))
    reply = server.complete([1])
    assert (reply.status, reply.error["code"]) == (503, "queue_full")
    assert int(reply.headers["retry-after"]) >= 1
    connections += [open_request(other, True) for _ in range(6)]
    server.settles(lambda: server.counts() == (8, 18))
    assert other.complete([1]).status == server.complete([1]).status == 503
    for connection in connections:
        connection.getresponse().close()
        connection.close()
    server.settles(lambda: server.running() == 0)
    assert server.complete([1]).status == 200


def test_a_prompt_that_is_wrong_frees_the_others_of_its_request(server: Server) -> None:
    reason = 'tsqp_request_success_total{finished_reason="abort"}'
    before = server.metrics()
    for stream in (False, True):
        reply = server.complete([[10**6], [1, 2], [3]], stream=stream, **ENDLESS)
        assert reply.status == 400
        server.settles(lambda: server.running() == 0)
    after = server.metrics()
    assert after[reason] - before[reason] == 4


def test_requests_at_once_get_their_own_answers(server: Server) -> None:
    quiet = {n: server.chat(str(n), temperature=0).json["choices"] for n in range(6)}
    found: dict[int, object] = {}

    def ask(n: int) -> None:
        found[n] = server.chat(str(n), temperature=0).json["choices"]

    threads = [threading.Thread(target=ask, args=(n,)) for n in quiet]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert found == quiet


def test_both_keys_are_let_in(server: Server) -> None:
    assert Server(server.port, OTHER_KEY).ask("/v1/models").status == 200


def test_a_server_says_503_until_it_is_ready_and_drains_at_sigterm(
    model: Path, commands: Commands, tmp_path: Path
) -> None:
    running = commands.start(
        "serve", model, "--worker", "local", "--port", 0, "--threads", 1,
        "--pad-memory", 0.01, "--shutdown-timeout", 50,
    )  # fmt: skip
    running.says("listening at")
    port = int(running.stderr.split("http://127.0.0.1:")[1].split(";")[0])
    server = Server(port, log=lambda: running.stderr)
    early = server.ask("/health")
    if early.status == 503:  # a fast machine may have loaded the model already
        assert early.json == {"status": "loading"}
        assert "retry-after" in early.headers
        reply = server.chat()
        assert reply.status == 200 or reply.error["code"] == "loading"
    running.says("serving ")
    assert server.ask("/health").json == {"status": "ready"}
    greedy = {"temperature": 0, "max_tokens": 30, "ignore_eos": True}
    expected = server.complete([1, 2, 3], **greedy).json["choices"][0]["text"]
    metrics = server.metrics()
    assert sum(value for name, value in metrics.items() if "tsqp_rpc_calls_total" in name) > 0
    assert metrics["tsqp_pads_made_rows_total"] > 0
    status = server.ask("/v1/tsqp/status").json
    assert (status["privacy"], status["integrity_failed"]) == ("pad", False)
    assert status["workers"] == [{"state": "in use"}]
    connection = server.connect()
    body = json.dumps({"prompt": [1, 2, 3], "stream": True, **greedy})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    with closing(connection.getresponse()) as response:
        running.send(signal.SIGTERM)
        events = response.read().decode().split("\n\n")
    connection.close()
    assert events[-2:] == ["data: [DONE]", ""]
    pieces = [json.loads(event.removeprefix("data: "))["choices"] for event in events[:-2]]
    assert "".join(choice["text"] for [choice] in pieces) == expected
    result = running.ends()
    assert result.status == 0
    assert "Traceback" not in result.stderr


def test_a_request_that_outlives_the_shutdown_ends_in_an_error(
    model: Path, commands: Commands
) -> None:
    running, server = begin(
        commands, model, "--privacy", "tee", "--shutdown-timeout", 0.1, "--max-num-seqs", 1
    )
    connections = [open_request(server, True) for _ in range(8)]  # one after the other: a minute
    server.settles(lambda: server.running() == 8)
    last = connections[-1].getresponse()
    running.send(signal.SIGTERM)
    events = last.read().decode().split("\n\n")
    for connection in connections:
        connection.close()
    assert events[-2:] == ["data: [DONE]", ""]
    error = json.loads(events[-3].removeprefix("data: "))["error"]
    assert error["code"] == "shutting_down"
    assert running.ends().status == 0


def test_a_model_without_a_tokenizer_takes_token_ids_only(commands: Commands) -> None:
    _, server = begin(commands, "random:tiny", "--privacy", "tee")
    assert server.complete([1, 2, 3], echo=True, logprobs=1).status == 200
    for reply in (
        server.chat(),
        server.complete("a text"),
        server.ask("/tokenize", {"prompt": "a text"}),
        server.ask("/detokenize", {"tokens": [1]}),
        server.ask("/v1/responses", {"input": "a text"}),
    ):
        assert reply.status == 400
        assert "has no tokenizer" in reply.error["message"]


def test_tls_and_a_unix_socket(model: Path, commands: Commands, tmp_path: Path) -> None:
    certificate, key = write_certificate(tmp_path)
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    keys.chmod(0o600)
    path = tmp_path / "server.sock"
    with socket.socket(socket.AF_UNIX) as killed:  # its file stays
        killed.bind(str(path))
    running = commands.start(
        "serve", model, "--privacy", "tee", "--threads", 1, "--uds", path,
        "--ssl-certfile", certificate, "--ssl-keyfile", key, "--api-key-file", keys,
    )  # fmt: skip
    running.says("serving ")
    assert path.stat().st_mode & 0o777 == 0o600
    context = ssl.create_default_context(cafile=str(certificate))
    with socket.socket(socket.AF_UNIX) as plain:
        plain.settimeout(DEADLINE_S)
        plain.connect(str(path))
        with context.wrap_socket(plain, server_hostname="localhost") as link:
            link.sendall(
                f"GET /version HTTP/1.0\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode()
            )
            assert b" 200 " in link.recv(65536)
    running.send(signal.SIGTERM)
    assert running.ends().status == 0
    assert not path.exists()


def test_wrong_options_are_one_sentence_each(model: Path, commands: Commands) -> None:
    keys = commands.folder / "keys"
    keys.write_text("a key")
    keys.chmod(0o644)
    for arguments, said in (
        (["--ssl-certfile", model / "config.json"], "TLS needs both"),
        (["--ssl-certfile", model / "config.json", "--ssl-keyfile", model / "config.json"],
         "The certificate cannot be used"),
        (["--api-key-file", keys], "Everybody may read the API keys"),
        (["--api-key-file", commands.folder / "none"], "Cannot read API keys"),
        (["--root-path", "a"], "must begin with a slash"),
        (["--uds", commands.folder / "no" / "where"], "Cannot listen on --uds"),
    ):  # fmt: skip
        result = commands.run("serve", model, "--privacy", "tee", *arguments)
        assert result.status == 2
        assert said in result.error


def test_a_port_that_is_taken_and_a_worker_that_is_not_there_end_the_server(
    server: Server, model: Path, commands: Commands
) -> None:
    result = commands.run("serve", model, "--privacy", "tee", "--port", server.port)
    assert result.status == 2
    assert "Cannot listen" in result.error
    began = time.monotonic()
    result = commands.run("serve", model, "--port", 0, "--worker", commands.ipc())
    assert (result.status, time.monotonic() - began < DEADLINE_S) == (1, True)
    assert result.error
