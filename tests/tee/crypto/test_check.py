"""The check of products: both vectors, all of their bits, every row, and what follows a failure.

Other tests change an answer at random, which either vector would notice. Here each vector has to
notice what the other one misses.
"""

import math

import numpy as np
import pytest
import torch
from crypto_helpers import Int32, Layer, chi_square_p, integer_weights, rows_of_every_kind

from tsqp.algebra.params import CHECK_MODULUS, DIRECT_FIELDS, WIDE, Field
from tsqp.checkpoint.quantize import IntegerWeights
from tsqp.errors import IntegrityError
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.crypto import kernels
from tsqp.tee.crypto.freivalds import MAX_FAILURES, FailureLimit
from tsqp.tee.offload.masked import Masked, MaskedGroup

GROUP = LinearGroup(0, "o", 3, 4)
BOTH = pytest.mark.parametrize("field", DIRECT_FIELDS, ids=lambda field: field.name)


def check_vectors(group: MaskedGroup) -> Int32:
    """k of a group, [2, F]: what its answers are checked with."""
    return group._k_2P.view(np.int32)[:, : group.features]


class Answered:
    """One call of a layer with its right answer, which tests then change."""

    def __init__(self, layer: Layer, x_TD: torch.Tensor) -> None:
        self.layer = layer
        r_TD, self.u_TF = layer.pads(len(x_TD))
        self.masked: Masked
        self.masked, c_TD = layer.mask(x_TD, r_TD)
        self.right_TF = layer.product(c_TD)
        layer.unmask(layer.to_bytes(self.right_TF), self.u_TF, self.masked)

    def is_refused(self, lie_TF: Int32) -> bool:
        """Whether the answer is refused when a worker adds `lie_TF` to it."""
        wrong_TF = (self.right_TF.astype(np.int64) + lie_TF) % self.layer.field.p
        try:
            self.layer.unmask(
                self.layer.to_bytes(wrong_TF.astype(np.int32)), self.u_TF, self.masked
            )
        except IntegrityError:
            return True
        return False

    def lie(self, row: int, feature: int, error: int = 1) -> Int32:
        lie_TF = np.zeros_like(self.right_TF)
        lie_TF[row, feature] = error
        return lie_TF


def small_relation(a: int, b: int) -> tuple[int, int]:
    """(s, t), not both 0, with a·s + b·t ≡ 0 mod P and neither above √P in size.

    Euclid's algorithm on P and -a / b, stopped half-way: every remainder is a small multiple of
    -a / b mod P.
    """
    ratio = -a * pow(b, -1, CHECK_MODULUS) % CHECK_MODULUS
    rest, t = (CHECK_MODULUS, ratio), (0, 1)
    while rest[1] > math.isqrt(CHECK_MODULUS):
        quotient = rest[0] // rest[1]
        rest = rest[1], rest[0] - quotient * rest[1]
        t = t[1], t[0] - quotient * t[1]
    return t[1], rest[1]


@BOTH
@pytest.mark.parametrize("misses", [0, 1])
def test_a_lie_that_one_vector_misses_is_noticed_by_the_other(misses: int, field: Field) -> None:
    layer = Layer(field)
    answered = Answered(layer, torch.randn(3, 37, generator=torch.Generator().manual_seed(1)))
    k_2F = check_vectors(layer.group).tolist()
    for row in range(3):
        for first in range(12):
            second = (first + 1) % 12
            pair = small_relation(k_2F[misses][first], k_2F[misses][second])
            lie_TF = answered.lie(row, first, pair[0]) + answered.lie(row, second, pair[1])
            error_F = lie_TF[row].tolist()
            found = [sum(k * e for k, e in zip(k_F, error_F, strict=True)) for k_F in k_2F]
            assert found[misses] % CHECK_MODULUS == 0
            assert found[1 - misses] % CHECK_MODULUS != 0
            assert answered.is_refused(lie_TF), (row, first)


