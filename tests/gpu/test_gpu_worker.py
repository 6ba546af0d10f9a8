"""What a worker computes, against plain torch on the checkpoint's own tensors."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from tsqp.checkpoint.checkpoint import Checkpoint, open_checkpoint
from tsqp.checkpoint.weights_digest import weights_digest
from tsqp.errors import OutOfMemory, ProtocolError
from tsqp.gpu.backends.cpu import CpuBackend
from tsqp.gpu.backends.cuda import CudaBackend
from tsqp.gpu.worker import MAX_ROWS, Worker
from tsqp.gpu.worker_weights import load_weights
from tsqp.model.config import output_projection
from tsqp.model.linear_group import LayerGroups
from tsqp.wire.messages import Embed, Hello, Linear, Operation
from tsqp.wire.tensors import Spec

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD, VOCABULARY = 2, 64, 128, 4, 2, 16, 512
CPU = CpuBackend()
QKV = (HEADS + 2 * KV_HEADS) * HEAD

# The tensors of each group and their shapes, written down once more.
ATTENTION = "model.layers.{}.self_attn."
MLP = "model.layers.{}.mlp."
GROUPS = {
    "qkv": [
        (ATTENTION + "q_proj.weight", (HEADS * HEAD, HIDDEN)),
        (ATTENTION + "k_proj.weight", (KV_HEADS * HEAD, HIDDEN)),
        (ATTENTION + "v_proj.weight", (KV_HEADS * HEAD, HIDDEN)),
    ],
    "o": [(ATTENTION + "o_proj.weight", (HIDDEN, HEADS * HEAD))],
    "gate_up": [
        (MLP + "gate_proj.weight", (INNER, HIDDEN)),
        (MLP + "up_proj.weight", (INNER, HIDDEN)),
    ],
    "down": [(MLP + "down_proj.weight", (HIDDEN, INNER))],
    "lm_head": [("lm_head.weight", (VOCABULARY, HIDDEN))],
}
PLACES = [(layer, group) for layer in range(LAYERS) for group in LayerGroups._fields] + [
    (-1, "lm_head")
]


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[Checkpoint]:
    checkpoint = open_checkpoint("random:tiny")
    yield checkpoint
    checkpoint.close()


@pytest.fixture(scope="module")
def worker(checkpoint: Checkpoint) -> Worker:
    return Worker(load_weights(checkpoint, torch.float32, CPU))


def answer(worker: Worker, operation: Operation, x: Tensor, features: int) -> Tensor:
    """What the worker makes of `x`, checked first, in an output full of something else."""
    y_TF = torch.full((len(x), features), torch.nan, dtype=torch.float32)
    specs = [Spec(tuple(tensor.shape), tensor.dtype) for tensor in (x, y_TF)]
    worker.check(operation, specs[:1], specs[1:])
    worker.run(operation, [x], [y_TF])
    return y_TF


@pytest.mark.parametrize(("layer", "group"), PLACES)
def test_a_linear_group_is_the_product_with_its_weights(
    worker: Worker, checkpoint: Checkpoint, layer: int, group: str
) -> None:
    tensors = [checkpoint.read(name.format(layer), shape) for name, shape in GROUPS[group]]
    weight_FD = torch.cat(tensors).double()
    generator = torch.Generator().manual_seed(layer)
    x_TD = torch.randn(7, weight_FD.shape[1], generator=generator)
    y_TF = answer(worker, Linear(layer, group), x_TD, len(weight_FD))
    torch.testing.assert_close(y_TF, (x_TD.double() @ weight_FD.T).float())


def test_the_embedding_gives_rows_of_the_table(worker: Worker, checkpoint: Checkpoint) -> None:
    table_VD = checkpoint.read("model.embed_tokens.weight", (VOCABULARY, HIDDEN))
    ids = [0, VOCABULARY - 1, 3, 3]
    rows = answer(worker, Embed(), torch.tensor(ids), HIDDEN)
    assert torch.equal(rows, torch.stack([table_VD[i] for i in ids]))


@pytest.mark.parametrize("wrong", [-1, VOCABULARY, 2**63 - 1, -(2**63)])
def test_a_token_outside_the_vocabulary_is_refused_and_not_named(
    worker: Worker, wrong: int
) -> None:
    with pytest.raises(ProtocolError, match="outside the vocabulary") as caught:
        answer(worker, Embed(), torch.tensor([1, wrong]), HIDDEN)
    assert str(wrong) not in str(caught.value)


def float32(*shape: int) -> Spec:
    return Spec(shape, torch.float32)


X, Y = float32(3, HIDDEN), float32(3, QKV)
GOOD = Linear(0, "qkv")


def test_the_shapes_that_the_refusals_vary_are_good(worker: Worker) -> None:
    worker.check(GOOD, [X], [Y])
    worker.check(Embed(), [Spec((3,), torch.int64)], [X])
    worker.check(Embed(), [Spec((MAX_ROWS,), torch.int64)], [float32(MAX_ROWS, HIDDEN)])


@pytest.mark.parametrize(
    ("operation", "inputs", "outputs"),
    [
        (GOOD, [], [Y]),
        (GOOD, [X, X], [Y]),
        (GOOD, [X], []),
        (GOOD, [X], [Y, Y]),
        (GOOD, [float32(3, HIDDEN + 1)], [Y]),
        (GOOD, [float32(HIDDEN)], [Y]),
        (GOOD, [float32(1, 3, HIDDEN)], [Y]),
        (GOOD, [X], [float32(4, QKV)]),
        (GOOD, [X], [float32(3, QKV - 1)]),
        (GOOD, [X], [float32(QKV, 3)]),
        (GOOD, [Spec((3, HIDDEN), torch.bfloat16)], [Y]),
        (GOOD, [X], [Spec((3, QKV), torch.bfloat16)]),
        (GOOD, [Spec((3, HIDDEN), torch.int64)], [Y]),
        (Linear(LAYERS, "qkv"), [X], [Y]),
        (Linear(-1, "qkv"), [X], [Y]),
        (Linear(0, "lm_head"), [X], [float32(3, VOCABULARY)]),
        (Linear(0, "__class__"), [X], [Y]),
        (Embed(), [Spec((MAX_ROWS + 1,), torch.int64)], [float32(MAX_ROWS + 1, HIDDEN)]),
        (Embed(), [Spec((3,), torch.float32)], [X]),
        (Embed(), [Spec((3, 1), torch.int64)], [X]),
        (Embed(), [Spec((3,), torch.int64)], [float32(3, HIDDEN + 1)]),
        (Embed(), [Spec((3,), torch.int64)], [float32(2, HIDDEN)]),
    ],
)
def test_other_shapes_are_refused(
    worker: Worker, operation: Operation, inputs: Sequence[Spec], outputs: Sequence[Spec]
) -> None:
    with pytest.raises(ProtocolError):
        worker.check(operation, inputs, outputs)


def test_a_worker_says_what_it_serves(worker: Worker, checkpoint: Checkpoint) -> None:
    welcome = worker.welcome(Hello(b"n" * 32, "0" * 64, "float16", (), 0))
    assert welcome.nonce == b"n" * 32
    assert welcome.weights_digest == weights_digest(checkpoint, torch.float32)
    assert (welcome.dtype, welcome.device, welcome.segment) == ("float32", "cpu", None)
    assert set(welcome.abilities) == {"linear", "embedding", "attention", "layer"}


def test_weights_in_bfloat16_are_rounded_once(checkpoint: Checkpoint) -> None:
    weights = load_weights(checkpoint, torch.bfloat16, CPU)
    exact = checkpoint.read("lm_head.weight", (VOCABULARY, HIDDEN))
    assert torch.equal(weights.linear_FD[output_projection(checkpoint.config)], exact.bfloat16())
    assert weights.digest == weights_digest(checkpoint, torch.bfloat16)


def test_loading_reports_the_bytes_that_it_has(checkpoint: Checkpoint) -> None:
    reports: list[tuple[int, int]] = []
    load_weights(checkpoint, torch.float32, CPU, lambda *report: reports.append(report))
    layer = 4 * (QKV * HIDDEN + HEADS * HEAD * HIDDEN + 3 * INNER * HIDDEN)
    table = 4 * VOCABULARY * HIDDEN
    total = LAYERS * layer + 2 * table
    assert reports[:2] == [(0, total), (table, total)]
    assert reports[5] == (table + layer, total)
    assert reports[-1] == (total, total)


def test_a_device_that_is_too_small_is_refused_with_both_figures(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every tensor of the tiny model but its norms.
    layer = QKV * HIDDEN + HEADS * HEAD * HIDDEN + 3 * INNER * HIDDEN
    required = 4 * (LAYERS * layer + 2 * VOCABULARY * HIDDEN)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (required - 1, 2**40))
    with pytest.raises(OutOfMemory, match=f"{required} bytes, and {required - 1} bytes are free"):
        load_weights(checkpoint, torch.float32, CudaBackend(torch.device("cuda")))
