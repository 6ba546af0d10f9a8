"""Every product on every device: integers exact to the last bit, floats within their rounding."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from tsqp import LLM, SamplingParams
from tsqp.algebra import residue_bytes
from tsqp.algebra.params import FIELDS, Field
from tsqp.checkpoint.checkpoint import Checkpoint, open_checkpoint
from tsqp.gpu.backends import cuda_product
from tsqp.gpu.backends.backend import Backend
from tsqp.gpu.backends.cpu import CpuBackend
from tsqp.gpu.worker import Worker
from tsqp.gpu.worker_weights import load_integers, load_weights
from tsqp.model.config import layer_groups
from tsqp.runtime.local_worker import LocalWorker
from tsqp.wire.messages import Embed, Linear, Product, SeedProduct

BOTH = pytest.mark.parametrize("field", FIELDS.values(), ids=list(FIELDS))
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
PROMPTS = [[3, 141, 59], list(range(1, 90))]


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[Checkpoint]:
    checkpoint = open_checkpoint("random:tiny")
    yield checkpoint
    checkpoint.close()


def edges(field: Field, rows: int, width: int) -> Tensor:
    """Residues where digits change sign or overflow, and random ones between."""
    special = [0, 1, field.p - 1, field.half, field.half + 1, field.largest_digits]
    special += [field.largest_digits + 1, 127, 128, 255, 256, 2**23 - 1, 2**16]
    c_TD = torch.randint(0, field.p, (rows, width), generator=torch.Generator().manual_seed(rows))
    c_TD.view(-1)[: len(special)] = torch.tensor(special)[: c_TD.numel()] % field.p
    c_TD[-1] = field.largest_digits  # all digits at their largest
    return c_TD.to(torch.int32) if field.bits < 32 else c_TD


@BOTH
@pytest.mark.parametrize("in_bfloat16", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 64, 48), (3, 64, 8), (67, 576, 80), (5, 61, 7), (33, 8, 9), (2, 2100, 8)]
)
def test_products_of_residues_are_those_of_big_integers(
    field: Field, shape: tuple[int, int, int], in_bfloat16: bool, device: torch.device
) -> None:
    rows, width, features = shape
    generator = torch.Generator().manual_seed(width)
    weight_FD = torch.randint(-127, 128, (features, width), generator=generator)
    weight_FD[0], weight_FD[-1] = 127, -127
    c_TD = edges(field, rows, width)
    exact = (c_TD.numpy().astype(object) @ weight_FD.numpy().astype(object).T) % field.p
    c_TB = torch.empty(rows, field.residue_bytes * width, dtype=torch.uint8)
    residue_bytes.pack(c_TD.numpy(), field, c_TB.numpy())
    z_TB = torch.empty(rows, field.residue_bytes * features, dtype=torch.uint8, device=device)
    there_FD = weight_FD.to(device, torch.int8)
    cuda_product.packed_product(c_TB.to(device), there_FD, field, z_TB, in_bfloat16=in_bfloat16)
    found = np.empty(exact.shape, field.dtype)
    residue_bytes.unpack(z_TB.cpu().numpy(), field, found)
    assert np.array_equal(found.astype(object), exact)


@BOTH
def test_a_worker_with_any_backend_answers_as_one_on_a_cpu(
    field: Field, backend: Backend, checkpoint: Checkpoint
) -> None:
    here = Worker(None, load_integers(checkpoint, CpuBackend()))
    there = Worker(None, load_integers(checkpoint, backend))
    for group in ("qkv", "down"):
        features, width = here._integer_weight(0, group).shape
        c_TB = torch.empty(5, field.residue_bytes * width, dtype=torch.uint8)
        residue_bytes.pack(edges(field, 5, width).numpy(), field, c_TB.numpy())
        for operation, inputs in (
            (Product(0, group, field.name), [c_TB]),
            (SeedProduct(0, group, field.name, 5, bytes(range(32))), []),
        ):
            answers = []
            for worker in (here, there):
                z_TB = torch.empty(5, field.residue_bytes * features, dtype=torch.uint8)
                worker.run(operation, inputs, [z_TB])
                answers.append(z_TB)
            assert torch.equal(*answers)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_open_with_any_backend_is_the_product_in_float64(
    dtype: torch.dtype, backend: Backend, checkpoint: Checkpoint
) -> None:
    weights = load_weights(checkpoint, dtype, backend)
    worker = Worker(weights)
    weight_FD = weights.linear_FD[layer_groups(checkpoint.config, 0).qkv].cpu().double()
    x_TD = torch.randn(9, weight_FD.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    y_TF = torch.empty(9, len(weight_FD), dtype=dtype)
    worker.run(Linear(0, "qkv"), [x_TD], [y_TF])
    expected_TF = x_TD.double() @ weight_FD.t()
    assert _off(y_TF, expected_TF) < TOLERANCE[dtype]
    table_VD = weights.embedding_VD.cpu()
    rows_TD = torch.empty(2, table_VD.shape[1], dtype=dtype)
    worker.run(Embed(), [torch.tensor([7, 0])], [rows_TD])
    assert torch.equal(rows_TD, table_VD[[7, 0]])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_attention_with_any_backend_is_that_in_float64(
    dtype: torch.dtype, backend: Backend
) -> None:
    heads, kv_heads, features, sizes = 6, 2, 8, ((1, 9), (4, 4))  # rows and tokens of sequences
    generator = torch.Generator().manual_seed(2)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    weight_FD = numbers(16, heads * features)
    weights, values, expected = [], [], []
    for rows, tokens in sizes:
        q_THK, k_JSK, v_JSK = (
            numbers(rows, heads, features),
            numbers(kv_heads, tokens, features),
            numbers(kv_heads, tokens, features),
        )
        k_HSK, v_HSK = (x.double().repeat_interleave(heads // kv_heads, 0) for x in (k_JSK, v_JSK))
        scores_HTS = torch.empty(heads, rows, tokens, dtype=dtype)
        backend.attention_scores(q_THK, k_JSK.to(backend.device), scores_HTS)
        exact_HTS = torch.einsum("thk,hsk->hts", q_THK.double(), k_HSK)
        assert _off(scores_HTS, exact_HTS) < TOLERANCE[dtype]
        weights.append(numbers(heads, rows, tokens))
        values.append(v_JSK.to(backend.device))
        y_THK = torch.einsum("hts,hsk->thk", weights[-1].double(), v_HSK)
        expected.append(y_THK.flatten(1) @ weight_FD.double().t())
    out_TF = torch.empty(sum(rows for rows, _ in sizes), 16, dtype=dtype)
    backend.weighted_values(weights, values, weight_FD.to(backend.device), out_TF)
    assert _off(out_TF, torch.cat(expected)) < 2 * TOLERANCE[dtype]


def _off(found: Tensor, exact: Tensor) -> float:
    """The largest error, in parts of the largest number."""
    return float((found.double() - exact).abs().max() / exact.abs().max())


def test_a_worker_process_on_any_device_gives_the_tokens_of_the_reference(
    device: torch.device,
) -> None:
    params = SamplingParams(temperature=0, max_tokens=8)
    worker = LocalWorker(["random:tiny", "--device", str(device)])
    try:
        worker.await_ready()
        for field in FIELDS:
            with LLM("random:tiny", privacy="tee", fixed_point=True, field=field) as llm:
                expected = [each.token_ids for each in llm.generate(PROMPTS, params)]
            with LLM("random:tiny", worker=worker.endpoint, field=field, pad_memory=0) as llm:
                assert [each.token_ids for each in llm.generate(PROMPTS, params)] == expected
    finally:
        worker.close()
