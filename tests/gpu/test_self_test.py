"""A worker whose device multiplies wrongly does not serve."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tsqp.algebra.params import Field
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.errors import IntegrityError
from tsqp.gpu.backends.cpu import CpuBackend
from tsqp.gpu.self_test import check_device
from tsqp.gpu.worker_weights import IntegerModel, load_integers
from tsqp.model.shard import Shard


class WrongBackend(CpuBackend):
    """Its last output feature is off by one."""

    def residue_product(
        self, c_TB: Tensor, weight_FD: Tensor, field: Field, out_TB: Tensor
    ) -> None:
        super().residue_product(c_TB, weight_FD, field, out_TB)
        out_TB.view(torch.int32)[:, -1] ^= 1


@pytest.fixture(scope="module")
def integers() -> IntegerModel:
    checkpoint = open_checkpoint("random:tiny")
    try:
        return load_integers(checkpoint, CpuBackend(), shard=Shard(2, 2))
    finally:
        checkpoint.close()


def test_a_right_product_is_accepted(integers: IntegerModel) -> None:
    check_device(integers)


def test_a_wrong_product_is_refused(integers: IntegerModel) -> None:
    with pytest.raises(IntegrityError, match="use another device"):
        check_device(replace(integers, backend=WrongBackend()))
