"""`shares` computes what `tee --fixed-point` computes; any n-1 workers together learn nothing."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from protocol_helpers import SHARED
from torch import Tensor

from pairwise import pairs
from tsqp import LLM, SamplingParams
from tsqp.algebra import residue_bytes
from tsqp.algebra.params import DIRECT_FIELDS, FIELDS
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.errors import NumericalError, ProtocolError, RemoteError, WorkerLost
from tsqp.gpu.backends.cpu import CpuBackend
from tsqp.gpu.worker import MAX_ROWS, Worker
from tsqp.gpu.worker_weights import load_integers
from tsqp.model.config import layer_groups, linear_groups
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.offload import shares
from tsqp.tee.offload.offload import Linear
from tsqp.wire.channel import InprocChannel
from tsqp.wire.endpoint import parse_endpoint
from tsqp.wire.messages import Operation, Product, SeedProduct
from tsqp.wire.seeds import expand
from tsqp.wire.server import Server
from tsqp.wire.tensors import Spec
from tsqp.wire.zmq import new_key_pair

MODEL = "random:tiny"
NAMES = [field.name for field in DIRECT_FIELDS]
BOTH = pytest.mark.parametrize("field", NAMES)
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPTS = [[5, 6, 7], list(range(100, 300)), [9]]


def private(worker: Sequence[str], model: str = MODEL, **options: Any) -> LLM:
    testing = {"privacy": "shares", "insecure_same_host": True, "timeout": 30}
    return LLM(model, worker=worker, **(testing | options))


def tokens(llm: LLM, prompts: Sequence[Sequence[int]] = PROMPTS) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in llm.generate(prompts, GREEDY)]


def linear(llm: LLM, group: LinearGroup, x_TD: Tensor) -> Tensor:
    """What the offload answers to one request."""
    assert llm._offload is not None
    with llm._offload.start(Linear(group, x_TD)) as y_TF:
        return y_TF.clone()


@pytest.fixture(scope="module")
def expected() -> dict[str, list[tuple[int, ...]]]:
    """What `tee --fixed-point` answers in each field."""
    answers = {}
    for field in NAMES:
        with LLM(MODEL, privacy="tee", fixed_point=True, field=field) as llm:
            answers[field] = tokens(llm)
    return answers


class Workers:
    """Real servers with the real service, in threads: three for each kind of link."""

    def __init__(self, folder: Path) -> None:
        checkpoint = open_checkpoint(MODEL)
        service = Worker(None, load_integers(checkpoint, CpuBackend()))
        checkpoint.close()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self.ipc = [self._serve(service, f"ipc://{folder}/{number}.sock") for number in range(3)]
        pairs = [new_key_pair() for _ in range(3)]
        self.tcp = [self._serve(service, "tcp://127.0.0.1:0", secret) for _, secret in pairs]
        self.keys = [public for public, _ in pairs]

    def _serve(self, service: Worker, endpoint: str, secret_key: str | None = None) -> str:
        server = Server(parse_endpoint(endpoint), secret_key=secret_key)

        def run() -> None:
            server.serve(service, self._stop.is_set)
            server.close()

        self._threads.append(threading.Thread(target=run))
        self._threads[-1].start()
        return server.address

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    workers = Workers(tmp_path_factory.mktemp("workers"))
    yield workers
    workers.close()


@pytest.mark.parametrize(
    ("kind", "count", "shm", "field"), pairs(["ipc", "tcp"], [2, 3], [True, False], NAMES)
)
def test_whole_answers_over_links_equal_the_fixed_point_reference(
    kind: str,
    count: int,
    shm: bool,
    field: str,
    workers: Workers,
    expected: dict[str, list[tuple[int, ...]]],
) -> None:
    keys = workers.keys[:count] if kind == "tcp" else None
    endpoints = (workers.tcp if kind == "tcp" else workers.ipc)[:count]
    with private(endpoints, worker_key=keys, field=field, shm=shm) as llm:
        assert tokens(llm) == expected[field]
        assert llm.transport == (SHARED if shm else "inline")


@pytest.mark.parametrize(("count", "field"), [(2, "wide"), (3, "compact")])
def test_whole_answers_of_worker_processes_equal_the_fixed_point_reference(
    count: int, field: str, expected: dict[str, list[tuple[int, ...]]]
) -> None:
    with private(["local"] * count, field=field, microbatches=2) as llm:
        assert tokens(llm) == expected[field]
        assert llm.transport == SHARED


@pytest.mark.parametrize(
    ("field", "prompts"),
    [
        pytest.param("compact", PROMPTS, marks=pytest.mark.slow),
        pytest.param("wide", PROMPTS, marks=pytest.mark.slow),
    ],
    ids=["compact", "wide"],
)
def test_whole_answers_of_a_real_model_equal_the_fixed_point_reference(
    field: str, prompts: list[list[int]], demo_path: Path
) -> None:
    options = {"field": field, "dtype": "float32", "prefill_chunk": 100}
    with LLM("demo", privacy="tee", fixed_point=True, **options) as reference:
        right = tokens(reference, prompts)
    with private(["local", "local"], "demo", **options) as llm:
        assert tokens(llm, prompts) == right


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_every_group_is_bit_equal(count: int, dtype: str, field: str) -> None:
    generator = torch.Generator().manual_seed(3)
    options = {"field": field, "dtype": dtype}
    with (
        LLM(MODEL, privacy="tee", fixed_point=True, **options) as reference,
        private(["inproc"] * count, **options) as llm,
    ):
        for group in linear_groups(llm.config):
            for rows in (1, 2, 300):
                x_TD = torch.randn(rows, group.width, generator=generator).to(reference.dtype)
                y_TF = linear(llm, group, x_TD)
                assert y_TF.dtype == reference.dtype
                assert torch.equal(y_TF, linear(reference, group, x_TD))


def test_nobody_is_waited_for_before_everybody_has_work(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    for name in ("submit", "wait"):
        method = getattr(InprocChannel, name)

        def noted(channel: Any, *rest: Any, name: str = name, method: Any = method) -> Any:
            events.append(name)
            return method(channel, *rest)

        monkeypatch.setattr(InprocChannel, name, noted)
    with private(["inproc"] * 3) as llm:
        assert llm._offload is not None
        pending = llm._offload.start(
            Linear(layer_groups(llm.config, 0).qkv, torch.ones(300, 64))
        )  # of three blocks
        assert events == ["submit"] * 6
        with pending:
            assert events == ["submit"] * 6 + ["wait"] * 3 + ["submit"] * 3 + ["wait"] * 6


def test_the_workers_compute_at_the_same_time(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    everybody = threading.Barrier(3)  # passed by none that would be waited for before the others
    run = Worker.run

    def together(worker: Worker, *call: Any) -> None:
        everybody.wait(20)
        run(worker, *call)

    monkeypatch.setattr(Worker, "run", together)
    with private(workers.ipc) as llm:
        linear(llm, layer_groups(llm.config, 0).qkv, torch.ones(2, 64))


class Watched:
    """Notes what in-process workers receive: seeds, and residues."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, field: str = "wide") -> None:
        self.seeds: list[bytes] = []
        self.residues: list[np.ndarray] = []
        run, parameters = Worker.run, FIELDS[field]

        def noting(
            worker: Worker, operation: Operation, inputs: Sequence[Tensor], outputs: Any
        ) -> None:
            if isinstance(operation, SeedProduct):
                assert not inputs
                self.seeds.append(operation.seed)
            else:
                assert isinstance(operation, Product)
                shape = len(inputs[0]), inputs[0].shape[1] // parameters.residue_bytes
                residues_TD = np.empty(shape, np.int32)
                residue_bytes.unpack(inputs[0].numpy(), parameters, residues_TD)
                self.residues.append(residues_TD)
            run(worker, operation, inputs, outputs)

        monkeypatch.setattr(Worker, "run", noting)


