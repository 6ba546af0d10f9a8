"""Throughput and latency of a server that runs already, as a client sees them (`tsqp bench serve`).

The client is a process of its own, with a thread for each stream. Every prompt is new, so that
nothing is reused. The server's own metrics tell whether masks were made ahead, and how much
processor time its event loop took, which is what HTTP costs.
"""

import http.client
import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields
from typing import Any
from urllib.parse import urlsplit

from rich.table import Table

from tsqp.bench.figures import Figure
from tsqp.bench.host import describe_machine
from tsqp.bench.output import new_table, show
from tsqp.errors import TSQPError, UsageError

TIMEOUT_S = 600.0
SETTLE_S = 1.0
MOST_STREAMS = 1024
HTTP_CPU = "tsqp_http_cpu_seconds_total"
MADE = "tsqp_pads_made_rows_total"
AHEAD, INLINE = "tsqp_pads_ahead_rows_total", "tsqp_pads_inline_rows_total"


@dataclass(frozen=True, slots=True)
class Target:
    """A server, and its API key if it has any.

    Raises:
        UsageError: the address is not an http or https URL.
    """

    url: str
    api_key: str | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(
                "--url must be the address of a server, such as http://127.0.0.1:8000."
            )

    def open(
        self, path: str, body: object = None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Send a request, and return the answer's beginning.

        Raises:
            TSQPError: the server cannot be reached, or refuses.
        """
        parts = urlsplit(self.url)
        kind = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        connection = kind(parts.hostname or "", parts.port, timeout=TIMEOUT_S)
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body)
        try:
            connection.request(
                "GET" if body is None else "POST", parts.path.rstrip("/") + path, data, headers
            )
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise TSQPError(f"No server answers at --url ({type(error).__name__}).") from None
        if response.status != 200:
            connection.close()
            raise TSQPError(f"The server answers {path} with status {response.status}.")
        return connection, response

    def read(self, path: str) -> bytes:
        """The whole answer to a GET."""
        connection, response = self.open(path)
        with closing(connection):
            return response.read()

    def metrics(self) -> dict[str, float]:
        """The metrics without labels but the model's."""
        found = {}
        for line in self.read("/metrics").decode().splitlines():
            name, _, value = line.rpartition(" ")
            name, _, labels = name.partition("{")
            if not line.startswith("#") and labels.count("=") <= 1:
                found[name] = float(value)
        return found


@dataclass(frozen=True, slots=True)
class Answer:
    """When the tokens of one answer came, in seconds since the request began."""

    times: tuple[float, ...]

    @property
    def first_s(self) -> float:
        return self.times[0]

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Load:
    """What so many streams at once got, in one round.

    Attributes:
        tokens_per_s: of all streams together, first tokens included.
        first_s, gap_s, gap_p99_s: seconds to the first token (median), and between two tokens
            (median, and the 99th percentile).
        http_share: processor time of the server's event loop divided by the time of the round; None
            if the server does not tell.
        inline_share: part of the masks that were made while an answer waited; None without masks.
    """

    tokens_per_s: float
    first_s: float
    gap_s: float
    gap_p99_s: float
    http_share: float | None
    inline_share: float | None


@dataclass(frozen=True, slots=True)
class LoadResult:
    """All figures.

    Attributes:
        status: what the server says of itself.
        loads: rounds, by the number of streams.
        short_alone_s, short_beside_s: seconds to the first token of a short prompt on a server that
            is idle, and on one that reads a prompt of `long_tokens` tokens.
        long_s: seconds to the first token of that long prompt.
    """

    status: dict[str, Any]
    prompt_tokens: int
    new_tokens: int
    long_tokens: int
    loads: dict[int, list[Load]]
    short_alone_s: list[float]
    short_beside_s: list[float]
    long_s: list[float]
    machine: dict[str, str] = field(default_factory=describe_machine)

    def figure(self, streams: int, value: Callable[[Load], float]) -> Figure:
        return Figure.of([value(load) for load in self.loads[streams]])

    def as_json(self) -> dict[str, object]:
        """The result as plain JSON data."""
        return {
            "server": self.status,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "long_tokens": self.long_tokens,
            "rounds": len(self.short_alone_s),
            "loads": [{"streams": n} | _figures(loads) for n, loads in self.loads.items()],
            "first_token_s": {
                name: asdict(Figure.of(seconds))
                for name, seconds in (
                    ("short_alone", self.short_alone_s),
                    ("short_beside_long", self.short_beside_s),
                    ("long", self.long_s),
                )
                if seconds
            },
            "machine": self.machine,
        }


def _figures(loads: Sequence[Load]) -> dict[str, object]:
    """The figure of each quantity over the rounds; those that the server does not tell left out."""
    found: dict[str, object] = {}
    for each in fields(Load):
        values = [getattr(load, each.name) for load in loads]
        if None not in values:
            found[each.name] = asdict(Figure.of(values))
    return found


def measure_server(
    target: Target,
    streams: Sequence[int],
    *,
    prompt_tokens: int,
    new_tokens: int,
    long_tokens: int,
    rounds: int,
) -> LoadResult:
    """Measure a server that answers nobody else meanwhile.

    Args:
        streams: numbers of answers at the same time.

    Raises:
        TSQPError: the server cannot be reached, or refuses.
    """
    status = json.loads(target.read("/v1/tsqp/status"))
    shape = prompt_tokens, new_tokens
    _use_up_masks(target, max(streams), shape)
    loads: dict[int, list[Load]] = {count: [] for count in streams}
    alone, beside, long = [], [], []
    for _ in range(rounds):
        for count in streams:
            loads[count].append(measure_load(target, count, shape))
        alone.append(_stream(target, prompt_tokens, 1).first_s)
        if long_tokens:
            both = _measure_beside(target, prompt_tokens, long_tokens)
            beside.append(both[0])
            long.append(both[1])
    known = {name: status[name] for name in ("model", "privacy", "field", "transport", "version")}
    return LoadResult(known, *shape, long_tokens, loads, alone, beside, long)


def _use_up_masks(target: Target, streams: int, shape: tuple[int, int]) -> None:
    """Warm up, and ask until as many masks were used as lay in stock before the first request."""
    before = target.metrics()
    last = before.get(MADE, 0.0) - before.get(INLINE, 0.0)
    used = -1.0
    while used < last:
        measure_load(target, streams, shape)
        earlier, used = used, target.metrics().get(AHEAD, 0.0)
        if used <= earlier:  # the server has begun a new session
            return


def measure_load(target: Target, streams: int, shape: tuple[int, int]) -> Load:
    """One round of so many streams, each with a prompt and an answer of these numbers of tokens.

    Raises:
        TSQPError: the server cannot be reached, or refuses.
    """
    answers: list[Answer] = []
    errors: list[TSQPError] = []

    def ask() -> None:
        try:
            answers.append(_stream(target, *shape))
        except TSQPError as error:
            errors.append(error)
        except (OSError, http.client.HTTPException, ValueError) as error:
            errors.append(TSQPError(f"An answer of the server broke off ({type(error).__name__})."))

    threads = [threading.Thread(target=ask) for _ in range(streams)]
    before = target.metrics()
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    after = target.metrics()
    if errors:
        raise errors[0]
    gaps = sorted(gap for answer in answers for gap in answer.gaps_s)
    ahead, inline = (after.get(name, 0.0) - before.get(name, 0.0) for name in (AHEAD, INLINE))
    return Load(
        tokens_per_s=sum(len(answer.times) for answer in answers) / seconds,
        first_s=statistics.median(answer.first_s for answer in answers),
        gap_s=statistics.median(gaps),
        gap_p99_s=gaps[min(len(gaps) - 1, round(0.99 * len(gaps)))],
        http_share=(after[HTTP_CPU] - before[HTTP_CPU]) / seconds if HTTP_CPU in after else None,
        inline_share=inline / (ahead + inline) if ahead + inline else None,
    )


def _measure_beside(target: Target, short: int, long: int) -> tuple[float, float]:
    """Seconds to the first tokens of a short prompt and of a long one that came before it."""
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.append(_stream(target, long, 1).first_s))
    thread.start()
    time.sleep(0.05)  # until the long one is being read
    first_s = _stream(target, short, 1).first_s
    thread.join()
    if not found:
        raise TSQPError("The server refuses the long prompt: choose a shorter one.")
    return first_s, found[0]


