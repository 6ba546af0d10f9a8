"""What tests of an `AsyncLLM` share."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from tsqp import AsyncLLM, SamplingParams

T = TypeVar("T")

MODEL = "random:tiny"
DEADLINE_S = 60.0
FEW = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, max_tokens=1900, ignore_eos=True)
PROMPTS = [[1, 2, number] for number in range(3, 11)]


def run(work: Awaitable[T]) -> T:
    async def in_time() -> T:
        return await asyncio.wait_for(work, DEADLINE_S)

    return asyncio.run(in_time())


async def settles(condition: Callable[[], bool]) -> None:
    while not condition():  # `run` has the deadline
        await asyncio.sleep(0.005)


async def complete(llm: AsyncLLM) -> tuple[int, ...]:
    [completion] = await llm.add(PROMPTS[0], FEW).completions()
    return completion.token_ids
