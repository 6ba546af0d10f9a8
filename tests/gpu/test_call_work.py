"""The most work of one call, as a worker counts it."""

from collections.abc import Callable, Iterator

import pytest
import torch

from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.errors import ProtocolError
from tsqp.gpu.backends.cpu import CpuBackend
from tsqp.gpu.worker import Worker, WorkerSession
from tsqp.gpu.worker_weights import load_integers, load_weights
from tsqp.wire.call_limit import CALL_MACS
from tsqp.wire.messages import (
    Allocate,
    AttentionScores,
    Hello,
    Layer,
    Linear,
    Operation,
    Product,
    SeedProduct,
    Span,
    Weighted,
    WeightedValues,
)
from tsqp.wire.tensors import Spec

HIDDEN, INNER, HEADS, KV_HEADS, HEAD, CONTEXT = 64, 128, 4, 2, 16, 512
CPU = CpuBackend()
QKV = (HEADS + 2 * KV_HEADS) * HEAD
LAYER_MACS = HIDDEN * QKV + HIDDEN * HIDDEN + 3 * HIDDEN * INNER
DEAREST_ROW = LAYER_MACS + 2 * HEADS * HEAD * CONTEXT
LIMIT = 100_000

Call = tuple[Operation, list[Spec], list[Spec]]


def floats(*shape: int) -> Spec:
    return Spec(shape, torch.float32)


def residues(rows: int, numbers: int) -> Spec:
    return Spec((rows, 4 * numbers), torch.uint8)


def linear(rows: int) -> Call:
    return Linear(0, "qkv"), [floats(rows, HIDDEN)], [floats(rows, QKV)]


def product(rows: int) -> Call:
    return Product(0, "qkv", "wide"), [residues(rows, HIDDEN)], [residues(rows, QKV)]


def seed_product(rows: int) -> Call:
    return SeedProduct(0, "qkv", "wide", rows, bytes(32)), [], [residues(rows, QKV)]


def layer(rows: int) -> Call:
    return Layer(0, (Span(0, 0, rows),)), [floats(rows, HIDDEN)], [floats(rows, HIDDEN)]


def attention_scores(rows: int) -> Call:
    kv = floats(rows, KV_HEADS, HEAD)
    spans = (Span(0, 0, rows),)
    return (
        AttentionScores(0, spans),
        [floats(rows, HEADS, HEAD), kv, kv],
        [floats(HEADS * rows * rows)],
    )


def weighted_values(rows: int) -> Call:
    weighted = (Weighted(1, rows, 10),)
    return WeightedValues(0, weighted), [floats(HEADS * rows * 10)], [floats(rows, HIDDEN)]


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    checkpoint = open_checkpoint("random:tiny")
    weights, integers = load_weights(checkpoint, torch.float32, CPU), load_integers(checkpoint, CPU)
    checkpoint.close()
    yield Worker(weights, integers, LIMIT)


@pytest.fixture(scope="module")
def session(worker: Worker) -> Iterator[WorkerSession]:
    """With room for sequence 0, and 10 tokens of sequence 1 in the first layer."""
    session = worker.open()
    for number in (0, 1):
        session.run(Allocate(number, CONTEXT), [], [])
    _, *specs = attention_scores(10)
    tensors = [[torch.zeros(spec.shape, dtype=spec.dtype) for spec in some] for some in specs]
    session.run(AttentionScores(0, (Span(1, 0, 10),)), *tensors)
    yield session
    session.close()


@pytest.mark.parametrize(
    ("call", "macs"),
    [
        (linear, lambda rows: rows * HIDDEN * QKV),
        (product, lambda rows: rows * HIDDEN * QKV),
        (seed_product, lambda rows: rows * HIDDEN * QKV),
        (layer, lambda rows: rows * LAYER_MACS + 2 * rows * rows * HEADS * HEAD),
        (attention_scores, lambda rows: rows * rows * HEADS * HEAD),
        (weighted_values, lambda rows: rows * 10 * HEADS * HEAD + rows * HIDDEN * HIDDEN),
    ],
)
def test_a_call_with_more_work_than_one_may_have_is_refused(
    call: Callable[[int], Call], macs: Callable[[int], int], session: WorkerSession
) -> None:
    most = max(rows for rows in range(1, CONTEXT) if macs(rows) <= LIMIT)
    session.check(*call(most))
    with pytest.raises(ProtocolError, match=f"asks for {macs(most + 1)} multiply-accumulates"):
        session.check(*call(most + 1))


@pytest.mark.parametrize("call", [product, seed_product])
def test_a_call_with_more_residues_than_one_may_have_is_refused(
    call: Callable[[int], Call], session: WorkerSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsqp.wire.call_limit.MAX_RESIDUES", 5 * (HIDDEN + QKV))
    session.check(*call(5))
    with pytest.raises(ProtocolError, match=f"{6 * (HIDDEN + QKV)} residues"):
        session.check(*call(6))


@pytest.mark.parametrize(
    ("usual", "announced"), [(2**33, 2**33), (1, DEAREST_ROW)], ids=["usual", "one row"]
)
def test_a_worker_announces_its_limit_which_the_dearest_row_fits(
    usual: int, announced: int, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CALL_MACS, "cpu", usual)
    for dtype in ("float32", "int8"):
        found = Worker(worker._weights, worker._integers).welcome(
            Hello(bytes(32), "0" * 64, dtype, (), 0)  # type: ignore[arg-type]
        )
        assert found.max_call_macs == announced
