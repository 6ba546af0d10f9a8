"""One model over several workers, each with a shard of it."""

import json
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lying_sessions import complete
from protocol_helpers import Commands
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tsqp import LLM
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.checkpoint.prepared import prepare
from tsqp.doctor.greeting_checks import Unnamed, greeting_checks
from tsqp.doctor.session_checks import Target, session_checks
from tsqp.errors import (
    HandshakeError,
    IntegrityError,
    UsageError,
    WorkerError,
    WorkerLost,
    WorkerUnavailable,
)
from tsqp.gpu.backends.cpu import CpuBackend
from tsqp.gpu.worker import Worker
from tsqp.gpu.worker_weights import load_integers, load_shard
from tsqp.model.shard import Shard
from tsqp.tee.crypto.freivalds import MAX_FAILURES, FailureLimit
from tsqp.tee.crypto.pad_pool import PadPool
from tsqp.tee.crypto.pads import USED, Pads
from tsqp.wire.endpoint import parse_endpoint
from tsqp.wire.messages import Operation
from tsqp.wire.query_worker import ask_what_is_served
from tsqp.wire.server import Server

pytestmark = pytest.mark.usefixtures("limit")

MODES = {
    "wide": {},
    "compact": {"field": "compact"},
    "lattice": {"field": "lattice"},
    "open": {"privacy": "open", "pad_memory": None},
}

Shards = Callable[[int], list[str]]
Expected = Callable[[str], list[int]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Groups of five to twelve blocks of features, some of them not full, with biases."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=380,
        hidden_size=160,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=5,
        num_key_value_heads=1,
        max_position_embeddings=128,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    )
    made = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            centre = 1.0 if "norm" in name else 0.0
            parameter.copy_(centre + 0.2 * torch.randn_like(parameter))
    made.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def expected(model: str) -> Expected:
    """The tokens of one worker, by mode."""

    @cache
    def tokens(mode: str) -> list[int]:
        with begin(model, "inproc", **MODES[mode]) as llm:
            return complete(llm, max_tokens=6)

    return tokens


@pytest.fixture(scope="module")
def shards(
    model: str, shared_commands: Commands, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shards]:
    """Starts the workers of all shards, two of them as processes; returns their endpoints."""
    with ExitStack() as stack:

        @cache
        def start(count: int) -> list[str]:
            folder = tmp_path_factory.mktemp("shards")
            if count > 2:  # whose loops are compiled once
                return stack.enter_context(watching(folder, model, count, serve_open=True))[0]
            ends = [f"ipc://{folder}/{n}.sock" for n in (1, 2)]
            for n, end in enumerate(ends, 1):
                shared_commands.worker(model, end, "--shard", f"{n}/2")
            return ends

        yield start


def begin(model: str, *endpoints: str, **options: Any) -> LLM:
    return LLM(model, worker=endpoints, **({"pad_memory": 0} | options))


def states(llm: LLM) -> list[tuple[str, str | None]]:
    return [(each.state, each.error) for each in llm._model.failover.statuses]


