"""Every row that a pool ever gives out, counted: none comes twice, whichever way it was made."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from crypto_helpers import chi_square_p, integer_weights
from numpy.typing import NDArray

from mask_blocks import from_blocks
from tsqp.algebra.params import FIELDS, LATTICE, Field
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.crypto import rng
from tsqp.tee.crypto.pad_pool import PadPool
from tsqp.tee.crypto.pad_providers import DirectProvider
from tsqp.tee.crypto.pads import Pads, row_bytes_in_stock
from tsqp.tee.offload.lattice_load import LatticeLoad
from tsqp.wire.seeds import SEED_BYTES

TAKES = 3_000
MOST_NOISE = 127 * 16  # of one product with a weight
WIDTH = 8  # residues of a row: no two rows are alike by chance
QKV, HEAD = LinearGroup(0, "qkv", 3, WIDTH), LinearGroup(None, "lm_head", 5, WIDTH)
GROUPS = {QKV: integer_weights(3, WIDTH), HEAD: integer_weights(5, WIDTH)}
RESIDUES = 3 + 5 + 2 * WIDTH  # of a row


def pool(field: Field, rows: int) -> PadPool:
    weights_FD = {key: weights.weight_FD for key, weights in GROUPS.items()}
    shapes = {key: (weight_FD.shape[0], WIDTH) for key, weight_FD in weights_FD.items()}
    memory = rows * sum(row_bytes_in_stock(field, *shape) for shape in shapes.values())
    if field is not LATTICE:
        return PadPool(DirectProvider(weights_FD, field), shapes, memory)
    load = LatticeLoad(shapes, {})
    for key, weights in GROUPS.items():
        load.add(key, weights)
    return PadPool(load.provider(memory), shapes, memory)


def residues(rows: NDArray[Any], width: int, field: Field) -> NDArray[np.int64]:
    return from_blocks(rows, width) if field is LATTICE else rows.astype(np.int64)


def take_at_random(pads: PadPool, times: int, seed: int) -> list[tuple[LinearGroup, Pads]]:
    """A row at a time, as tokens take them, and now and then the rows of a prompt."""
    choices = random.Random(seed)
    taken = []
    for _ in range(times):
        key = choices.choice(list(GROUPS))
        taken.append((key, pads.take(key, choices.choice([1, 1, 1, 1, 1, 1, 2, 3, 40]))))
    return taken


def assert_no_row_comes_twice(taken: list[tuple[LinearGroup, Pads]], field: Field) -> None:
    r_ND = np.concatenate([residues(pads.r_ND, WIDTH, field) for _, pads in taken])
    assert len({row.tobytes() for row in r_ND}) == len(r_ND)
    # Nor does a part of a row: what chance gives are so many values that have come before.
    expected = r_ND.size**2 / 2 / field.p
    assert r_ND.size - len(np.unique(r_ND)) < expected + 10 * expected**0.5 + 20
    for column_N in r_ND.T:
        assert chi_square_p(np.bincount(column_N * 64 // field.p, minlength=64)) > 1e-7
        assert chi_square_p(np.bincount(column_N & 63, minlength=64)) > 1e-7
    for key, pads in taken:
        weight_FD = GROUPS[key].weight_FD.numpy().astype(np.int64)
        u_NF = residues(pads.u_NF, len(weight_FD), field)
        error_NF = residues(pads.r_ND, WIDTH, field) @ weight_FD.T - u_NF
        error_NF = (error_NF + field.half) % field.p - field.half
        assert (np.abs(error_NF) <= (0 if field is not LATTICE else MOST_NOISE * WIDTH)).all()


@pytest.mark.parametrize(
    ("stock", "field"),
    [
        (0, FIELDS["wide"]),
        (100, FIELDS["compact"]),
        (0, LATTICE),  # the rows beyond those that are asked for are kept for the next call
        (64, LATTICE),
        (4096, LATTICE),
    ],
    ids=["in-line-wide", "ahead-compact", "in-line-lattice", "classes-lattice", "batches-lattice"],
)
def test_no_row_of_many_thousand_takes_comes_twice(stock: int, field: Field) -> None:
    pads = pool(field, stock)
    try:
        pads.fill()
        taken = take_at_random(pads, TAKES, seed=0)
        assert pads.stats.ahead_rows >= stock
    finally:
        pads.close()
    assert_no_row_comes_twice(taken, field)


@pytest.mark.parametrize("field", [FIELDS["wide"], LATTICE], ids=["wide", "lattice"])
def test_no_row_comes_twice_to_threads_that_take_at_once(field: Field) -> None:
    pads, together = pool(field, 64), threading.Barrier(4)

    def take_many(number: int) -> list[tuple[LinearGroup, Pads]]:
        together.wait(30)
        return take_at_random(pads, TAKES // 4, seed=number)

    try:
        with ThreadPoolExecutor(4) as threads:
            taken = [take for some in threads.map(take_many, range(4)) for take in some]
    finally:
        pads.close()
    assert_no_row_comes_twice(taken, field)


@pytest.mark.parametrize("field", [FIELDS["wide"], LATTICE], ids=["wide", "lattice"])
def test_sessions_share_no_row(field: Field) -> None:
    taken = []
    for _ in range(30):
        pads = pool(field, 20)
        taken += [(QKV, pads.take(QKV, rows)) for rows in (1, 30, 1)]
        pads.close()
    assert_no_row_comes_twice(taken, field)


def test_a_seed_is_what_the_operating_system_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def token_bytes(count: int) -> bytes:
        asked.append(count)
        return bytes(range(count))

    monkeypatch.setattr(rng.secrets, "token_bytes", token_bytes)
    assert rng.fresh_seed() == bytes(range(SEED_BYTES))
    assert asked == [SEED_BYTES] == [32]
