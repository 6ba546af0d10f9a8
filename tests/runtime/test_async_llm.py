"""AsyncLLM: many requests on one event loop, each of which may end or fail by itself."""

import asyncio
import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from async_helpers import DEADLINE_S, ENDLESS, FEW, MODEL, PROMPTS, complete, run, settles
from protocol_helpers import eventually
from torch import Tensor

from tsqp import (
    LLM,
    AnswerStream,
    AsyncLLM,
    Completion,
    RequestStats,
    SamplingParams,
    StructuredOutputsParams,
)
from tsqp.errors import (
    NumericalError,
    PromptError,
    PromptTooLong,
    QueueFull,
    TSQPError,
    UsageError,
)
from tsqp.tee.sampler import Sampler


class Watcher:
    """Counts what an observer is told."""

    def __init__(self) -> None:
        self.first = 0
        self.next = 0
        self.stats: list[RequestStats] = []

    def first_token(self, seconds: float) -> None:
        assert seconds >= 0
        self.first += 1

    def next_token(self, seconds: float) -> None:
        assert seconds >= 0
        self.next += 1

    def ended(self, stats: RequestStats) -> None:
        self.stats.append(stats)


@pytest.fixture(scope="module")
def watcher() -> Watcher:
    return Watcher()


@pytest.fixture(scope="module")
def llm(watcher: Watcher) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(
        MODEL,
        privacy="tee",
        threads=1,
        max_num_seqs=4,
        max_num_queued_reqs=8,
        observer=watcher,
    )
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def expected() -> list[Completion]:
    with LLM(MODEL, privacy="tee", threads=1) as llm:
        return llm.generate(PROMPTS, FEW)


def is_idle(llm: AsyncLLM) -> bool:
    return llm.num_running == 0 and llm.num_waiting == 0


def test_requests_at_once_get_the_answers_of_an_llm(
    llm: AsyncLLM, expected: list[Completion]
) -> None:
    async def all_of_them() -> list[list[Completion]]:
        streams = [llm.add(prompt, FEW) for prompt in PROMPTS]
        return list(await asyncio.gather(*(stream.completions() for stream in streams)))

    assert [found for [found] in run(all_of_them())] == expected


