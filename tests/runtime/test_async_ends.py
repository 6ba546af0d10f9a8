"""How an `AsyncLLM` ends, and what becomes of requests whose worker is lost or lies."""

import asyncio
import gc
import threading
import time
from typing import Any

import pytest
from async_helpers import DEADLINE_S, ENDLESS, FEW, MODEL, PROMPTS, complete, run, settles
from protocol_helpers import Commands, eventually

from tsqp import AsyncLLM, SamplingParams
from tsqp.errors import IntegrityError, PromptTooLong, TSQPError, UsageError, WorkerLost
from tsqp.runtime import engine_thread
from tsqp.wire import client


def test_close_fails_what_runs_and_ends_the_thread() -> None:
    async def close() -> AsyncLLM:
        async with AsyncLLM(MODEL, privacy="tee", threads=1, max_model_len=100) as llm:
            with pytest.raises(PromptTooLong, match="maximum context length is 100"):
                await llm.add([1] * 100, FEW).accepted()
            stream = llm.add(PROMPTS[0], FEW)
            running = llm.add(PROMPTS[1], SamplingParams(max_tokens=90, ignore_eos=True))
            await running.accepted()
            waiting = asyncio.create_task(llm.drain())
            await asyncio.sleep(0)
            assert llm.status in ("draining", "ready")
            with pytest.raises(UsageError, match="about to end"):
                llm.add(PROMPTS[0], FEW)
            await stream.completions()
            await running.aclose()
            assert await waiting
        assert llm.status == "closed"
        with pytest.raises(UsageError, match="is closed"):
            llm.add(PROMPTS[0], FEW)
        return llm

    llm = run(close())
    llm.close()
    assert llm._thread._thread is not None
    assert not llm._thread._thread.is_alive()


def test_closing_does_not_wait_for_a_long_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends before its next operation, of which a step has dozens."""
    started = 0

    async def close() -> None:
        llm = AsyncLLM(MODEL, privacy="tee", threads=1)
        start = llm._model.offload.start

        def slowly(request: Any) -> Any:
            nonlocal started
            started += 1
            time.sleep(0.05)
            return start(request)

        monkeypatch.setattr(llm._model.offload, "start", slowly)
        stream = llm.add(PROMPTS[0], ENDLESS)
        await settles(lambda: started > 0)
        before = started
        await asyncio.to_thread(llm.close)
        assert started <= before + 3
        with pytest.raises(UsageError, match="was closed before"):
            await stream.completions()

    run(close())


def test_an_operation_that_does_not_end_is_waited_for_once_and_all_is_closed_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_thread, "JOIN_S", 0.2)
    begun, go_on, closed = threading.Event(), threading.Event(), list[str]()

    def hang(_: object) -> None:
        begun.set()
        assert go_on.wait(DEADLINE_S)
        raise WorkerLost("it is gone")

    async def close() -> None:
        llm = AsyncLLM(MODEL, privacy="tee", threads=1)
        llm._ends.add(lambda: closed.append(threading.current_thread().name))
        monkeypatch.setattr(llm._model.offload, "start", hang)
        stream = llm.add(PROMPTS[0], FEW)
        await settles(begun.is_set)
        with pytest.raises(UsageError, match="still computing"):
            await asyncio.to_thread(llm.close)
        monkeypatch.setattr(engine_thread, "JOIN_S", DEADLINE_S)
        await asyncio.to_thread(llm.close)  # at once
        assert not closed
        go_on.set()
        with pytest.raises(TSQPError):
            await stream.completions()
        await settles(lambda: closed == ["tsqp-engine"])
        assert llm.status == "closed"

    run(close())


def test_a_request_that_comes_while_it_closes_is_refused_and_not_forgotten() -> None:
    async def late() -> None:
        llm = AsyncLLM(MODEL, privacy="tee", threads=1)
        stream = llm.add(PROMPTS[0], FEW)
        await stream.accepted()
        llm._thread.close()  # and `llm` does not know it yet
        llm._thread.status = "ready"
        with pytest.raises(UsageError, match="was closed before"):
            await llm.add(PROMPTS[0], FEW).completions()
        with pytest.raises(UsageError, match="was closed before"):
            await llm.add("a text", FEW).completions()
        llm.close()

    run(late())


def test_what_nobody_holds_any_more_is_closed() -> None:
    llm = AsyncLLM(MODEL, privacy="tee", threads=1)
    thread = llm._thread._thread
    assert thread is not None and thread.is_alive()
    del llm
    gc.collect()
    assert eventually(lambda: not thread.is_alive())


def test_a_lost_worker_is_started_again_under_running_requests(commands: Commands) -> None:
    async def lose() -> None:
        async with AsyncLLM(
            MODEL, privacy="pad", worker="local", threads=1, pad_memory=2**20
        ) as llm:
            params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
            [quiet] = await llm.add(PROMPTS[0], params).completions()
            stream = llm.add(PROMPTS[0], params)
            await stream.__anext__()
            local = llm._model.workers[0]._local
            assert local is not None
            local._process.kill()
            [again] = await stream.completions()
            assert again == quiet
            assert (llm.status, llm.reconnects) == ("ready", 1)

    run(lose())


def test_a_worker_that_stays_away_is_an_error_in_bounded_time_and_is_found_when_it_is_back(
    commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = commands.worker(MODEL, commands.ipc())

    async def lose() -> None:
        async with AsyncLLM(
            MODEL, privacy="pad", worker=commands.ipc(), threads=1, reconnect_s=0.5, pad_memory=0
        ) as llm:
            expected = await complete(llm)
            monkeypatch.setattr(client, "CONNECT_S", 0.5)
            worker.send(9)  # type: ignore[arg-type]
            await asyncio.to_thread(worker.ends)
            with pytest.raises(WorkerLost):
                await complete(llm)
            assert llm.status == "lost"
            with pytest.raises(WorkerLost, match="try again later"):
                llm.add(PROMPTS[0], FEW)
            await asyncio.to_thread(commands.worker, MODEL, commands.ipc())
            await settles(lambda: llm.is_healthy)
            assert await complete(llm) == expected

    run(lose())


def test_after_a_wrong_answer_nothing_is_ever_computed_again(
    commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lie() -> None:
        async with AsyncLLM(MODEL, privacy="pad", worker="inproc", threads=1, pad_memory=0) as llm:
            assert await complete(llm)
            error = IntegrityError("the product is wrong")
            with monkeypatch.context() as patch:

                def raise_it(*_: object) -> None:
                    raise error

                patch.setattr(type(llm._model.engine), "_run", raise_it)
                with pytest.raises(IntegrityError, match="the product is wrong"):
                    await complete(llm)
            assert (llm.status, llm.is_healthy) == ("failed", False)
            with pytest.raises(IntegrityError, match="the product is wrong"):
                llm.add(PROMPTS[0], FEW)

    run(lie())