class Watched(Worker):
    """A shard in a thread of this process, whose calls a test sees.

    Args:
        lies: flip one bit of each answer.
        together: all shards of a call wait here for one another.
    """

    def __init__(
        self,
        model: str,
        shard: Shard,
        *,
        lies: bool = False,
        together: threading.Barrier | None = None,
        serve_open: bool = False,
    ) -> None:
        cpu = CpuBackend()
        with closing(open_checkpoint(model)) as checkpoint:
            weights = load_shard(checkpoint, torch.float32, cpu, shard) if serve_open else None
            super().__init__(weights, load_integers(checkpoint, cpu, shard=shard))
        self.received: list[bytes] = []
        self._lies = lies
        self._together = together

    def run(
        self, operation: Operation, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        if self._together is not None:
            self._together.wait(10)
        self.received.append(inputs[0].numpy().tobytes())
        super().run(operation, inputs, outputs)  # type: ignore[arg-type]
        if self._lies:
            outputs[0].view(-1)[-1] ^= 1


@contextmanager
def watching(
    folder: Path,
    model: str,
    count: int,
    *,
    liar: int = 0,
    meet: bool = False,
    serve_open: bool = False,
) -> Iterator[tuple[list[str], list[Watched]]]:
    """All shards in threads, and their endpoints."""
    stop, together = threading.Event(), threading.Barrier(count) if meet else None
    with ExitStack() as stack:
        ends, workers = [], []
        for n in range(1, count + 1):
            server = Server(parse_endpoint(f"ipc://{folder}/{n}.sock"))
            stack.callback(server.close)
            shard = Shard(n, count)
            worker = Watched(model, shard, lies=n == liar, together=together, serve_open=serve_open)
            thread = threading.Thread(target=server.serve, args=(worker, stop.is_set))
            thread.start()
            stack.callback(thread.join)
            ends.append(server.address)
            workers.append(worker)
        stack.callback(stop.set)
        yield ends, workers


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_tokens_of_shards_are_those_of_one_worker(
    count: int, mode: str, model: str, shards: Shards, expected: Expected
) -> None:
    first, *others = shards(count)
    with begin(model, *others, first, **MODES[mode]) as llm:  # in whatever order
        assert complete(llm, max_tokens=6) == expected(mode)
        assert states(llm) == [("in use", None)] * count


def test_shards_of_a_prepared_file_serve_too(
    model: str, expected: Expected, commands: Commands
) -> None:
    prepared = commands.folder / "model.tsqp.safetensors"
    prepare(model, prepared)
    ends = [f"ipc://{commands.folder}/{n}.sock" for n in (1, 2)]
    for n, end in enumerate(ends, 1):
        commands.worker(prepared, end, "--shard", f"{n}/2")
    with begin(model, *ends) as llm:
        assert complete(llm, max_tokens=6) == expected("wide")


def test_all_shards_of_a_call_get_the_same_bytes_and_masks_are_used_once(
    model: str, expected: Expected, tmp_path: Path
) -> None:
    with watching(tmp_path, model, 3) as (ends, workers), begin(model, *ends) as llm:
        for _ in range(2):  # the same inputs again, which the same masks would not hide
            assert complete(llm, max_tokens=6) == expected("wide")
        first, *others = (worker.received for worker in workers)
        assert len(first) > 20
        assert others == [first, first]
        assert len(set(first)) == len(first)


@pytest.mark.parametrize("field", ["wide", "lattice"])
def test_pads_and_copies_of_them_are_wiped(
    field: str, model: str, shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Pads] = []
    copies: list[Any] = []
    take, products = PadPool.take, Pads.products

    def noting(pool: PadPool, key: Any, rows: int) -> Pads:
        taken.append(take(pool, key, rows))
        return taken[-1]

    def copying(pads: Pads, columns: slice) -> Any:
        copies.append(products(pads, columns))
        return copies[-1]

    monkeypatch.setattr(PadPool, "take", noting)
    monkeypatch.setattr(Pads, "products", copying)
    with begin(model, *shards(3), field=field) as llm:
        complete(llm)
    assert len(copies) == 3 * len(taken) > 30
    for wiped in (array for pads in taken for array in (pads.r_ND, pads.u_NF)):
        assert (wiped.view(np.int32) == USED).all()
    assert all(np.isin(copy.view(np.int32), (0, USED)).all() for copy in copies)


def test_the_log_counts_the_masks_of_a_call_once(
    model: str, shards: Shards, tmp_path: Path
) -> None:
    log = tmp_path / "log.jsonl"
    with begin(model, *shards(3), rpc_log=str(log)) as llm:
        complete(llm)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    calls = [line for line in lines if line["line"] == "call"]
    assert len(calls) > 30
    assert {call["endpoint"] for call in calls} == {0, 1, 2}
    assert {call["endpoint"] for call in calls if call["pads_us"]} == {0}


def test_shards_compute_at_the_same_time(model: str, expected: Expected, tmp_path: Path) -> None:
    with watching(tmp_path, model, 4, meet=True) as (ends, _), begin(model, *ends) as llm:
        assert complete(llm, max_tokens=6) == expected("wide")


@pytest.mark.parametrize(
    ("liar", "field"), [(1, "wide"), (2, "compact"), (3, "wide"), (3, "lattice")]
)
def test_a_lying_shard_is_named(
    liar: int, field: str, model: str, tmp_path: Path, limit: FailureLimit
) -> None:
    with (
        watching(tmp_path, model, 3, liar=liar) as (ends, _),
        begin(model, *ends, field=field) as llm,
    ):
        for _ in range(2):
            with pytest.raises(IntegrityError, match="wrong product") as caught:
                complete(llm)
            assert str(caught.value).startswith(f"The worker at {ends[liar - 1]} ")
        lied = ("quarantined", "IntegrityError")
        assert states(llm) == [lied if n == liar else ("standby", None) for n in (1, 2, 3)]
    assert limit._left == MAX_FAILURES - 1


@pytest.mark.parametrize("mode", ["wide", "open"])
def test_a_killed_shard_ends_requests_and_is_taken_back(
    mode: str, model: str, expected: Expected, commands: Commands, gives_up_soon: None
) -> None:
    ends = [f"ipc://{commands.folder}/{n}.sock" for n in (1, 2)]
    _, second = [commands.worker(model, end, "--shard", f"{n}/2") for n, end in enumerate(ends, 1)]
    with begin(model, *ends, **MODES[mode]) as llm:
        assert complete(llm, max_tokens=6) == expected(mode)
        second.send(signal.SIGKILL)
        second.ends()
        Path(ends[1].removeprefix("ipc://")).unlink()
        with pytest.raises(WorkerLost, match=ends[1]):
            complete(llm)
        with pytest.raises(WorkerLost):
            complete(llm)
        assert states(llm)[1] == ("lost", None)
        commands.worker(model, ends[1], "--shard", "2/2")
        assert complete(llm, max_tokens=6) == expected(mode)


def test_shards_that_do_not_cover_the_model_once_are_refused(
    model: str, shards: Shards, commands: Commands, gives_up_soon: None
) -> None:
    one, two = shards(2)
    again = commands.ipc()
    commands.worker(model, again, "--shard", "1/2")
    with pytest.raises(HandshakeError, match=r"No worker holds shard 2 of 2 .*; give one for each"):
        begin(model, one, again)
    with pytest.raises(HandshakeError, match="holds shard 1 of 3, but 2 workers are given"):
        begin(model, *shards(3)[:2])
    of_open = {"privacy": "open", "pad_memory": None}
    with pytest.raises(HandshakeError, match=r"and .* both hold shard 1 of 2; give one worker"):
        begin(model, one, again, **of_open)
    with pytest.raises(HandshakeError, match="open takes one worker for each shard"):
        begin(model, one, two, again, **of_open)
    with pytest.raises(HandshakeError, match=r"shard 2 of 3 .* needs one of 2 shards"):
        begin(model, one, shards(3)[1])
    with pytest.raises(HandshakeError, match=r"holds shard 1 of 2 .* needs the whole model"):
        begin(model, one)
    with pytest.raises(WorkerUnavailable, match=f"{two}x"):
        begin(model, one, f"{two}x")


def test_workers_that_all_load_are_not_taken_for_those_of_a_whole_model(
    model: str, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    soon = partial(ask_what_is_served, timeout=0.3)
    monkeypatch.setattr("tsqp.runtime.worker_link.ask_what_is_served", soon)
    ends = [f"ipc://{commands.folder}/{n}.sock" for n in (1, 2)]
    with ExitStack() as stack:
        for end in ends:  # each listens, and does not serve yet
            stack.enter_context(closing(Server(parse_endpoint(end))))
        with pytest.raises(WorkerError, match=f"{ends[0]} .*loading"):
            begin(model, *ends)


def test_a_shard_of_another_model_is_refused(shards: Shards, commands: Commands) -> None:
    ends = [f"ipc://{commands.folder}/{n}.sock" for n in (1, 2)]
    commands.worker("random:tiny", ends[0], "--shard", "1/2")
    commands.worker("random:tiny:7", ends[1], "--shard", "2/2")
    for options in ({}, {"privacy": "open", "pad_memory": None, "dtype": "float32"}):
        with pytest.raises(HandshakeError, match=f"{ends[1]}: the worker holds other weights"):
            begin("random:tiny", *ends, **options)


def test_what_shards_cannot_do_is_refused(model: str, shards: Shards) -> None:
    with pytest.raises(UsageError, match="--attention gpu"):
        begin(model, *shards(2), privacy="open", attention="gpu", pad_memory=None)
    with pytest.raises(UsageError, match="do not make hints"):
        begin(model, *shards(2), field="lattice", hints="worker")
    with pytest.raises(HandshakeError, match="needs the whole model"):
        begin(model, *shards(2), privacy="shares", insecure_same_host=True, pad_memory=None)


def test_doctor_says_which_shard_a_worker_holds(model: str, shards: Shards) -> None:
    endpoint = shards(2)[1]
    asked = {check.name: check for check in greeting_checks(Unnamed(endpoint))}
    assert ", shard 2 of 2, in protocol version" in asked["pad: what is served"].found
    examined = {check.name: check for check in session_checks(Target(model, endpoint))}
    assert examined["pad: handshake"].state == "bad"
    assert "holds shard 2 of 2, and its products" in examined["pad: handshake"].found


def test_a_model_with_too_few_features_is_refused(commands: Commands) -> None:
    ended = commands.run("worker", "random:tiny", "--listen", commands.ipc(), "--shard", "1/3")
    assert ended.status == 1
    assert "group o of layer 0 has 64 output features, too few for 3 shards" in ended.error
