"""Calls of several threads come one after the other; no interrupt keeps the next one waiting."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from protocol_helpers import eventually

from every_opcode import at_every_opcode
from tsqp.errors import UsageError
from tsqp.runtime import turns as turns_module
from tsqp.runtime.turns import Turns


def in_a_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def ended(thread: threading.Thread) -> bool:
    thread.join(10)
    return not thread.is_alive()


def test_calls_of_many_threads_never_overlap() -> None:
    turns, inside, overlaps = Turns(), [0], [0]

    def call() -> int:
        inside[0] += 1
        time.sleep(0.001)
        overlaps[0] += inside[0] > 1
        inside[0] -= 1
        return threading.get_ident()

    with ThreadPoolExecutor(8) as threads:
        done = list(threads.map(lambda _: turns.run(call), range(40)))
    assert overlaps == [0]
    assert len(done) == 40


def test_calls_are_let_in_in_the_order_of_arrival() -> None:
    turns, order, go = Turns(), list[int](), threading.Event()
    first = in_a_thread(lambda: turns.run(lambda: go.wait(10)))
    assert eventually(lambda: len(turns._queue) == 1)
    others = []
    for number in range(5):
        others.append(in_a_thread(lambda n=number: turns.run(lambda: order.append(n))))
        assert eventually(lambda n=number: len(turns._queue) == 2 + n)
    go.set()
    assert all(map(ended, [first, *others]))
    assert order == [0, 1, 2, 3, 4]


def test_a_call_from_within_a_call_is_refused_and_the_next_one_is_not() -> None:
    turns = Turns()
    with pytest.raises(UsageError, match="called from its own callback"):
        turns.run(lambda: turns.run(lambda: 1))
    assert turns.run(lambda: 2) == 2


def test_a_call_that_raises_lets_the_next_one_in() -> None:
    turns = Turns()
    with pytest.raises(ZeroDivisionError):
        turns.run(lambda: 1 // 0)
    assert turns.run(lambda: 2) == 2


def test_the_end_waits_for_the_call_that_runs_and_refuses_those_that_wait() -> None:
    turns, log, go = Turns(), list[str](), threading.Event()
    turns.at_end(lambda: log.append("closed"))

    def call() -> None:
        go.wait(10)
        log.append("ran")

    refused: list[str] = []

    def wait_in_vain() -> None:
        try:
            turns.run(lambda: log.append("should not run"))
        except UsageError as exc:
            refused.append(str(exc))

    runs = in_a_thread(lambda: turns.run(call))
    assert eventually(lambda: len(turns._queue) == 1)
    waits = in_a_thread(wait_in_vain)
    assert eventually(lambda: len(turns._queue) == 2)
    ends = in_a_thread(turns.end)
    assert ended(waits)
    assert refused == ["This LLM is closed; make a new one."]
    with pytest.raises(UsageError, match="is closed"):
        turns.check()
    assert log == []
    go.set()
    assert ended(runs)
    assert ended(ends)
    assert log[:2] == ["ran", "closed"]


def test_the_end_inside_a_call_comes_when_the_call_has_ended() -> None:
    turns, log = Turns(), list[str]()
    turns.at_end(lambda: log.append("closed"))

    def call() -> None:
        turns.end()
        log.append("still running")

    turns.run(call)
    assert log == ["still running", "closed"]


def test_an_end_that_waits_in_vain_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsqp.runtime.turns.END_S", 0.1)
    turns, go = Turns(), threading.Event()
    thread = in_a_thread(lambda: turns.run(lambda: go.wait(10)))
    assert eventually(lambda: len(turns._queue) == 1)
    with pytest.raises(UsageError, match="in use by another thread"):
        turns.end()
    go.set()
    assert ended(thread)


def test_everything_is_closed_whatever_one_closer_raises() -> None:
    turns, log = Turns(), list[int]()
    turns.at_end(lambda: log.append(1))
    turns.at_end(lambda: log.append(1 // 0))
    turns.at_end(lambda: log.append(2))
    with pytest.raises(ZeroDivisionError):
        turns.end()
    assert log == [2, 1]


def test_an_interrupt_at_any_opcode_keeps_nobody_waiting() -> None:
    turns = Turns()
    opcodes = 0
    for _ in at_every_opcode(lambda: turns.run(lambda: None), turns_module):
        opcodes += 1
        assert not turns._queue
        assert turns.run(lambda: 3) == 3
    assert opcodes > 100


def test_an_end_that_was_interrupted_at_any_opcode_can_be_done_again() -> None:
    turns, closed = Turns(), [0]

    def close() -> None:
        closed[0] += 1

    def run() -> None:
        nonlocal turns
        turns = Turns()
        turns.at_end(close)
        turns.end()

    opcodes = 0
    for _ in at_every_opcode(run, turns_module):
        opcodes += 1
        turns.at_end(close)
        before = closed[0]
        thread = in_a_thread(turns.end)
        assert ended(thread)
        assert closed[0] > before
    assert opcodes > 80


@pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")
def test_a_forked_process_is_refused_at_once_and_closes_nothing() -> None:
    turns, closed = Turns(), list[int]()
    turns.at_end(lambda: closed.append(1))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            turns.end()
            turns.run(lambda: None)
        except UsageError as exc:
            os.write(writer, f"{len(closed)} {exc}".encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    said = os.read(reader, 1000).decode()
    assert said.startswith("0 This LLM belongs to the process that this one was forked from")
    assert turns.run(lambda: 1) == 1