def _stream(target: Target, prompt_tokens: int, new_tokens: int) -> Answer:
    """One answer to a random prompt, token by token."""
    prompt = [1 + byte % 250 for byte in os.urandom(prompt_tokens)]
    body = {
        "prompt": prompt, "max_tokens": new_tokens, "stream": True, "temperature": 0,
        "ignore_eos": True, "return_token_ids": True,
    }  # fmt: skip
    began = time.perf_counter()
    connection, response = target.open("/v1/completions", body)
    with closing(connection):
        times = [time.perf_counter() - began for _ in _tokens(response)]
    if len(times) != new_tokens:
        raise TSQPError(f"The server sent {len(times)} tokens instead of {new_tokens}.")
    return Answer(tuple(times))


def _tokens(response: http.client.HTTPResponse) -> Iterator[int]:
    """The token ids, as they come.

    Raises:
        TSQPError: the answer ends in an error.
    """
    for line in iter(response.readline, b""):
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            raise TSQPError("The server ended an answer with an error; look at its log.")
        for choice in event["choices"]:
            yield from choice.get("token_ids") or ()


def tables(result: LoadResult) -> Iterator[Table]:
    """The tables to print."""
    name = f"{result.status['model']}, privacy {result.status['privacy']}"
    shape = f"{result.prompt_tokens} + {result.new_tokens} tokens"
    table = new_table(
        f"{name}: {shape}", "streams", "tokens/s", "÷ one stream", "to first token, ms",
        "between tokens, ms", "99th percentile, ms", "HTTP, % of the time", "masks made in line, %",
    )  # fmt: skip
    least = min(result.loads)
    one = result.figure(least, lambda load: load.tokens_per_s).median
    for count, loads in result.loads.items():
        rate = result.figure(count, lambda load: load.tokens_per_s)
        table.add_row(
            str(count),
            show(rate, 1),
            f"{rate.median / one:.2f}",
            show(result.figure(count, lambda load: load.first_s), 0, 1e-3),
            show(result.figure(count, lambda load: load.gap_s), 1, 1e-3),
            show(result.figure(count, lambda load: load.gap_p99_s), 1, 1e-3),
            _percent([load.http_share for load in loads]),
            _percent([load.inline_share for load in loads]),
        )
    yield table


def notes(result: LoadResult) -> Iterator[str]:
    """Sentences to print below the tables."""
    if result.short_beside_s:
        alone, beside, long = (
            statistics.median(each)
            for each in (result.short_alone_s, result.short_beside_s, result.long_s)
        )
        yield (
            f"First token of a prompt of {result.prompt_tokens} tokens: {alone * 1e3:.0f} ms on an "
            f"idle server, {beside * 1e3:.0f} ms while a prompt of {result.long_tokens} tokens is "
            f"read ({beside / alone:.1f} times; the long one takes {long * 1e3:.0f} ms)."
        )


def _percent(shares: Sequence[float | None]) -> str:
    known = [share for share in shares if share is not None]
    return f"{100 * statistics.median(known):.1f}" if known else ""
