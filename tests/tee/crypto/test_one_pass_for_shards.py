"""An input that several shards get is masked once, and each shard keeps its own expected values."""

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from crypto_helpers import integer_weights

from mask_blocks import to_blocks
from tsqp.algebra.params import FIELDS, LATTICE, Field
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.crypto.kernels import KEPT_ROWS
from tsqp.tee.crypto.rng import uniform
from tsqp.tee.crypto.row_pool import RowPool
from tsqp.tee.offload.lattice_group import LatticeGroup
from tsqp.tee.offload.masked import MaskedGroup

FEATURES, WIDTH = 70, 37
COLUMNS = [slice(0, 32), slice(32, 64), slice(64, 70)]


def whole_and_shards(field: Field) -> list[Any]:
    """A group of which the last shard needs the smallest scale, and its shards."""
    weights, linear = integer_weights(FEATURES, WIDTH), LinearGroup(3, "qkv", FEATURES, WIDTH)
    weights.weight_FD[-1] = 127
    whole: LatticeGroup | MaskedGroup = (
        LatticeGroup(linear, weights, None)
        if field is LATTICE
        else MaskedGroup(linear, weights, None, field)
    )
    return [whole, *(whole.of_rows(columns, weights.weight_FD) for columns in COLUMNS)]


@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("rows", [1, KEPT_ROWS, 2 * KEPT_ROWS + 3, 9 * KEPT_ROWS + 1])
def test_shards_get_the_input_of_the_whole_group_and_keep_what_each_would_keep_by_itself(
    field: Field, rows: int
) -> None:
    x_TD, r_TD = torch.randn(rows, WIDTH), uniform((rows, WIDTH), field)
    masks = to_blocks(r_TD) if field is LATTICE else r_TD
    whole, first, *others = whole_and_shards(field)
    sent_TB, alone_TB = torch.zeros(2, rows, field.residue_bytes * WIDTH, dtype=torch.uint8)
    row_pool = RowPool(2)
    together = first.mask_for(others, x_TD, masks, sent_TB, row_pool)
    whole.mask(x_TD, masks, alone_TB, row_pool)
    assert torch.equal(sent_TB, alone_TB)
    for each, kept in zip([first, *others], together, strict=True):
        alone = each.mask(x_TD, masks, alone_TB, row_pool)
        for name, values in asdict(alone).items():
            assert np.array_equal(values, getattr(kept, name))
    row_pool.close()
