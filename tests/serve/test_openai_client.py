"""openai-python, as most users have it."""

import asyncio
from typing import Literal

import pytest
from openai import (
    APIStatusError,
    AsyncOpenAI,
    AuthenticationError,
    BadRequestError,
    OpenAI,
    pydantic_function_tool,
)
from pydantic import BaseModel
from serve_client import KEY, Server

FOREVER = {"extra_body": {"ignore_eos": True}}
HELLO = [{"role": "user", "content": "Hello"}]


class Add(BaseModel):
    """Two numbers to add."""

    a: Literal[1, 2]
    b: Literal[3, 4]


def test_chats_streams_and_completions(client: OpenAI) -> None:
    assert [each.id for each in client.models.list()] == ["tiny", "alias"]
    wanted = {"model": "tiny", "messages": HELLO, "max_tokens": 8, "seed": 1}
    answer = client.chat.completions.create(**wanted, logprobs=True, top_logprobs=3)
    text = answer.choices[0].message.content
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.content or ()) == answer.usage.completion_tokens
    chunks = list(
        client.chat.completions.create(
            **wanted, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].usage.total_tokens == answer.usage.total_tokens  # some are cached now
    assert chunks[-1].choices == []
    assert "".join(each.choices[0].delta.content or "" for each in chunks[:-1]) == text
    completion = client.completions.create(
        model="alias", prompt=["ab", "cd"], max_tokens=3, echo=True, logprobs=1
    )
    assert [each.text[:2] for each in completion.choices] == ["ab", "cd"]
    pieces = client.completions.create(model="tiny", prompt="ab", max_tokens=3, stream=True)
    assert {each.object for each in pieces} == {"text_completion"}


def test_errors_are_those_that_the_client_knows(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "a" * 5000}]
        )
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(APIStatusError) as wrong:
        client.chat.completions.create(model="gpt", messages=HELLO)
    assert wrong.value.status_code == 404


def test_the_helper_for_streams_and_raw_answers(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model="tiny", messages=HELLO, max_tokens=4, **FOREVER
    ) as stream:
        for _ in stream:
            pass
        snapshot = stream.current_completion_snapshot
    assert snapshot.choices[0].finish_reason == "length"
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=HELLO, max_tokens=2, extra_headers={"X-Request-Id": "raw-1"}
    )
    assert raw.headers["x-request-id"] == "raw-1"


def test_the_helper_for_streams_reads_the_arguments_of_a_call(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model="tiny", messages=HELLO, tools=[pydantic_function_tool(Add)], tool_choice="required",
        parallel_tool_calls=False,
    ) as stream:  # fmt: skip
        kinds = [event.type for event in stream]
        [call] = stream.get_final_completion().choices[0].message.tool_calls or ()
    assert kinds[-1] == "tool_calls.function.arguments.done"
    assert "tool_calls.function.arguments.delta" in kinds
    assert isinstance(call.function.parsed_arguments, Add)


def test_the_helpers_for_responses_read_an_object(client: OpenAI) -> None:
    wanted = {"model": "tiny", "input": "Hello", "text_format": Add}
    assert isinstance(client.responses.parse(**wanted).output_parsed, Add)
    with client.responses.stream(**wanted) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[-1] == "response.completed"
    assert isinstance(final.output_parsed, Add)


def test_an_async_client_that_leaves_a_stream_frees_it(server: Server) -> None:
    async def leave() -> None:
        async with AsyncOpenAI(
            base_url=f"http://127.0.0.1:{server.port}/v1", api_key=KEY, max_retries=0
        ) as client:
            stream = await client.chat.completions.create(
                model="tiny", messages=HELLO, max_tokens=4000, stream=True,
                **FOREVER,
            )  # fmt: skip
            async for _ in stream:
                break
            await stream.close()

    asyncio.run(asyncio.wait_for(leave(), 60))
    server.settles(lambda: server.running() == 0)
