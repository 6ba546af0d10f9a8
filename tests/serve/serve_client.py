"""Plain HTTP requests to a server of the tests."""

import http.client
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

KEY, OTHER_KEY = "key-of-one-tenant", "key-of-another-tenant"
DEADLINE_S = 60.0


@dataclass
class Reply:
    """An answer as it came."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The data of each server-sent event; the last one is [DONE]."""
        lines = self.body.decode().split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""], lines
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]

    @property
    def error(self) -> dict[str, Any]:
        """The error, after everything about its form was checked."""
        assert set(self.json) == {"error"}
        error: dict[str, Any] = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str) and isinstance(error["type"], str)
        return error


@dataclass
class Server:
    """Where a server listens, and how to ask it."""

    port: int
    key: str = KEY
    log: Callable[[], str] = field(default=lambda: "")

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)

    def ask(
        self,
        path: str,
        body: object = None,
        *,
        method: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """A whole request and its answer. Bytes are sent as they are, all else as JSON."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        given = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        connection = self.connect()
        try:
            connection.request(
                method or ("GET" if body is None else "POST"),
                path,
                data,
                given | dict(headers or {}),
            )
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, found, response.read())
        finally:
            connection.close()

    def chat(self, text: str = "Hello", **fields: object) -> Reply:
        messages = [{"role": "user", "content": text}]
        return self.ask("/v1/chat/completions", {"messages": messages, "max_tokens": 4} | fields)

    def complete(self, prompt: object, **fields: object) -> Reply:
        return self.ask("/v1/completions", {"prompt": prompt, "max_tokens": 4} | fields)

    def metrics(self) -> dict[str, float]:
        """Every sample, by its name and the labels besides the model's."""
        return dict(_samples(self.ask("/metrics").body.decode()))

    def counts(self) -> tuple[int, int]:
        """How many answers run, and how many wait."""
        found = self.metrics()
        names = "tsqp_num_requests_running", "tsqp_num_requests_waiting"
        running, waiting = (int(found[name]) for name in names)
        return running, waiting

    def running(self) -> int:
        """How many answers run or wait."""
        return sum(self.counts())

    def settles(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < end, self.log()
            time.sleep(0.02)


def _samples(text: str) -> Iterator[tuple[str, float]]:
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        name, value = line.rsplit(" ", 1)
        name = re.sub(r',?model_name="[^"]*"', "", name).replace("{,", "{").replace("{}", "")
        yield name, float(value)
