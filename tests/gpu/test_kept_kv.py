"""What a worker keeps for a client, and what it refuses to: against float64, and against liars."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from tsqp.checkpoint.checkpoint import Checkpoint, open_checkpoint
from tsqp.errors import OutOfMemory, ProtocolError
from tsqp.gpu.backends.cpu import CpuBackend
from tsqp.gpu.client_session import MAX_SEQUENCES
from tsqp.gpu.worker import Worker, WorkerSession
from tsqp.gpu.worker_weights import load_integers, load_weights
from tsqp.wire.messages import (
    Allocate,
    AttentionScores,
    Free,
    Layer,
    Linear,
    Operation,
    Span,
    Truncate,
    Weighted,
    WeightedValues,
)
from tsqp.wire.tensors import Spec

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD = 2, 64, 4, 2, 16
CONTEXT = 512
CPU = CpuBackend()


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[Checkpoint]:
    checkpoint = open_checkpoint("random:tiny")
    yield checkpoint
    checkpoint.close()


@pytest.fixture(scope="module")
def worker(checkpoint: Checkpoint) -> Worker:
    return Worker(load_weights(checkpoint, torch.float32, CPU))


@pytest.fixture
def session(worker: Worker) -> Iterator[WorkerSession]:
    session = worker.open()
    yield session
    session.close()


def ask(
    session: WorkerSession, operation: Operation, *inputs: Tensor, answer: Sequence[int] = ()
) -> Tensor:
    """Check and run one call; its output begins full of something else."""
    out = torch.full(tuple(answer), torch.nan)
    outputs = [out] if answer else []
    specs = [[Spec(tuple(x.shape), x.dtype) for x in some] for some in (inputs, outputs)]
    session.check(operation, *specs)
    session.run(operation, inputs, outputs)
    return out


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def qkv(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    q_THK = random(seed, tokens, HEADS, HEAD)
    k_TJK, v_TJK = random(seed + 100, 2, tokens, KV_HEADS, HEAD)
    return q_THK, k_TJK, v_TJK


def test_scores_and_values_are_the_products_over_all_kept_tokens(
    session: WorkerSession, checkpoint: Checkpoint
) -> None:
    ask(session, Allocate(5, 9))
    ask(session, Allocate(2, 3))
    first, second, other = qkv(4, 1), qkv(2, 2), qkv(3, 3)
    ask(session, AttentionScores(1, (Span(5, 0, 4),)), *first, answer=[HEADS * 16])
    both = [torch.cat(pair) for pair in zip(second, other, strict=True)]
    spans = (Span(5, 4, 2), Span(2, 0, 3))
    scores_N = ask(session, AttentionScores(1, spans), *both, answer=[HEADS * (2 * 6 + 3 * 3)])
    k_SJK = torch.cat((first[1], second[1]))
    expected = torch.cat([products(second[0], k_SJK), products(other[0], other[1])])
    torch.testing.assert_close(scores_N, expected)

    weights_N = random(4, HEADS * (1 * 5 + 3 * 3))
    weighted = (Weighted(5, 1, 5), Weighted(2, 3, 3))
    o_TD = ask(session, WeightedValues(1, weighted), weights_N, answer=[4, HIDDEN])
    v_SJK = torch.cat((first[2], second[2]))[:5]
    y_TD = torch.cat(
        [sums(weights_N[: HEADS * 5], 1, v_SJK), sums(weights_N[HEADS * 5 :], 3, other[2])]
    )
    o_FD = checkpoint.read("model.layers.1.self_attn.o_proj.weight", (HIDDEN, HEADS * HEAD))
    torch.testing.assert_close(o_TD, (y_TD @ o_FD.double().t()).float())


def products(q_THK: Tensor, k_SJK: Tensor) -> Tensor:
    """Every query head with the keys of its group, flat."""
    k_SHK = k_SJK.double().repeat_interleave(HEADS // KV_HEADS, 1)
    return torch.einsum("thk,shk->hts", q_THK.double(), k_SHK).float().flatten()


def sums(weights_N: Tensor, rows: int, v_SJK: Tensor) -> Tensor:
    v_SHK = v_SJK.double().repeat_interleave(HEADS // KV_HEADS, 1)
    weights_HTS = weights_N.double().view(HEADS, rows, -1)
    return torch.einsum("hts,shk->thk", weights_HTS, v_SHK).flatten(1)


def spec(*shape: int, dtype: torch.dtype = torch.float32) -> Spec:
    return Spec(shape, dtype)


def specs(tokens: int, scores: int) -> tuple[list[Spec], list[Spec]]:
    kv = spec(tokens, KV_HEADS, HEAD)
    return [spec(tokens, HEADS, HEAD), kv, kv], [spec(scores)]


@pytest.fixture
def kept(session: WorkerSession) -> WorkerSession:
    """A session with sequence 0, which has room for 8 tokens and holds 5 in layer 0."""
    ask(session, Allocate(0, 8))
    ask(session, AttentionScores(0, (Span(0, 0, 5),)), *qkv(5), answer=[HEADS * 25])
    return session


GOOD = specs(2, HEADS * 2 * 7)
SCORES: dict[str, tuple[AttentionScores, tuple[list[Spec], list[Spec]], str]] = {
    "an unknown sequence": (AttentionScores(0, (Span(1, 0, 2),)), specs(2, HEADS * 4), "allocated"),
    "a gap": (AttentionScores(0, (Span(0, 6, 2),)), specs(2, HEADS * 16), "must follow"),
    "tokens again": (AttentionScores(0, (Span(0, 4, 2),)), specs(2, HEADS * 12), "must follow"),
    "the start in another layer": (AttentionScores(1, (Span(0, 5, 2),)), GOOD, "must follow"),
    "too many tokens": (AttentionScores(0, (Span(0, 5, 4),)), specs(4, HEADS * 36), "given room"),
    "too many in two spans": (
        AttentionScores(0, (Span(0, 5, 2), Span(0, 7, 2))),
        specs(4, HEADS * (14 + 18)),
        "given room",
    ),
    "a gap between two spans": (
        AttentionScores(0, (Span(0, 5, 1), Span(0, 7, 1))),
        specs(2, HEADS * (6 + 8)),
        "must follow",
    ),
    "no such layer": (AttentionScores(LAYERS, (Span(0, 0, 2),)), specs(2, HEADS * 4), "no layer 2"),
    "fewer queries": (
        AttentionScores(0, (Span(0, 5, 2),)),
        ([spec(1, HEADS, HEAD), *GOOD[0][1:]], GOOD[1]),
        "other shapes",
    ),
    "no values": (AttentionScores(0, (Span(0, 5, 2),)), (GOOD[0][:2], GOOD[1]), "other shapes"),
    "more scores": (AttentionScores(0, (Span(0, 5, 2),)), specs(2, HEADS * 15), "other shapes"),
    "another dtype": (
        AttentionScores(0, (Span(0, 5, 2),)),
        ([spec(2, HEADS, HEAD, dtype=torch.bfloat16), *GOOD[0][1:]], GOOD[1]),
        "other shapes",
    ),
    "no answer": (AttentionScores(0, (Span(0, 5, 2),)), (GOOD[0], []), "other shapes"),
}


@pytest.mark.parametrize("case", SCORES)
def test_scores_that_do_not_fit_what_is_kept_are_refused(case: str, kept: WorkerSession) -> None:
    operation, tensors, words = SCORES[case]
    with pytest.raises(ProtocolError, match=words):
        kept.check(operation, *tensors)
    kept.check(AttentionScores(0, (Span(0, 5, 2),)), *GOOD)


VALUES: dict[str, tuple[WeightedValues, list[Spec], list[Spec], str]] = {
    "an unknown sequence": (
        WeightedValues(0, (Weighted(1, 1, 1),)),
        [spec(HEADS)],
        [spec(1, HIDDEN)],
        "allocated",
    ),
    "more than is kept": (
        WeightedValues(0, (Weighted(0, 1, 6),)),
        [spec(HEADS * 6)],
        [spec(1, HIDDEN)],
        "more tokens than",
    ),
    "what another layer keeps": (
        WeightedValues(1, (Weighted(0, 1, 5),)),
        [spec(HEADS * 5)],
        [spec(1, HIDDEN)],
        "more tokens than",
    ),
    "no such layer": (
        WeightedValues(LAYERS, (Weighted(0, 1, 5),)),
        [spec(HEADS * 5)],
        [spec(1, HIDDEN)],
        "no layer 2",
    ),
    "fewer weights": (
        WeightedValues(0, (Weighted(0, 2, 5),)),
        [spec(HEADS * 5)],
        [spec(2, HIDDEN)],
        "other shapes",
    ),
    "more rows": (
        WeightedValues(0, (Weighted(0, 2, 5),)),
        [spec(HEADS * 10)],
        [spec(3, HIDDEN)],
        "other shapes",
    ),
}


@pytest.mark.parametrize("case", VALUES)
def test_weights_that_do_not_fit_what_is_kept_are_refused(case: str, kept: WorkerSession) -> None:
    operation, inputs, outputs, words = VALUES[case]
    with pytest.raises(ProtocolError, match=words):
        kept.check(operation, inputs, outputs)
    kept.check(WeightedValues(0, (Weighted(0, 2, 5),)), [spec(HEADS * 10)], [spec(2, HIDDEN)])


X = spec(2, HIDDEN)
LAYERS_REFUSED: dict[str, tuple[Layer, list[Spec], list[Spec], str]] = {
    "an unknown sequence": (Layer(0, (Span(1, 0, 2),)), [X], [X], "allocated"),
    "a gap": (Layer(0, (Span(0, 6, 2),)), [X], [X], "must follow"),
    "too many tokens": (
        Layer(0, (Span(0, 5, 4),)),
        [spec(4, HIDDEN)],
        [spec(4, HIDDEN)],
        "given room",
    ),
    "a known length before its end": (Layer(0, (Span(0, 5, 2, 6),)), [X], [X], "rotated"),
    "a known length beyond its room": (Layer(0, (Span(0, 5, 2, 9),)), [X], [X], "rotated"),
    "no such layer": (Layer(LAYERS, (Span(0, 0, 2),)), [X], [X], "no layer 2"),
    "more rows": (Layer(0, (Span(0, 5, 2),)), [spec(3, HIDDEN)], [X], "other shapes"),
    "fewer features": (Layer(0, (Span(0, 5, 2),)), [X], [spec(2, HIDDEN - 1)], "other shapes"),
    "no answer": (Layer(0, (Span(0, 5, 2),)), [X], [], "other shapes"),
}


@pytest.mark.parametrize("case", LAYERS_REFUSED)
def test_a_layer_that_does_not_fit_what_is_kept_is_refused(case: str, kept: WorkerSession) -> None:
    operation, inputs, outputs, words = LAYERS_REFUSED[case]
    with pytest.raises(ProtocolError, match=words):
        kept.check(operation, inputs, outputs)
    kept.check(Layer(0, (Span(0, 5, 2),)), [X], [X])


@pytest.mark.parametrize(
    ("operation", "words"),
    [
        (Allocate(0, 8), "the same sequence twice"),
        (Allocate(1, CONTEXT + 1), f"a context of {CONTEXT}"),
        (Truncate(1, 0), "has not allocated"),
        (Truncate(0, 1), "more tokens than it has"),  # layer 1 holds none
        (Free(1), "has not allocated"),
    ],
)
def test_other_calls_about_what_is_not_kept_are_refused(
    operation: Operation, words: str, kept: WorkerSession
) -> None:
    with pytest.raises(ProtocolError, match=words):
        kept.check(operation, [], [])


@pytest.mark.parametrize("operation", [Allocate(1, 8), Truncate(0, 0), Free(0)])
def test_calls_without_tensors_take_none(operation: Operation, kept: WorkerSession) -> None:
    kept.check(operation, [], [])
    for tensors in (([spec(1)], []), ([], [spec(1)])):
        with pytest.raises(ProtocolError, match="other shapes"):
            kept.check(operation, *tensors)


def test_a_client_may_keep_so_many_sequences_and_no_more(session: WorkerSession) -> None:
    for number in range(MAX_SEQUENCES):
        ask(session, Allocate(number, 1))
    with pytest.raises(ProtocolError, match=f"may keep {MAX_SEQUENCES} sequences"):
        session.check(Allocate(MAX_SEQUENCES, 1), [], [])
    ask(session, Free(3))
    ask(session, Allocate(MAX_SEQUENCES, 1))


def test_a_layer_of_more_tokens_than_there_is_memory_for_is_refused(
    session: WorkerSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsqp.gpu.client_session.MANY_TOKENS", 5)
    ask(session, Allocate(0, 20))
    ask(session, Layer(0, (Span(0, 0, 5),)), random(1, 5, HIDDEN), answer=[5, HIDDEN])
    monkeypatch.setattr("tsqp.checkpoint.weights.available_bytes", lambda: 10_000)
    with pytest.raises(OutOfMemory, match="A layer of this call would take"):
        ask(session, Layer(0, (Span(0, 5, 5),)), random(2, 5, HIDDEN), answer=[5, HIDDEN])
    ask(session, Layer(0, (Span(0, 5, 2),)), random(2, 2, HIDDEN), answer=[2, HIDDEN])


def test_a_session_takes_half_of_the_memory_for_keys_and_values_at_most(
    worker: Worker, session: WorkerSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = LAYERS * 2 * KV_HEADS * HEAD * 4  # bytes
    free = 200 * token
    monkeypatch.setattr(CpuBackend, "free_bytes", lambda self: free)
    ask(session, Allocate(0, 60))
    with pytest.raises(
        OutOfMemory, match=f"would take {101 * token} bytes.*may take {100 * token}"
    ):
        ask(session, Allocate(1, 41))
    ask(session, Allocate(1, 40))
    ask(session, Free(0))
    ask(session, Allocate(2, 60))
    other = worker.open()
    ask(other, Allocate(0, 100))
    other.close()


def test_what_a_session_has_filled_counts_as_memory_for_keys_and_values(
    session: WorkerSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = LAYERS * 2 * KV_HEADS * HEAD * 4
    ask(session, Allocate(0, 60))
    for layer in range(LAYERS):
        ask(session, AttentionScores(layer, (Span(0, 0, 60),)), *qkv(60), answer=[HEADS * 60 * 60])
    monkeypatch.setattr(CpuBackend, "free_bytes", lambda self: 140 * token)
    ask(session, Allocate(1, 40))
    with pytest.raises(OutOfMemory):
        ask(session, Allocate(2, 1))


def test_the_only_session_of_a_worker_may_take_all_memory(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = LAYERS * 2 * KV_HEADS * HEAD * 4
    session = Worker(worker._weights, kv_shares=1).open()
    monkeypatch.setattr(CpuBackend, "free_bytes", lambda self: 200 * token)
    ask(session, Allocate(0, 200))
    session.close()


def test_no_client_reaches_the_sequences_of_another(worker: Worker, kept: WorkerSession) -> None:
    other = worker.open()
    for operation in (
        Truncate(0, 0),
        Free(0),
        AttentionScores(0, (Span(0, 5, 2),)),
        Layer(0, (Span(0, 5, 2),)),
    ):
        with pytest.raises(ProtocolError, match="has not allocated"):
            other.check(operation, [], [])
    ask(other, Allocate(0, 8))
    other.close()
    ask(kept, AttentionScores(0, (Span(0, 5, 2),)), *qkv(2), answer=[HEADS * 14])


def test_a_worker_of_the_private_modes_keeps_nothing(checkpoint: Checkpoint) -> None:
    session = Worker(None, load_integers(checkpoint, CPU)).open()
    with pytest.raises(ProtocolError, match="serves private modes only"):
        session.check(Allocate(0, 1), [], [])
    with pytest.raises(ProtocolError, match="serves private modes only"):
        session.check(Linear(0, "qkv"), [spec(3, HIDDEN)], [spec(3, 128)])
    session.close()
