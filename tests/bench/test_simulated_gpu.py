"""The times of a simulated GPU follow their formula, and a wait is never too short."""

import time

import pytest

from tsqp.algebra.params import COMPACT, LATTICE, WIDE, Field
from tsqp.bench.gpu_prediction import alone, device_times
from tsqp.bench.simulated_gpu import GPUS, SPIN_S, Gpu, find_gpu, wait_until
from tsqp.checkpoint.random_weights import GEOMETRIES
from tsqp.errors import UsageError
from tsqp.model.config import linear_groups, output_projection

GPU = Gpu("a slow one", 1e9, 1e3, 1e6, 1e5, 1e2, call_s=0.25, efficiency=0.5)
TINY = GEOMETRIES["tiny"]


@pytest.mark.parametrize(("field", "digits"), [(WIDE, 4), (COMPACT, 3), (LATTICE, 6)])
def test_many_rows_take_the_time_of_their_products_and_of_the_link(
    field: Field, digits: int
) -> None:
    found = GPU.product_s(1000, 20, 30, 400, field)
    assert found == pytest.approx(0.25 + (digits * 2 * 1000 * 20 * 30 / 1e6 + 400 / 1e2) / 0.5)


def test_one_row_takes_the_time_to_read_the_weights() -> None:
    assert GPU.product_s(1, 20, 30, 0, WIDE) == pytest.approx(0.25 + 20 * 30 / 1e3 / 0.5)
    assert GPU.product_s(1, 20, 30, 0, None) == pytest.approx(0.25 + 2 * 20 * 30 / 1e3 / 0.5)
    assert GPU.product_s(9999, 20, 30, 0, None) == pytest.approx(
        0.25 + 2 * 9999 * 20 * 30 / 1e5 / 0.5
    )


def test_a_token_takes_one_call_for_each_group_and_a_prompt_one_for_each_block() -> None:
    layers = [group for group in linear_groups(TINY) if group != output_projection(TINY)]
    head = output_projection(TINY)

    def call_s(rows: int, shape: tuple[int, int]) -> float:
        return GPU.product_s(rows, *shape, 4 * rows * sum(shape), WIDE)

    found = device_times(GPU, TINY, WIDE, 600, 512, 4)
    assert found.decode_s == pytest.approx(sum(call_s(1, g.shape) for g in [*layers, head]))
    blocks = [128, 128, 128, 128, 88]  # of chunks of 512 and 88 tokens
    prefill_s = sum(call_s(rows, group.shape) for rows in blocks for group in layers)
    assert found.prefill_s == pytest.approx(prefill_s + call_s(1, head.shape))


def test_open_also_asks_for_embeddings_and_a_gpu_alone_has_no_calls() -> None:
    found = device_times(GPU, TINY, None, 512, 512, 2)
    embedding_s = 0.25 + (8 + 2 * 64) / 1e2 / 0.5
    shapes = [group.shape for group in linear_groups(TINY)]
    calls_s = sum(GPU.product_s(1, *shape, 2 * sum(shape), None) for shape in shapes)
    assert found.decode_s == pytest.approx(embedding_s + calls_s)
    weights = sum(features * width for features, width in shapes)
    assert alone(GPU, TINY, 512).decode_s == pytest.approx(2 * weights / 1e3 / 0.5)


@pytest.mark.parametrize("seconds", [-1.0, 0.0, SPIN_S / 2, 3 * SPIN_S])
def test_a_wait_is_never_too_short(seconds: float) -> None:
    moment = time.perf_counter() + seconds
    wait_until(moment)
    assert time.perf_counter() >= moment


def test_a_gpu_without_figures_is_refused_with_the_choices() -> None:
    with pytest.raises(UsageError, match="choose h100-pcie, h100-sxm, h200-sxm"):
        find_gpu("h300")
    assert find_gpu("h100-sxm") is GPUS["h100-sxm"]
