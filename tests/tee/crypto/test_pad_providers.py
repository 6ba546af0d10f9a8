"""Pads are random rows with their products, and each provider says how many it makes at once."""

import pytest
import torch
from crypto_helpers import integer_weights, make, product

from tsqp.algebra.hints import make_hints, public_polynomials
from tsqp.algebra.params import DEGREE, DIRECT_FIELDS, LATTICE, WIDE, Field
from tsqp.algebra.ring import ClassTransform, Ring
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.crypto.lattice import LatticeProvider
from tsqp.tee.crypto.pad_providers import (
    BATCH_PRODUCTS,
    BATCH_ROWS,
    DirectProvider,
    PadProvider,
)

QKV = LinearGroup(0, "qkv", 3, 2)  # whose sizes these providers take from the weights


@pytest.mark.parametrize("field", DIRECT_FIELDS, ids=lambda field: field.name)
def test_pads_of_the_tee_are_uniform_rows_and_their_products(field: Field) -> None:
    weight_FD = integer_weights(6, 9).weight_FD
    pads = make(DirectProvider({QKV: weight_FD}, field), QKV, (6, 9), 40)
    for r_D, u_F in zip(pads.r_ND.tolist(), pads.u_NF.tolist(), strict=True):
        assert u_F == [v % field.p for v in product(weight_FD, r_D)]
    assert len({tuple(row) for row in pads.r_ND.tolist()}) == 40


def test_two_batches_of_pads_have_nothing_in_common() -> None:
    provider = DirectProvider({QKV: torch.ones(1, 1000, dtype=torch.int8)}, WIDE)
    first, second = (make(provider, QKV, (1, 1000), 10) for _ in range(2))
    assert (first.r_ND == second.r_ND).sum() == 0


def rows_at_once(provider: PadProvider, rooms: list[int], memory_rows: int) -> list[int]:
    return [provider.batch_rows(QKV, room, memory_rows) for room in rooms]


def test_batches_of_pads_are_bounded_by_rows_by_products_and_by_a_part_of_the_stock() -> None:
    small = DirectProvider({QKV: torch.ones(3, 2, dtype=torch.int8)}, WIDE)
    assert rows_at_once(small, [0, 1, 24, 25, 100], 100) == [0, 1, 24, 25, 25]
    assert rows_at_once(small, [1000], 1000) == [BATCH_ROWS]
    assert rows_at_once(small, [1, 3], 3) == [1, 1]
    assert small.stock_rows(0) == 0
    assert small.stock_rows(101) == 101
    for products, rows in ((BATCH_PRODUCTS // 10, 10), (2 * BATCH_PRODUCTS, 1)):
        weight_FD = torch.empty(1, dtype=torch.int8).expand(products, 1)
        assert rows_at_once(DirectProvider({QKV: weight_FD}, WIDE), [1000], 1000) == [rows]


def test_lattice_masks_are_made_a_class_at_a_time() -> None:
    ring, weight_FD = Ring.of(LATTICE.p, DEGREE), integer_weights(3, 2).weight_FD
    public = public_polynomials(ring, bytes(32), 2)
    hints = {QKV: make_hints(public, weight_FD)}
    provider = LatticeProvider(public, hints, ClassTransform.of(ring, DEGREE // 64))
    assert rows_at_once(provider, [0, 63, 64, 127, 200], 200) == [0, 0, 64, 64, 64]
    assert [provider.stock_rows(rows) for rows in (0, 63, 64, 200)] == [64, 64, 64, 192]
    assert len(make(provider, QKV, (3, 2))) == 64
