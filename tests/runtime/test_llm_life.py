"""An LLM in threads, callbacks and forks, under interrupts, and when nobody wants it any more."""

import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from protocol_helpers import Commands, eventually

from every_opcode import at_every_opcode
from interrupts import interrupt_after
from tsqp import LLM, SamplingParams
from tsqp.errors import TSQPError, UsageError
from tsqp.nn import kv_cache
from tsqp.runtime import turns
from tsqp.runtime.generate import generate
from tsqp.tee.crypto import pad_pool, pad_providers, pads, row_pool, stock
from tsqp.tee.engine import engine, interleave, observer, scheduler
from tsqp.tee.offload import masked, pad
from tsqp.wire import channel

MODES: dict[str, dict[str, Any]] = {
    "tee": {"privacy": "tee"},
    "fixed point": {"privacy": "tee", "fixed_point": True},
    "open": {"privacy": "open", "worker": "local"},
    "pad": {"privacy": "pad", "worker": "local"},
    "shares": {
        "privacy": "shares",
        "worker": ["local", "local"],
        "insecure_same_host": True,
    },
}
FEW = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
MANY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, max_tokens=1900, ignore_eos=True)
PROMPT = [1, 2, 3]


@pytest.fixture(params=MODES, scope="module")
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    """One of each mode, with a worker process of its own where there is one."""
    with LLM("random:tiny", threads=1, **MODES[request.param]) as llm:
        yield llm


def make(**options: Any) -> LLM:
    return LLM("random:tiny", threads=1, **options)


def is_blank(llm: LLM) -> bool:
    return not llm._engine.has_unfinished and not llm._turns._queue


def test_threads_that_share_an_llm_get_their_own_answers(llm: LLM) -> None:
    prompts = [[1, 2, number] for number in range(3, 7)]
    expected = [llm.generate([prompt], MANY) for prompt in prompts]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda each: llm.generate([each], MANY), prompts)) == expected
        scores = [threads.submit(llm.score, prompt) for prompt in prompts]
        assert llm.generate([prompts[0]], MANY) == expected[0]
        assert [each.result().logprobs_T.tolist() for each in scores] == [
            llm.score(prompt).logprobs_T.tolist() for prompt in prompts
        ]


@pytest.mark.parametrize("callback", ["on_progress", "should_stop"])
def test_a_call_from_a_callback_is_one_clear_error_and_harms_nothing(
    llm: LLM, callback: str
) -> None:
    expected = llm.generate([PROMPT], FEW)
    said: list[str] = []

    def call(*_: object) -> bool:
        for again in (lambda: llm.generate([PROMPT], FEW), lambda: llm.score(PROMPT)):
            with pytest.raises(UsageError, match="called from its own callback") as caught:
                again()
            said.append(str(caught.value))
        return False

    arguments: dict[str, Any] = {callback: call}
    assert llm.generate([PROMPT], FEW, **arguments) == expected
    assert len(set(said)) == 1
    with pytest.raises(UsageError, match="called from its own callback"):
        llm.generate([PROMPT], FEW, should_stop=lambda: bool(llm.generate([PROMPT], FEW)))
    assert is_blank(llm)
    assert llm.generate([PROMPT], FEW) == expected


