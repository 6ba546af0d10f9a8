"""A lie is noticed in every group, at every bit, in every call, and between honest answers."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from liars import LyingWorker
from lies import Order
from lying_sessions import GROUPS, PROMPT, TOKENS, complete, fails, name, private, right_tokens

from pairwise import turns
from tsqp import SamplingParams
from tsqp.algebra.params import FIELDS
from tsqp.errors import IntegrityError
from tsqp.model.linear_group import LinearGroup
from tsqp.runtime import build
from tsqp.tee.crypto.freivalds import FailureLimit
from tsqp.tee.crypto.pad_providers import DirectProvider
from tsqp.tee.crypto.pads import Pads
from tsqp.wire.messages import place_of

pytestmark = [pytest.mark.usefixtures("nothing_is_left", "limit")]


@pytest.mark.parametrize(("target", "field"), turns(GROUPS, list(FIELDS)))
def test_every_group_is_checked_and_named(
    target: tuple[int, str], field: str, liar: LyingWorker, sampled: list[int]
) -> None:
    layer, group = target
    order = Order("one element off by one", layer, group)
    message = fails(liar, order, IntegrityError, sampled, field=field)
    assert f"wrong product for {name(layer, group)};" in message


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    target=st.sampled_from(GROUPS),
    bit=st.integers(0, 2**20),
    after=st.integers(0, 30),
    field=st.sampled_from(sorted(FIELDS)),
    shm=st.booleans(),
)
def test_one_bit_flipped_anywhere_is_noticed(
    target: tuple[int, str],
    bit: int,
    after: int,
    field: str,
    shm: bool,
    liar: LyingWorker,
    sampled: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "process_limit", FailureLimit())  # one for each example
    order = Order("one bit flipped", *target, after=after, bit=bit)
    message = fails(liar, order, IntegrityError, sampled, max_tokens=6, field=field, shm=shm)
    assert name(*target) in message


def test_a_worker_that_is_right_a_thousand_times_is_still_checked(
    liar: LyingWorker, sampled: list[int]
) -> None:
    calls = 1000
    order = Order("one element off by one", 1, "down", after=calls)
    fails(liar, order, IntegrityError, sampled, max_tokens=120)
    assert len(sampled) == calls // len(GROUPS)


def test_two_lanes_fail_together(liar: LyingWorker, sampled: list[int]) -> None:
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    right = [token for token in right_tokens() for _ in (PROMPT, PROMPT)]
    sampled.clear()
    order = Order("a row off by one", 1, "o", after=2 * 2 * len(GROUPS))
    with private(liar, order, microbatches=2) as llm:
        with pytest.raises(IntegrityError, match=name(1, "o")):
            llm.generate([PROMPT, PROMPT], params)
        assert sampled == right[:4]
        with pytest.raises(IntegrityError, match=name(1, "o")):
            complete(llm)


@pytest.mark.parametrize("field", ["wide", "compact"])
@pytest.mark.parametrize("key", [(0, "qkv"), (1, "down"), (-1, "lm_head")])
def test_a_wrong_product_of_a_pad_is_noticed(
    key: tuple[int, str],
    field: str,
    liar: LyingWorker,
    sampled: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make = DirectProvider.make

    def make_wrong(
        provider: DirectProvider, asked: LinearGroup, pads: Pads, place: list[int]
    ) -> None:
        make(provider, asked, pads, place)
        if place_of(asked) == key:
            last = place[-1], -1
            pads.u_NF[last] = (pads.u_NF[last] + 1) % FIELDS[field].p

    monkeypatch.setattr(DirectProvider, "make", make_wrong)
    assert name(*key) in fails(liar, Order(), IntegrityError, sampled, field=field)
