"""Who may wait, before there is anything to wait with."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqp.errors import QueueFull
from tsqp.runtime.admission import Admission, Place


class Queue:
    """Sequences that wait, by tenant."""

    def __init__(self, running: int = 0, **waiting: int) -> None:
        self.num_running = running
        self._waiting = Counter(waiting)

    @property
    def num_waiting(self) -> int:
        return self._waiting.total()

    def num_waiting_of(self, tenant: str) -> int:
        return self._waiting[tenant]


def test_places_are_counted_until_they_are_given_back() -> None:
    admission = Admission(2, 3)
    with admission.let_in(3, "a") as place:
        part = place.part(1)
        assert admission.num_waiting == 3
    assert admission.num_waiting == 1
    part.give_back()
    part.give_back()
    assert admission.num_waiting == 0


def test_what_may_run_at_once_does_not_wait() -> None:
    admission = Admission(2, 3)
    admission.let_in(5, "a")
    with pytest.raises(QueueFull, match="Too many requests"):
        admission.let_in(1, "b")
    busy = Admission(2, 3, queue=Queue(running=2, a=1))
    busy.let_in(2, "a")
    with pytest.raises(QueueFull):
        busy.let_in(1, "a")


def test_without_a_limit_everybody_is_let_in() -> None:
    admission = Admission(1, None, is_shared=True, queue=Queue(running=1, a=10**6))
    assert admission.let_in(10**6, "a")


def test_a_tenant_may_have_half_of_what_the_others_leave() -> None:
    admission = Admission(1, 24, is_shared=True, queue=Queue(running=1, a=10))
    admission.let_in(2, "a")
    with pytest.raises(QueueFull, match="of your own"):
        admission.let_in(1, "a")
    admission.let_in(6, "b")
    with pytest.raises(QueueFull, match="of your own"):
        admission.let_in(1, "b")
    admission.let_in(1, "c")


def test_a_tenant_of_one_sequence_is_let_in_while_there_is_any_place() -> None:
    admission = Admission(1, 2, is_shared=True, queue=Queue(running=1))
    admission.let_in(1, "a")
    admission.let_in(1, "b")
    with pytest.raises(QueueFull, match="Too many requests"):
        admission.let_in(1, "c")


@given(
    st.integers(2, 40),
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 9)), max_size=60),
)
def test_whatever_some_tenants_ask_for_another_one_finds_a_place(
    limit: int, asked: list[tuple[str, int]]
) -> None:
    """Four of them leave a fifth of the places, rounded; one sequence needs one."""
    admission, held = Admission(0, limit, is_shared=True), list[Place]()
    for tenant, count in asked:
        try:
            held.append(admission.let_in(count, tenant))
        except QueueFull:
            continue
    assert admission.num_waiting <= limit
    if limit >= 16:
        held.append(admission.let_in(1, "e"))
    for place in held:
        place.give_back()
    assert admission.num_arriving == 0