def in_a_fork(act: Callable[[], object]) -> str:
    """What a forked process says of what it did, within a few seconds."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # one that hangs says nothing
        try:
            os.write(writer, f"{act()}".encode())
        except BaseException as exc:
            os.write(writer, f"{type(exc).__name__}: {exc}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


@pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")
def test_a_forked_process_is_refused_at_once_and_leaves_its_parent_working(llm: LLM) -> None:
    expected = llm.generate([PROMPT], FEW)
    acts: list[Callable[[], object]] = [
        lambda: llm.generate([PROMPT], FEW),
        lambda: llm.generate("a text", FEW),
        lambda: llm.chat([{"role": "user", "content": "Hi"}], FEW),
        lambda: llm.score(PROMPT),
        lambda: llm.tokenize("a text"),
        llm.fill_pads,
    ]

    def try_all() -> str:
        said = set()
        for act in acts:
            try:
                said.add(f"did {act()}")
            except TSQPError as exc:
                said.add(f"{type(exc).__name__}: {exc}")
        llm.close()
        llm.close()
        return "\n".join(said)

    said = in_a_fork(try_all)
    assert said.startswith("UsageError: This LLM belongs to the process that this one was forked")
    assert said.count("\n") == 0
    assert llm.generate([PROMPT], FEW) == expected

    forked: list[str] = []

    def fork_once() -> bool:
        if not forked:
            forked.append("")
            forked[0] = in_a_fork(llm._turns.heed(None))
        return False

    assert llm.generate([PROMPT], FEW, should_stop=fork_once) == expected
    assert forked[0].startswith("UsageError: This LLM belongs")


@pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")
def test_a_fork_that_goes_on_with_an_answer_sends_nothing(commands: Commands) -> None:
    with make(privacy="open", worker="local") as llm:
        expected = llm.generate([PROMPT], FEW)

        reader, writer = os.pipe()
        parent, children = os.getpid(), list[int]()

        def fork_once() -> bool:
            if not children:
                children.append(-1)
                children[0] = os.fork()
            return False

        try:
            assert llm.generate([PROMPT], FEW, should_stop=fork_once) == expected
        except UsageError as exc:
            os.write(writer, str(exc).encode())
        finally:
            if os.getpid() != parent:
                os._exit(0)
        os.close(writer)
        os.waitpid(children[0], 0)
        with os.fdopen(reader) as pipe:
            assert pipe.read().startswith("This LLM belongs to the process")
        assert llm.generate([PROMPT], FEW) == expected


@pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")
def test_a_local_worker_ends_with_its_parent_while_a_fork_lives_on(commands: Commands) -> None:
    llm = make(privacy="pad", worker="local")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.read(reader, 1)  # until the parent has seen enough
        os._exit(0)
    try:
        worker = llm._workers[0]._local
        assert worker is not None
        llm.close()
        assert worker._process.returncode == 0  # it saw the end of its input, and was not killed
    finally:
        os.close(writer)
        os.close(reader)
        os.waitpid(child, 0)


@pytest.mark.parametrize("mode", ["tee", "pad"])
def test_closing_in_another_thread_ends_an_answer(mode: str, commands: Commands) -> None:
    llm = make(**MODES[mode])
    runs = threading.Event()
    threads = [
        threading.Thread(target=lambda: runs.wait(30) and llm.close(), daemon=True)
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()

    def seen() -> bool:
        runs.set()
        return False

    with pytest.raises(UsageError, match="This LLM is closed"):
        llm.generate([PROMPT], ENDLESS, should_stop=seen)
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert not [each for each in commands.processes() if each.pid != os.getpid()]
    with pytest.raises(UsageError, match="This LLM is closed; make a new one"):
        llm.generate([PROMPT], FEW)


def test_closing_in_a_callback_ends_the_answer(commands: Commands) -> None:
    llm = make(privacy="pad", worker="local")
    with pytest.raises(UsageError, match="This LLM is closed"):
        llm.generate([PROMPT], FEW, on_progress=lambda done, total: llm.close())
    assert not [each for each in commands.processes() if each.pid != os.getpid()]


@pytest.mark.parametrize("in_a_cycle", [False, True])
def test_an_llm_that_is_dropped_frees_its_worker_and_its_threads(
    in_a_cycle: bool, commands: Commands
) -> None:
    llm = make(privacy="pad", worker="local")
    assert llm._pads is not None
    thread = llm._pads._thread
    assert len(commands.processes()) > len(
        [each for each in commands.processes() if each.pid == os.getpid()]
    )
    if in_a_cycle:
        llm.itself = llm  # type: ignore[attr-defined]
    del llm
    gc.collect()
    assert eventually(lambda: not thread.is_alive())
    assert eventually(
        lambda: not [each for each in commands.processes() if each.pid != os.getpid()]
    )


def test_an_llm_that_is_dropped_after_a_conversation_ends_without_a_garbage_collection() -> None:
    llm = make(privacy="tee")
    turns, conversation = llm._turns, llm.conversation()
    generate(llm._engine, [[1, 2, 3]], FEW, conversation=conversation)
    gc.disable()
    try:
        del llm
        with pytest.raises(UsageError, match="closed"):
            turns.check()
    finally:
        gc.enable()
    conversation.close()


@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_an_interrupt_anywhere_leaves_a_session_that_answers_and_ends(threads: int) -> None:
    """At many opcodes of everything that pads, rows of one call, and turns go through."""
    prompt = list(range(1, 41))  # enough rows for two threads
    llm = LLM("random:tiny", privacy="pad", worker="inproc", threads=threads, pad_memory=10**6)
    expected = llm.generate([prompt], FEW)
    loop = (engine, interleave, observer, scheduler)
    crypto = (pad_pool, pad_providers, pads, stock, row_pool)
    modules = (turns, *loop, *crypto, masked, pad, channel, kv_cache)

    def run() -> None:
        llm.generate([prompt], FEW)

    interrupted = 0
    for _ in at_every_opcode(run, *modules, first=threads, step=1597):
        interrupted += 1
        assert llm.generate([prompt], FEW) == expected
        assert is_blank(llm)
    assert interrupted > 20
    before = threading.active_count()
    llm.close()
    assert threading.active_count() <= before - threads  # the pads' and, of two, the rows'


@pytest.mark.parametrize("mode", ["open", "pad"])
def test_a_real_interrupt_leaves_an_llm_that_answers(mode: str) -> None:
    """One that comes while a message is sent or taken ends the session, and another one begins."""
    llm = make(**MODES[mode])
    expected = llm.generate([PROMPT], FEW)
    try:
        for number in range(3):
            with pytest.raises(KeyboardInterrupt), interrupt_after(0.002 + 0.02 * number):
                llm.generate([PROMPT], ENDLESS)
            assert llm.generate([PROMPT], FEW) == expected
    finally:
        llm.close()


class Deleted:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGALRM)


def in_a_gc_callback() -> None:
    gc.callbacks.append(interrupted)
    try:
        gc.collect()
    finally:
        gc.callbacks.remove(interrupted)


def interrupted(phase: str, info: dict[str, int]) -> None:
    signal.raise_signal(signal.SIGALRM)


def in_a_weakref_callback() -> None:
    weakref.finalize(threading.Event(), signal.raise_signal, signal.SIGALRM)


@pytest.mark.parametrize("act", [in_a_gc_callback, in_a_weakref_callback, Deleted])
def test_an_interrupt_is_repeated_where_python_would_swallow_it(act: Callable[[], object]) -> None:
    """In `interrupt_after` itself, which the test above relies on."""
    with pytest.raises(KeyboardInterrupt), interrupt_after(60):
        act()
        time.sleep(30)
