"""The compiled norm is the norm of torch but for the last bits, whatever lies around a row."""

import pytest
import torch
from torch import Tensor

from tsqp.nn import ops
from tsqp.nn.norms import CompiledNorm

EPS = 1e-5


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return 5 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e15])
@pytest.mark.parametrize("features", [1, 7, 64, 577])
def test_it_is_the_exact_norm_to_float32(features: int, scale: float) -> None:
    x_TD, weight_D = scale * drawn(5, features), drawn(features, seed=2)
    exact = ops.rms_norm(x_TD.double(), weight_D.double(), EPS)
    found = CompiledNorm(weight_D, EPS)(x_TD)
    torch.testing.assert_close(found.double(), exact, rtol=4e-7, atol=0)


def test_halves_are_computed_in_float32_and_rounded_once() -> None:
    x_TD, weight_D = drawn(9, 96).bfloat16(), drawn(96, seed=2).bfloat16()
    norm = CompiledNorm(weight_D, EPS)
    assert norm(x_TD).dtype == torch.bfloat16
    assert torch.equal(norm(x_TD), norm(x_TD.float()).bfloat16())


def test_heads_that_are_not_contiguous_are_normed_one_by_one() -> None:
    x_TNK, weight_K = drawn(3, 6, 32)[:, 2:5], drawn(32, seed=2)
    found = CompiledNorm(weight_K, EPS)(x_TNK)
    torch.testing.assert_close(found, ops.rms_norm(x_TNK, weight_K, EPS))


def test_a_row_does_not_depend_on_the_others() -> None:
    x_TD, norm = drawn(20, 576), CompiledNorm(drawn(576, seed=2), EPS)
    assert torch.equal(norm(x_TD), torch.cat([norm(row_1D) for row_1D in x_TD.split(1)]))
