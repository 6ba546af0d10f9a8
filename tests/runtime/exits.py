"""Programs that use an LLM and do not close it, each in a process of its own that ends as it likes.

Run as a program, this file forks once for each case named, so that torch is loaded once, and writes
as JSON how each ended: its name, its exit status, and what it said on standard error.
"""

import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from tsqp import LLM, SamplingParams
from tsqp.algebra.params import WIDE
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.crypto import pad_pool
from tsqp.tee.crypto.kernels import compile_loops
from tsqp.tee.crypto.pad_providers import DirectProvider
from tsqp.tee.crypto.pads import Pads

FEW = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, max_tokens=2000, ignore_eos=True)
KEPT: list[Any] = []
SQUARE = torch.ones(500, 500)
MAKE = DirectProvider.make


class SlowEnd:
    """Makes the end of Python long enough for a thread in native code to come back into it."""

    def __del__(self, sleep: Callable[[float], None] = time.sleep) -> None:
        sleep(1)


def stay_busy(provider: DirectProvider, key: LinearGroup, pads: Pads, place: list[int]) -> None:
    """Make pads; the thread that makes them ahead is in native code nearly all the time."""
    if threading.current_thread().name == "tsqp-pads":
        for _ in range(20):
            torch.mm(SQUARE, SQUARE)
    MAKE(provider, key, pads, place)


def make(worker: str = "inproc") -> LLM:
    """Its thread has pads to make for much longer than the program runs."""
    llm = LLM("random:tiny", worker=worker, threads=1)
    llm.generate([[1, 2, 3]], FEW)
    return llm


def end_of_main() -> None:
    KEPT.append(make())


def end_of_main_with_a_worker() -> None:
    KEPT.append(make("local"))


def in_a_cycle() -> None:
    llm = make()
    llm.itself = llm  # type: ignore[attr-defined]


def exit_3() -> None:
    KEPT.append(make())
    sys.exit(3)


def exit_in_a_thread() -> None:
    thread = threading.Thread(target=lambda: (KEPT.append(make()), sys.exit(3)))
    thread.start()
    thread.join()


def exception() -> None:
    KEPT.append(make())
    raise ValueError("it leaves main")


def interrupt() -> None:
    llm = make()
    llm.generate([[1]], ENDLESS, should_stop=lambda: bool(signal.raise_signal(signal.SIGINT)))


def interrupt_with_a_worker() -> None:
    llm = make("local")
    llm.generate([[1]], ENDLESS, should_stop=lambda: bool(signal.raise_signal(signal.SIGINT)))


def daemon_that_generates() -> None:
    llm = make()
    begun = threading.Event()
    target = lambda: llm.generate([[1]], ENDLESS, should_stop=begun.set)  # noqa: E731
    threading.Thread(target=target, daemon=True).start()
    begun.wait()


CASES = {
    each.__name__: each
    for each in (
        end_of_main,
        in_a_cycle,
        exit_3,
        exit_in_a_thread,
        exception,
        interrupt,
        daemon_that_generates,
        end_of_main_with_a_worker,
        interrupt_with_a_worker,
    )
}

if __name__ == "__main__":
    slow_end = SlowEnd()
    DirectProvider.make = stay_busy  # type: ignore[method-assign]
    # Else a busy machine would keep the thread from its native code.
    pad_pool._give_way = lambda: None
    torch.set_num_threads(1)  # threads that torch starts would be missing in the forks
    compile_loops(WIDE, shares=False)  # loaded once, for all of them
    running = []
    for name in sys.argv[1:]:
        said = tempfile.TemporaryFile()  # noqa: SIM115
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 2)
            CASES[name]()
            break  # and so to the end of Python, as any program
        running.append((name, child, said))
    else:
        ended = []
        for name, child, said in running:
            _, status = os.waitpid(child, 0)
            said.seek(0)
            ended.append((name, os.waitstatus_to_exitcode(status), said.read().decode()))
        print(json.dumps(ended))