def test_no_seed_and_no_share_is_used_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    prompt = [[1, 2, 3] * 40]
    with private(["inproc"] * 3) as llm:
        assert tokens(llm, prompt) == tokens(llm, prompt)
    calls = len(watched.residues)
    assert calls > 100
    assert len(watched.seeds) == len(set(watched.seeds)) == 2 * calls
    first, second = watched.residues[: calls // 2], watched.residues[calls // 2 :]
    pairs = list(zip(first, second, strict=True))
    assert sum(a.size for a, _ in pairs) > 10_000
    assert sum(int((a == b).sum()) for a, b in pairs) <= 3  # of which chance would give none


@BOTH
def test_the_shares_add_up_to_the_input_and_the_seeds_do_not_depend_on_it(
    field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch, field)
    numbers: Iterator[int] = iter(())
    monkeypatch.setattr(shares, "fresh_seed", lambda: next(numbers).to_bytes(32, "big"))
    inputs = [torch.full((2, 64), 3.0), torch.arange(128.0).view(2, 64)]
    with private(["inproc"] * 4, field=field) as llm:
        for x_TD in inputs:
            numbers = iter(range(3))
            linear(llm, layer_groups(llm.config, 0).qkv, x_TD)
    p = FIELDS[field].p
    assert watched.seeds[:3] == watched.seeds[3:]
    total_TD = np.zeros((2, 64), np.int64)
    for seed in watched.seeds[:3]:
        share_TD = np.empty((2, 64), np.int32)
        expand(seed, share_TD.reshape(-1), FIELDS[field])
        total_TD += share_TD
    for x_TD, rest_TD in zip(inputs, watched.residues, strict=True):
        xq_TD = (total_TD + rest_TD) % p
        xq_TD = np.where(xq_TD > p // 2, xq_TD - p, xq_TD)
        scale_T1 = np.abs(xq_TD).max(1, keepdims=True) / x_TD.numpy().max(1, keepdims=True)
        assert (np.abs(xq_TD).max(1) > 1000).all()
        np.testing.assert_allclose(xq_TD, x_TD.double().numpy() * scale_T1, atol=1)


def test_an_activation_that_is_no_number_leaves_nothing_behind(workers: Workers) -> None:
    x_TD = torch.ones(200, 64)
    x_TD[150, 3] = float("nan")  # when the first block of rows is out
    with private(workers.ipc) as llm:
        for _ in range(40):  # more than the mailbox or the segment have room for
            with pytest.raises(NumericalError, match="input of group qkv of layer 1"):
                linear(llm, layer_groups(llm.config, 1).qkv, x_TD)
        assert tokens(llm, [[1, 2, 3]])
        assert all(not channel._calls for channel in llm._channels)  # type: ignore[attr-defined]


def test_a_worker_s_failure_leaves_nothing_behind(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Worker.run
    failing = threading.Event()

    def fails(worker: Worker, operation: Operation, *tensors: Any) -> None:
        if failing.is_set() and isinstance(operation, SeedProduct):
            raise RuntimeError("no")
        run(worker, operation, *tensors)

    monkeypatch.setattr(Worker, "run", fails)
    with private(workers.ipc) as llm:
        right = tokens(llm, [[1, 2, 3]])
        failing.set()
        for _ in range(40):
            with pytest.raises(RemoteError, match=f"The worker at {workers.ipc[0]} failed"):
                linear(llm, layer_groups(llm.config, 1).qkv, torch.ones(200, 64))
        failing.clear()
        assert tokens(llm, [[1, 2, 3]]) == right
        assert all(not channel._calls for channel in llm._channels)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "lost", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)]
)
def test_a_worker_that_does_not_answer_is_named(
    lost: int, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = threading.Event()
    serve = Server._call

    def hesitates(server: Server, *call: Any) -> None:
        if silent.is_set() and server.address == workers.ipc[lost]:
            return
        serve(server, *call)

    monkeypatch.setattr(Server, "_call", hesitates)
    with private(workers.ipc, timeout=0.5) as llm:
        linear(llm, layer_groups(llm.config, 0).qkv, torch.ones(2, 64))
        silent.set()
        says = f"^The worker at {workers.ipc[lost]} (stopped answering|sent probes instead)"
        for _ in range(2):  # the second call begins new sessions, and finds it as silent
            with pytest.raises(WorkerLost, match=says):
                tokens(llm)
        silent.clear()
        tokens(llm)


def test_statistics_are_those_of_all_workers(workers: Workers) -> None:
    with ExitStack() as stack:
        two = stack.enter_context(private(workers.ipc[:2]))
        mixed = stack.enter_context(private(["inproc", workers.ipc[0], workers.ipc[1]]))
        for llm in (two, mixed):
            linear(llm, layer_groups(llm.config, 0).qkv, torch.ones(10, 64))
        features = 128
        assert two.rpc.calls == {"seed_product": 1, "product": 1}
        assert two.rpc.sent_bytes == 10 * 4 * 64
        assert two.rpc.received_bytes == 2 * 10 * 4 * features
        assert set(two.rpc.compute_s) == {"seed_product", "product"}
        assert two.rpc.socket_bytes == sum(c.counters.socket_bytes for c in two._channels) > 0
        assert mixed.rpc.calls == {"seed_product": 2, "product": 1}
        assert (two.transport, mixed.transport) == (SHARED, f"inproc, {SHARED}")
        assert "runs inside this process, " in mixed.transport_reason
        assert mixed.transport_reason.count("bytes of sealed memory") == 1


def worker_of_integers() -> Worker:
    checkpoint = open_checkpoint(MODEL)
    try:
        return Worker(None, load_integers(checkpoint, CpuBackend()))
    finally:
        checkpoint.close()


@pytest.mark.parametrize(
    ("operation", "inputs", "features", "words"),
    [
        (SeedProduct(0, "qkv", "wide", 3, bytes(32)), [], 128, None),
        (SeedProduct(0, "qkv", "wide", 3, bytes(32)), [], 127, "takes no tensor and gives"),
        (SeedProduct(0, "qkv", "wide", 3, bytes(32)), [64], 128, r"not uint8\[3, 256\] and"),
        (SeedProduct(0, "qkv", "wide", MAX_ROWS + 1, bytes(32)), [], 128, "1 to 1048576 rows"),
        (SeedProduct(9, "qkv", "wide", 3, bytes(32)), [], 128, "no group 'qkv' in layer 9"),
        (Product(0, "qkv", "wide"), [], 128, "1 to 1048576 rows"),
    ],
)
def test_a_worker_checks_a_call_with_a_seed_like_any_other(
    operation: SeedProduct, inputs: list[int], features: int, words: str | None
) -> None:
    rows = getattr(operation, "rows", 3)
    given = [Spec((rows, 4 * width), torch.uint8) for width in inputs]
    wanted = [Spec((rows, 4 * features), torch.uint8)]
    worker = worker_of_integers()
    if words is None:
        worker.check(operation, given, wanted)
        return
    with pytest.raises(ProtocolError, match=words) as caught:
        worker.check(operation, given, wanted)
    assert "x00" not in str(caught.value)  # no seed, which is secret from others


def test_a_seed_stands_for_a_bounded_number_of_residues(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = worker_of_integers()
    monkeypatch.setattr("tsqp.wire.call_limit.MAX_RESIDUES", (64 + 128) * 100)
    for rows, fits in ((100, True), (101, False)):
        operation = SeedProduct(0, "qkv", "wide", rows, bytes(32))
        answer = [Spec((rows, 4 * 128), torch.uint8)]
        if fits:
            worker.check(operation, [], answer)
        else:
            with pytest.raises(ProtocolError, match="19392 residues, but at most 19200"):
                worker.check(operation, [], answer)