@BOTH
def test_a_lie_that_both_vectors_miss_is_what_the_check_cannot_see(
    field: Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lies of the test above would pass, if nothing but the vectors stood in their way."""
    layer = Layer(field)
    layer.group._k_2P[1], layer.group._kw_2P[1] = layer.group._k_2P[0], layer.group._kw_2P[0]
    answered = Answered(layer, torch.randn(1, 37, generator=torch.Generator().manual_seed(1)))
    k_2F = check_vectors(layer.group).tolist()
    pair = small_relation(k_2F[0][3], k_2F[0][4])
    assert not answered.is_refused(answered.lie(0, 3, pair[0]) + answered.lie(0, 4, pair[1]))
    assert answered.is_refused(answered.lie(0, 3, pair[0]) + answered.lie(0, 4, pair[1] + 1))


# One thread does calls of few rows; more rows are shared out; a block of a request has 128.
@BOTH
@pytest.mark.parametrize("rows", [1, 2, 31, 40, 128, 300])
def test_a_lie_in_any_row_of_a_call_is_noticed(rows: int, field: Field) -> None:
    layer = Layer(field, features=3, width=4, threads=3)
    answered = Answered(layer, torch.randn(rows, 4, generator=torch.Generator().manual_seed(2)))
    for row in range(rows):
        assert answered.is_refused(answered.lie(row, row % 3)), row


@BOTH
def test_a_lie_in_a_row_of_any_kind_is_noticed(field: Field) -> None:
    layer = Layer(field, features=3)
    answered = Answered(layer, rows_of_every_kind(37))
    for row in range(40):
        for error in (1, -1, field.half):
            assert answered.is_refused(answered.lie(row, row % 3, error)), row


@BOTH
@pytest.mark.parametrize("rows", [1, 40, 128])
def test_a_lie_in_a_row_of_zeros_is_noticed(rows: int, field: Field) -> None:
    """It would change no number, as the scale of such a row is 0, but it is a lie."""
    layer = Layer(field, features=3, width=4, threads=3)
    answered = Answered(layer, torch.zeros(rows, 4))
    for row in range(rows):
        assert answered.is_refused(answered.lie(row, row % 3)), row


@BOTH
def test_a_lie_about_a_group_of_zeros_is_noticed(field: Field) -> None:
    weights = IntegerWeights(torch.zeros(3, 4, dtype=torch.int8), torch.ones(3))
    layer = Layer(field, weights=weights)
    answered = Answered(layer, torch.ones(2, 4))
    assert answered.is_refused(answered.lie(1, 2))


@pytest.mark.parametrize("bins", [256, 4096])
def test_check_vectors_are_spread_over_the_whole_range(bins: int) -> None:
    features = 200_000
    weights = IntegerWeights(torch.ones(features, 1, dtype=torch.int8), torch.ones(features))
    k_2F = check_vectors(MaskedGroup(GROUP, weights, None, WIDE))
    assert k_2F.shape == (2, features)
    for k_F in k_2F.astype(np.int64):
        assert 0 <= k_F.min() <= k_F.max() < CHECK_MODULUS
        for part_F in (k_F * bins // CHECK_MODULUS, k_F % bins, (k_F >> 12) % bins):
            assert chi_square_p(np.bincount(part_F, minlength=bins)) > 1e-7
        # Of so many draws from all of [0, P), about nine meet another one.
        assert features - len(np.unique(k_F)) < 50


def test_the_two_vectors_have_nothing_to_do_with_one_another() -> None:
    features = 2000
    weights = IntegerWeights(torch.ones(features, 1, dtype=torch.int8), torch.ones(features))
    first_F, second_F = check_vectors(MaskedGroup(GROUP, weights, None, WIDE)).tolist()
    pairs = list(zip(first_F, second_F, strict=True))
    related = {
        "the same or shifted": [(b - a) % CHECK_MODULUS for a, b in pairs],
        "negated": [(b + a) % CHECK_MODULUS for a, b in pairs],
        "a multiple": [b * pow(a, -1, CHECK_MODULUS) % CHECK_MODULUS for a, b in pairs if a],
        "bits exchanged": [a ^ b for a, b in pairs],
    }
    for how, values in related.items():
        assert len(set(values)) > features - 10, how


def test_every_group_of_every_session_draws_its_own_vectors() -> None:
    weights = integer_weights(500, 3)
    groups = [MaskedGroup(GROUP, weights, None, WIDE) for _ in range(4)]
    drawn = np.concatenate([check_vectors(group) for group in groups])
    assert len(np.unique(drawn)) > drawn.size - 10


@BOTH
def test_answers_that_are_added_up_hold_residues_only(field: Field) -> None:
    """[P8]: what is no residue is refused in any row, before it is added to anything."""
    layer = Layer(field, 3, 4)
    largest = 256**field.residue_bytes - 1
    for rows in (1, 38):
        for row in range(rows):
            for wrong in (field.p, largest - 1, largest):
                z_TF = np.zeros((rows, 3), np.uint32)
                z_TF[row, row % 3] = wrong
                z_TB, u_TF = layer.to_bytes(z_TF.view(np.int32)), np.ones((rows, 3), np.int32)
                assert kernels.subtract_answer(z_TB.numpy(), field, u_TF) == row


def test_after_eight_failures_nothing_is_allowed_any_more() -> None:
    assert MAX_FAILURES == 8
    limit = FailureLimit()
    for _ in range(8):
        limit.check()
        assert not limit.reached
        limit.count()
    assert limit.reached
    with pytest.raises(IntegrityError, match="nothing is offloaded any more"):
        limit.check()
    limit.count()
    assert limit.reached
