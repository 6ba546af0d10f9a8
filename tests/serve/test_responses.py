"""`/v1/responses`: a chat by another name, without a state."""

import pytest
from openai import BadRequestError, OpenAI
from serve_client import KEY, Server

SYSTEM, HELLO = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=KEY, max_retries=0)


def test_an_answer_is_that_of_the_chat(server: Server, client: OpenAI) -> None:
    [choice] = server.chat(messages=[SYSTEM, HELLO], temperature=0, max_tokens=8).json["choices"]
    wanted = {"model": "tiny", "temperature": 0, "max_output_tokens": 8}
    answer = client.responses.create(**wanted, input="Hello", instructions="Be brief.")
    assert answer.output_text == choice["message"]["content"]
    assert answer.usage is not None and answer.usage.input_tokens > 0
    parts = [{"type": "input_text", "text": "Hello"}]
    items = [SYSTEM, {"type": "message", "role": "user", "content": parts}]
    assert client.responses.create(**wanted, input=items).output_text == answer.output_text
    developer = [{"role": "developer", "content": "Be brief."}, {"type": "reasoning"}, HELLO]
    assert client.responses.create(**wanted, input=developer).output_text == answer.output_text


def test_a_stream_has_the_events_of_openai(client: OpenAI) -> None:
    wanted = {"model": "tiny", "temperature": 0, "max_output_tokens": 8, "input": "Hello"}
    whole = client.responses.create(**wanted)
    with client.responses.stream(**wanted) as stream:
        events = list(stream)
    final = events[-1].response
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    ends = ["response.output_text.done", "response.content_part.done", "response.output_item.done"]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [*ends, f"response.{whole.status}"]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == final.output_text == whole.output_text
    assert final.usage == whole.usage


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"previous_response_id": "resp_1"}, "keeps no conversations"),
        ({"conversation": "conv_1"}, "keeps no conversations"),
        ({"background": True}, "in the background"),
        ({"tools": [{"type": "web_search"}]}, "does not support tools"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format"),
        ({"input": [{"type": "item_reference", "id": "1"}]}, "Item 0 of the input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "not text"),
        ({"input": [{"type": "reasoning"}]}, "no messages"),
        ({"input": "a" * 5000}, "maximum context length"),
        ({"temperature": -1}, "temperature"),
    ],
)  # fmt: skip
def test_what_needs_a_state_or_is_wrong_is_refused(
    client: OpenAI, fields: dict[str, object], said: str
) -> None:
    with pytest.raises(BadRequestError, match=said):
        client.responses.create(**({"model": "tiny", "input": "Hello"} | fields))  # type: ignore[call-overload]