def test_a_grammar_is_compiled_neither_in_the_event_loop_nor_by_the_engine(
    llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []

    def compile(_: SamplingParams) -> None:
        threads.append(threading.current_thread().name)
        raise PromptError("no such grammar")

    monkeypatch.setattr(llm._model.engine, "compile", compile)
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"))

    async def refused() -> None:
        with pytest.raises(PromptError, match="no such grammar"):
            await llm.add(PROMPTS[0], params).accepted()

    run(refused())
    [name] = threads
    assert name.startswith("tsqp-grammar")
    assert is_idle(llm)


def test_the_pieces_of_a_stream_add_up_to_the_answer(llm: AsyncLLM) -> None:
    params = SamplingParams(seed=1, n=2, max_tokens=5, ignore_eos=True, logprobs=2)

    async def pieces() -> tuple[list[Any], AnswerStream]:
        stream = llm.add(PROMPTS[0], params, request_id="mine")
        return [each async for each in stream], stream

    found, stream = run(pieces())
    assert stream.request_id == "mine"
    assert stream.usage.prompt_tokens == 3
    assert stream.usage.completion_tokens == 10
    for index in range(2):
        mine = [each for each in found if each.index == index]
        completion = mine[-1].completion
        assert completion.index == index
        assert mine[-1].finish_reason == completion.finish_reason == "length"
        assert all(each.finish_reason is None for each in mine[:-1])
        assert sum((each.token_ids for each in mine), ()) == completion.token_ids
        assert sum((each.logprobs for each in mine), ()) == completion.logprobs


def test_a_reader_that_lags_gets_what_was_added_meanwhile_at_once(llm: AsyncLLM) -> None:
    async def late() -> int:
        stream = llm.add(PROMPTS[0], FEW)
        await settles(lambda: len(stream._request.pending) == FEW.max_tokens + 1)
        return len([each async for each in stream])

    assert run(late()) == 1


@pytest.mark.parametrize("way", ["break", "close", "cancel", "drop", "abort"])
def test_a_reader_that_stops_frees_its_sequence(
    llm: AsyncLLM, watcher: Watcher, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = Sampler.sample

    def slowly(sampler: Sampler, logits_V: Tensor) -> int:
        time.sleep(0.02)  # so that it could not end by itself in time
        return sample(sampler, logits_V)

    monkeypatch.setattr(Sampler, "sample", slowly)

    async def stop() -> None:
        stream: AnswerStream | None = llm.add([1, 2, 3], ENDLESS)
        assert stream is not None
        if way == "break":
            async for _ in stream:
                break
            stream = None  # as the temporary of `async for _ in llm.add(...)`
        elif way == "cancel":
            task = asyncio.create_task(stream.completions())
            await settles(lambda: llm.num_running == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            await stream.__anext__()
            await {"close": stream.aclose, "abort": lambda: llm.abort(stream)}.get(
                way, stream.accepted
            )()
            stream = None
        gc.collect()
        await settles(lambda: is_idle(llm) and bool(watcher.stats))

    watcher.stats.clear()
    run(stop())
    [stats] = watcher.stats
    assert stats.finish_reasons == ("abort",)
    assert stats.completion_tokens < 500


def test_a_wrong_request_is_its_own_error_and_raised_before_any_output(llm: AsyncLLM) -> None:
    async def refuse() -> None:
        good = llm.add(PROMPTS[0], FEW)
        with pytest.raises(PromptTooLong, match="maximum context length is 512"):
            await llm.add([1] * 5000, FEW).accepted()
        with pytest.raises(PromptError, match="outside the model's vocabulary"):
            await llm.add([10**6], FEW).completions()
        with pytest.raises(TSQPError, match="no tokenizer"):
            await llm.add("a text", FEW).completions()
        with pytest.raises(PromptError, match="must be a text, token ids"):
            llm.add(3, FEW)  # type: ignore[arg-type]
        await good.accepted()
        assert len(await good.completions()) == 1
        await settles(lambda: is_idle(llm))

    run(refuse())


def test_an_error_of_one_request_leaves_the_others_alone(
    llm: AsyncLLM, expected: list[Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = Sampler.sample

    def fail_for_one(sampler: Sampler, logits_V: Tensor) -> int:
        if sampler._params.seed == 13:
            raise NumericalError("not a number")
        return sample(sampler, logits_V)

    monkeypatch.setattr(Sampler, "sample", fail_for_one)

    async def one_of_two() -> None:
        good = llm.add(PROMPTS[0], FEW)
        bad = llm.add(PROMPTS[1], SamplingParams(seed=13))
        with pytest.raises(NumericalError):
            await bad.completions()
        assert await good.completions() == [expected[0]]

    run(one_of_two())
    assert llm.is_healthy


def test_a_fault_of_the_program_ends_its_requests_and_nothing_else(
    llm: AsyncLLM, expected: list[Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Sampler, "sample", lambda *_: 1 // 0)
            with pytest.raises(TSQPError, match="Unexpected ZeroDivisionError"):
                await llm.add(PROMPTS[0], FEW).completions()
        assert await llm.add(PROMPTS[0], FEW).completions() == [expected[0]]

    run(fail())


def test_a_full_queue_refuses_and_takes_again_when_there_is_room(llm: AsyncLLM) -> None:
    async def fill() -> None:
        streams = [llm.add(PROMPTS[0], ENDLESS) for _ in range(4 + 8)]
        await asyncio.gather(*(stream.accepted() for stream in streams))
        with pytest.raises(QueueFull, match="Too many requests"):
            llm.add(PROMPTS[0], FEW)
        for stream in streams:
            await stream.aclose()
        await settles(lambda: is_idle(llm))
        assert await llm.add(PROMPTS[0], FEW).completions()

    run(fill())


def test_a_tenant_leaves_places_for_others_where_they_share_the_queue() -> None:
    async def fill() -> None:
        async with AsyncLLM(
            MODEL, privacy="tee", threads=1, max_num_seqs=1, max_num_queued_reqs=4, share_queue=True
        ) as llm:
            streams = [llm.add(PROMPTS[0], ENDLESS, tenant="a") for _ in range(1 + 2)]
            await asyncio.gather(*(stream.accepted() for stream in streams))
            with pytest.raises(QueueFull, match="of your own"):
                llm.add(PROMPTS[0], FEW, tenant="a")
            with llm.admit(1, "b") as place:
                other = llm.add(PROMPTS[0], FEW, tenant="b", place=place)
            for stream in streams:
                await stream.aclose()
            assert len(await other.completions()) == 1

    run(fill())


def test_a_grammar_that_compiles_slowly_keeps_its_own_tenant_waiting_only(
    llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of tenants are compiled in turn."""
    begun, go_on, order = threading.Event(), threading.Event(), list[str]()

    def compile(params: SamplingParams) -> None:
        assert params.stop_token_ids is not None
        order.append("ab"[params.stop_token_ids[0]])
        begun.set()
        assert go_on.wait(DEADLINE_S)
        raise PromptError("no such grammar")

    monkeypatch.setattr(llm._model.engine, "compile", compile)

    def ask(tenant: str) -> AnswerStream:
        form = StructuredOutputsParams(regex="a")
        params = SamplingParams(structured_outputs=form, stop_token_ids=["ab".index(tenant)])
        return llm.add(PROMPTS[0], params, tenant=tenant)

    async def ask_all() -> None:
        streams = [ask(tenant) for tenant in "aaab"]
        await settles(begun.is_set)
        go_on.set()
        for stream in streams:
            with pytest.raises(PromptError):
                await stream.accepted()

    run(ask_all())
    assert order == ["a", "a", "b", "a"] or order == ["a", "b", "a", "a"]


def test_a_request_that_is_given_up_before_it_is_tokenized_frees_its_place(
    llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def encode(*_: object) -> None:
        assert go_on.wait(DEADLINE_S)
        raise PromptError("no text")

    monkeypatch.setattr(llm._model.tokenizer, "encode", encode)

    async def give_up() -> None:
        busy = [llm.add("a text", FEW) for _ in range(2)]  # as many as there are threads
        waiting = [llm.add("a text", FEW) for _ in range(10)]
        with pytest.raises(QueueFull):
            llm.add("a text", FEW)
        for stream in waiting:
            await stream.aclose()
        await settles(lambda: llm.num_waiting == 2)
        go_on.set()
        for stream in busy:
            with pytest.raises(PromptError, match="no text"):
                await stream.accepted()

    run(give_up())
    assert is_idle(llm)


def test_the_observer_is_told_of_every_token(llm: AsyncLLM, watcher: Watcher) -> None:
    watcher.__init__()  # type: ignore[misc]
    run(complete(llm))
    assert (watcher.first, watcher.next) == (1, FEW.max_tokens - 1)
    [stats] = watcher.stats
    assert stats.finish_reasons == ("length",)
    assert (stats.prompt_tokens, stats.completion_tokens) == (3, FEW.max_tokens)
    assert stats.queue_s is not None and stats.prefill_s is not None and stats.decode_s is not None
    assert 0 <= stats.queue_s <= stats.queue_s + stats.prefill_s + stats.decode_s <= stats.e2e_s


def test_the_probabilities_of_the_prompt_come_with_the_first_tokens_of_each_answer(
    llm: AsyncLLM,
) -> None:
    params = SamplingParams(
        seed=1, n=2, max_tokens=5, ignore_eos=True, logprobs=1, prompt_logprobs=1
    )

    async def pieces() -> list[Any]:
        return [each async for each in llm.add(PROMPTS[0], params)]

    found = run(pieces())
    for index in range(2):
        mine = [each for each in found if each.index == index]
        assert mine[0].prompt_logprobs == mine[-1].completion.prompt_logprobs
        assert len(mine[0].prompt_logprobs) == 3
        assert all(each.prompt_logprobs is None for each in mine[1:])


def test_an_event_loop_that_has_ended_leaves_nothing_running(llm: AsyncLLM) -> None:
    kept: list[AnswerStream] = []

    async def leave() -> None:
        kept.append(llm.add(PROMPTS[0], ENDLESS))
        await kept[0].__anext__()

    run(leave())
    assert eventually(lambda: is_idle(llm))
    assert run(complete(llm))


def test_it_needs_an_event_loop(llm: AsyncLLM) -> None:
    with pytest.raises(UsageError, match="running event loop"):
        llm.add(PROMPTS[0], FEW)
