"""A thread's processor time is told apart from everybody else's, its helpers' included."""

import threading
import time
from collections.abc import Callable

import pytest
import torch

from tsqp.tee.cpu_clock import ThreadClock

SPIN_S = 0.3


def spin() -> None:
    end = time.thread_time() + SPIN_S
    while time.thread_time() < end:
        pass


def multiply() -> None:
    """Products on all threads of OpenMP, for a while."""
    a = torch.ones(512, 512)
    end = time.thread_time() + SPIN_S
    while time.thread_time() < end:
        torch.mm(a, a)


def seconds_of(work: Callable[[], None]) -> float:
    """What a clock says of a thread that works while another spins."""
    clock = ThreadClock()
    worked, measured = threading.Event(), threading.Event()

    def body() -> None:
        clock.mark()
        work()
        clock.look()
        worked.set()
        measured.wait(20)

    thread = threading.Thread(target=body)
    thread.start()
    assert worked.wait(20)
    spin()  # by this thread: no part of it
    seconds = clock.seconds()
    measured.set()
    thread.join()
    return seconds


def test_only_the_marked_thread_counts() -> None:
    assert seconds_of(spin) == pytest.approx(SPIN_S, rel=0.2)


def test_the_helpers_of_openmp_count() -> None:
    torch.set_num_threads(2)
    began = time.process_time()
    seconds = seconds_of(multiply)
    others = SPIN_S  # of the thread that spun meanwhile
    assert seconds == pytest.approx(time.process_time() - began - others, rel=0.2)
    assert seconds > 1.3 * SPIN_S


def test_a_clock_that_nobody_marked_stays_at_zero() -> None:
    assert ThreadClock().seconds() == 0.0
