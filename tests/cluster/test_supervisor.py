"""A worker that ends is started again; real processes, without Ray."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import psutil
import pytest

from tsqp.cluster import supervisor
from tsqp.cluster.supervisor import State, Supervisor

PATIENCE_S = 60.0


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_S", 0.05)


@pytest.fixture
def supervised() -> Iterator[Supervisor]:
    arguments = ["random:tiny", "--serve", "private", "--threads", "1"]
    with closing(Supervisor(arguments, "tcp://127.0.0.1:0")) as started:
        yield started


def until(supervised: Supervisor, wanted: Callable[[State], bool]) -> State:
    deadline = time.monotonic() + PATIENCE_S
    while not wanted(state := supervised.state()):
        assert time.monotonic() < deadline, state
        time.sleep(0.02)
    return state


def pid(supervised: Supervisor) -> int:
    assert supervised._worker is not None
    return supervised._worker._process.pid


def test_a_killed_worker_serves_again_elsewhere_and_a_closed_one_does_not(
    supervised: Supervisor,
) -> None:
    first = until(supervised, lambda state: state.endpoint is not None)
    assert (first.restarts, first.error) == (0, "")
    os.kill(pid(supervised), signal.SIGKILL)

    second = until(supervised, lambda state: state.restarts == 1 and state.endpoint is not None)
    assert second.endpoint != first.endpoint
    assert "exit status -9" in second.error

    last = pid(supervised)
    supervised.close()
    assert not psutil.pid_exists(last)


def test_a_worker_that_cannot_start_says_why_and_is_tried_again() -> None:
    arguments = ["random:tiny", "--shard", "3/2"]
    with closing(Supervisor(arguments, "tcp://127.0.0.1:0")) as supervised:
        state = until(supervised, lambda state: state.restarts >= 2)
        assert "NUMBER/COUNT" in state.error and state.endpoint is None
