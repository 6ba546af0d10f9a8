"""Rows that several threads share: no part is lost, and none still runs when a call is over."""

import threading
import time

import numpy as np
import pytest

from every_opcode import at_every_opcode
from tsqp.tee.crypto import row_pool
from tsqp.tee.crypto.kernels import ALL_ROWS
from tsqp.tee.crypto.row_pool import RowPool


class Kernel:
    """Marks its rows, slowly enough to be caught in the act."""

    def __init__(self) -> None:
        self.running = 0
        self.seen = np.zeros(96, np.int64)

    def __call__(self, first: int, stop: int) -> int:
        self.running += 1
        time.sleep(0.0005)
        self.seen[first:stop] += 1
        self.running -= 1
        return ALL_ROWS


def test_an_interrupt_at_any_opcode_leaves_no_kernel_running_and_a_pool_that_ends() -> None:
    pool, kernel = RowPool(3), Kernel()
    pool.run(96, kernel)

    def run() -> None:
        nonlocal kernel
        kernel = Kernel()
        pool.run(96, kernel)

    opcodes = 0
    for _ in at_every_opcode(run, row_pool, step=2):
        opcodes += 1
        assert kernel.running == 0
        assert kernel.seen.max() <= 1
        time.sleep(0)
        assert kernel.running == 0
    assert (kernel.seen == 1).all()
    assert opcodes > 50
    pool.close()
    assert not any(helper.is_alive() for helper in pool._helpers)


def test_what_a_kernel_raises_in_any_thread_is_raised() -> None:
    pool = RowPool(3)

    def kernel(first: int, stop: int) -> int:
        return 1 // (first - 32)

    with pytest.raises(ZeroDivisionError):
        pool.run(96, kernel)
    assert pool.run(96, Kernel()) == ALL_ROWS
    pool.close()


def test_a_closed_pool_computes_in_the_calling_thread() -> None:
    pool, before = RowPool(3), threading.active_count()
    pool.close()
    kernel = Kernel()
    assert pool.run(96, kernel) == ALL_ROWS
    assert (kernel.seen == 1).all()
    assert threading.active_count() == before
