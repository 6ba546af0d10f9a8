"""The arithmetic of benchmarks, where no clock is involved."""

import time
from dataclasses import replace

import pytest

from tsqp.algebra.params import FIELDS
from tsqp.bench import gpu_check
from tsqp.bench.figures import Figure, ratios
from tsqp.bench.hardware_limits import DeviceLimits, HardwareLimits
from tsqp.bench.lower_bounds import lower_bound
from tsqp.bench.modes import MODES, Setting, stock_bytes
from tsqp.bench.timing import seconds
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.model.config import ModelConfig, linear_groups, tensor_shapes
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.crypto.pad_pool import PadPool
from tsqp.tee.crypto.pads import Pads

RATE_NAMES = ("matmul_flops", "int8_ops", "read_bytes_per_s", "copy_bytes_per_s")
SETTING = Setting("random:tiny", "float32", "wide", prompt_tokens=10, new_tokens=3, threads=1)
RATES = HardwareLimits(matmul_flops=1e3, int8_ops=1e4, read_bytes_per_s=1e2, copy_bytes_per_s=1e5)


@pytest.fixture(scope="module")
def tiny() -> ModelConfig:
    checkpoint = open_checkpoint("random:tiny")
    checkpoint.close()
    return checkpoint.config


def weights(config: ModelConfig) -> dict[str, int]:
    """Elements of every matrix that is multiplied with, by name."""
    shapes = tensor_shapes(config)
    return {
        name: shape[0] * shape[1]
        for name, shape in shapes.items()
        if len(shape) == 2 and "embed" not in name
    }


def test_ratios_are_taken_round_by_round() -> None:
    found = ratios({"pad": [2.0, 30.0, 4.0], "tee": [1.0, 10.0, 4.0]})
    assert found == {"pad/tee": Figure(median=2.0, least=1.0, most=3.0)}


def test_the_modes_of_a_fused_and_a_split_worker_have_ratios() -> None:
    modes = ("open", "open-gpu-attention", "open-fused", "transformers-worker", "tee")
    found = ratios({mode: [float(number)] for number, mode in enumerate(modes, 1)})
    assert found["open-gpu-attention/open"].median == 2.0
    assert found["open-fused/open"].median == 3.0
    assert found["open-fused/transformers-worker"].median == 3 / 4
    assert found["open-fused/tee"].median == 3 / 5


def test_the_check_of_a_gpu_times_every_split_of_open() -> None:
    modes = gpu_check.MODES.split(",")
    assert set(modes) <= set(MODES)
    assert {mode for mode in MODES if mode.startswith("open")} <= set(modes)


def test_floating_point_can_be_no_faster_than_products_and_weights(tiny: ModelConfig) -> None:
    sizes = weights(tiny)
    head = sizes["lm_head.weight"]
    found = lower_bound("tee", tiny, SETTING, RATES, None)
    layers = sum(sizes.values()) - head
    assert found.prefill_s == pytest.approx(2 * (10 * layers + head) / 1e3)
    assert found.decode_s == pytest.approx(4 * (layers + head) / 1e2)
    assert found == lower_bound("transformers", tiny, SETTING, RATES, None)


@pytest.mark.parametrize(("mode", "times"), [("pad", 1), ("pad-inline", 2)])
@pytest.mark.parametrize(("field", "digits"), [("wide", 4), ("compact", 3), ("lattice", 6)])
def test_pads_multiply_every_digit_and_copy_every_residue(
    mode: str, times: int, field: str, digits: int, tiny: ModelConfig
) -> None:
    sizes = weights(tiny)
    head = sizes["lm_head.weight"]
    layers = sum(sizes.values()) - head
    # D + F of qkv, o, gate and up, down; in two layers; and of the output projection.
    residues = 2 * ((64 + 128) + (64 + 64) + (64 + 256) + (128 + 64))
    head_residues = 64 + 512
    found = lower_bound(mode, tiny, replace(SETTING, field=FIELDS[field].name), RATES, None)
    times = 1 if field == "lattice" else times  # whose masks take no products
    operations = times * digits * 2 * (10 * layers + head)
    copied = digits * (10 * residues + head_residues)
    assert found.prefill_s == pytest.approx(operations / 1e4 + copied / 1e5)
    read, copied = times * (layers + head), digits * (residues + head_residues)
    scales = 4 * times * (2 * (128 + 64 + 256 + 64) + 512)
    assert found.decode_s == pytest.approx((read + scales) / 1e2 + copied / 1e5)


def test_a_batch_shares_the_weights_it_reads(tiny: ModelConfig) -> None:
    alone = lower_bound("tee", tiny, SETTING, RATES, None)
    together = lower_bound("tee", tiny, replace(SETTING, batch=3), RATES, None)
    assert together.prefill_s == pytest.approx(3 * alone.prefill_s)
    assert together.decode_s == pytest.approx(alone.decode_s / 3)
    products_s = 2 * sum(weights(tiny).values()) / RATES.matmul_flops
    assert (
        lower_bound("tee", tiny, replace(SETTING, batch=1000), RATES, None).decode_s == products_s
    )


def test_a_worker_on_a_gpu_has_the_floor_of_the_gpu(tiny: ModelConfig) -> None:
    twice = DeviceLimits("none", *(2 * getattr(RATES, name) for name in RATE_NAMES))
    for mode in ("open", "pad", "shares"):
        slow, fast = (lower_bound(mode, tiny, SETTING, RATES, device) for device in (None, twice))
        assert fast.prefill_s == pytest.approx(slow.prefill_s / 2)
        assert fast.decode_s == pytest.approx(slow.decode_s / 2)
    assert lower_bound("tee", tiny, SETTING, RATES, twice) == lower_bound(
        "tee", tiny, SETTING, RATES, None
    )


def test_the_stock_has_room_for_the_rows_it_was_made_for(tiny: ModelConfig) -> None:
    shapes = {group: group.shape for group in linear_groups(tiny)}

    class Zeros:
        field = FIELDS["wide"]

        def stock_rows(self, memory_rows: int) -> int:
            return memory_rows

        def batch_rows(self, key: LinearGroup, room: int, memory_rows: int) -> int:
            return room

        def forget(self) -> None:
            pass

        def rows_made(self, key: LinearGroup, rows: int) -> int:
            return rows

        def make(self, key: LinearGroup, pads: Pads, place: list[int]) -> None:
            pads.r_ND[place] = pads.u_NF[place] = 0

    enough = stock_bytes(tiny, 17, "wide")
    for memory, rows in ((enough, 17), (enough - 1, 16)):
        pool = PadPool(Zeros(), shapes, memory)
        pool.fill()
        assert pool.nbytes == stock_bytes(tiny, rows, "wide")
        pool.close()


def test_a_short_thing_is_timed_as_often_as_it_takes() -> None:
    assert seconds(lambda: time.sleep(0.001)) == pytest.approx(0.0012, abs=0.0008)
    spun = 0

    def count() -> None:
        nonlocal spun
        spun += 1

    assert seconds(count) < 1e-5
    assert spun > 1000
