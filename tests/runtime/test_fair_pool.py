"""Threads that work for tenants in turn."""

import gc
import threading
import weakref
from concurrent.futures import CancelledError
from functools import partial

import pytest

from tsqp.runtime.fair_pool import FairPool

DEADLINE_S = 60.0


def blocked(pool: FairPool) -> threading.Event:
    """Let the pool be busy until the event is set."""
    begun, go_on = threading.Event(), threading.Event()
    pool.submit("", lambda: (begun.set(), go_on.wait(DEADLINE_S)))
    assert begun.wait(DEADLINE_S)
    return go_on


def test_tenants_take_turns_and_the_work_of_one_stays_in_order() -> None:
    pool, done = FairPool(1, "test"), list[str]()
    go_on = blocked(pool)
    for name in ("a1", "a2", "a3", "b1", "c1", "b2"):
        pool.submit(name[0], partial(done.append, name))
    go_on.set()
    pool.shutdown()
    assert done == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_there_are_as_many_threads_as_are_needed_and_no_more() -> None:
    pool = FairPool(2, "test")
    both = threading.Barrier(2)
    futures = [pool.submit("a", lambda: both.wait(DEADLINE_S)) for _ in range(6)]
    assert sorted(future.result(DEADLINE_S) for future in futures) == [0, 0, 0, 1, 1, 1]
    assert sum(thread.name.startswith("test") for thread in threading.enumerate()) == 2
    pool.shutdown()


class Payload:
    """Something that can be referred to weakly."""


def test_cancelled_work_is_not_done_and_not_kept() -> None:
    pool, payload = FairPool(1, "test"), Payload()
    kept, done = weakref.ref(payload), list[str]()
    go_on = blocked(pool)
    cancelled = pool.submit("a", partial(lambda _: done.append("cancelled"), payload))
    other = pool.submit("a", partial(done.append, "other"))
    del payload
    assert cancelled.cancel()
    gc.collect()
    assert kept() is None
    go_on.set()
    other.result(DEADLINE_S)
    with pytest.raises(CancelledError):
        cancelled.result()
    pool.shutdown()
    assert done == ["other"]


def test_an_error_is_the_future_s_and_the_thread_goes_on() -> None:
    pool = FairPool(1, "test")
    with pytest.raises(ZeroDivisionError):
        pool.submit("a", lambda: 1 // 0).result(DEADLINE_S)
    assert pool.submit("a", lambda: 7).result(DEADLINE_S) == 7
    pool.shutdown()
    with pytest.raises(RuntimeError):
        pool.submit("a", lambda: 7)
