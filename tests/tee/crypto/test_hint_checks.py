"""The check of hints [P10]: two secret vectors, drawn for each check once the hints are here."""

from collections.abc import Callable

import numpy as np
import pytest
from crypto_helpers import integer_weights
from numpy.typing import NDArray

from tsqp.algebra.hints import Polynomials, make_hints, public_polynomials
from tsqp.algebra.params import DEGREE, LATTICE
from tsqp.algebra.ring import Ring
from tsqp.errors import HintsError
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.crypto import hint_checks
from tsqp.tee.crypto.rng import uniform
from tsqp.tee.crypto.row_pool import RowPool
from tsqp.tee.offload.lattice_load import LatticeLoad

Q = LATTICE.p
GROUP = LinearGroup(0, "qkv", 40, 37)
WEIGHTS = integer_weights(40, 37)
PUBLIC = public_polynomials(Ring.of(Q, DEGREE), bytes(32), 37)
HINTS = make_hints(PUBLIC, WEIGHTS.weight_FD)


def check(hints: Polynomials, threads: int = 1) -> None:
    hint_checks.check_hints(hints, PUBLIC, WEIGHTS.weight_FD, "group qkv", RowPool(threads))


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[NDArray[np.int64]]:
    """The vectors that sums of hints, not of public polynomials, are computed with."""
    found: list[NDArray[np.int64]] = []
    combined = hint_checks._combined

    def noting(
        polynomials: Polynomials, k_2W: NDArray[np.int64], row_pool: RowPool
    ) -> NDArray[np.int64] | None:
        if polynomials is not PUBLIC:
            found.append(k_2W.copy())
        return combined(polynomials, k_2W, row_pool)

    monkeypatch.setattr(hint_checks, "_combined", noting)
    return found


def test_every_check_draws_two_vectors_of_its_own(used: list[NDArray[np.int64]]) -> None:
    for _ in range(2):
        check(HINTS)
    first, second = used
    assert first.shape == second.shape == (2, 40)
    values = [*first.reshape(-1).tolist(), *second.reshape(-1).tolist()]
    assert len(set(values)) == len(values)  # uniform on 2^46


@pytest.mark.parametrize("vector", [0, 1])
@pytest.mark.parametrize("root", [0, 1000, 2047])
def test_an_error_that_one_vector_cannot_see_is_refused_by_the_other(
    vector: int, root: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    k_2F = uniform((2, 40), LATTICE)
    k_f, k_g = (int(k_2F[vector, feature]) for feature in (4, 39))
    values_NF = HINTS.at(slice(0, DEGREE))
    values_NF[root, 4] = (int(values_NF[root, 4]) + k_g) % Q
    values_NF[root, 39] = (int(values_NF[root, 39]) - k_f) % Q
    wrong = Polynomials.empty(DEGREE, 40)
    wrong.put(0, values_NF)
    monkeypatch.setattr(hint_checks, "uniform", lambda *_: k_2F)
    with pytest.raises(HintsError, match="not those of its weights"):
        check(wrong)
    k_2F = np.stack([k_2F[vector]] * 2)  # that vector twice does not see it
    check(wrong)


@pytest.mark.parametrize("threads", [1, 2])
def test_wrong_values_at_any_root_are_noticed_by_whichever_thread_reads_them(threads: int) -> None:
    check(HINTS, threads)
    for root in (0, 1023, 1024, 2047):
        for change, words in ((1, "not those of its weights"), (2**47, r"outside \[0, q\)")):
            values_NF = HINTS.at(slice(0, DEGREE))
            values_NF[root, 33] ^= change
            wrong = Polynomials.empty(DEGREE, 40)
            wrong.put(0, values_NF)
            with pytest.raises(HintsError, match=words):
                check(wrong, threads)


def test_the_public_polynomials_of_wider_groups_are_not_read() -> None:
    wider = public_polynomials(Ring.of(Q, DEGREE), bytes(32), 100)
    wider.high_GNB[2:] = 0xFFFF  # would be refused
    hint_checks.check_hints(HINTS, wider, WEIGHTS.weight_FD, "group qkv", RowPool(1))


def test_vectors_are_drawn_once_the_hints_are_here_and_what_was_checked_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []

    def find(*_: object) -> Polynomials:
        events.append("found")
        return HINTS

    def noting(draw: Callable[..., NDArray[np.int64]]) -> Callable[..., NDArray[np.int64]]:
        def drawing(*arguments: object) -> NDArray[np.int64]:
            events.append("drawn")
            return draw(*arguments)

        return drawing

    load = LatticeLoad({GROUP: GROUP.shape}, {}, seed=bytes(32), find=find)
    monkeypatch.setattr(hint_checks, "uniform", noting(uniform))
    load.add(GROUP, WEIGHTS)
    assert events == ["found", "drawn"]
    assert load.hints[GROUP] is HINTS
