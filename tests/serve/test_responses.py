"""`/v1/responses`: a chat by another name, without a state."""

import json

import jsonschema
import pytest
from openai import BadRequestError, OpenAI
from serve_client import Server

SYSTEM, HELLO = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}


FUNCTION = {
    "type": "function",
    "name": "add",
    "parameters": {"properties": {"a": {"enum": [1, 2]}}, "required": ["a"]},
}
SUM = {
    "type": "object",
    "properties": {"sum": {"enum": [3, 4]}, "sure": {"type": "boolean"}},
    "required": ["sum", "sure"],
    "additionalProperties": False,
}


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
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert final.usage.input_tokens == whole.usage.input_tokens  # some of them cached now


def test_a_schema_holds_the_answer_and_is_given_back(client: OpenAI) -> None:
    form = {"format": {"type": "json_schema", "name": "sum", "schema": SUM, "strict": True}}
    answer = client.responses.create(model="tiny", input="1 + 2?", text=form)
    jsonschema.validate(json.loads(answer.output_text), SUM)
    assert answer.text.model_dump(by_alias=True, exclude_unset=True) == form


def test_calls_are_items_that_may_be_sent_back_with_their_outputs(client: OpenAI) -> None:
    wanted = {"model": "tiny", "tools": [FUNCTION], "tool_choice": "required", "temperature": 0}
    asked = [{"role": "user", "content": "1 + 2?"}]
    answer = client.responses.create(**wanted, input=asked, parallel_tool_calls=False)
    [call] = answer.output
    assert (call.type, call.name, answer.status) == ("function_call", "add", "completed")
    assert json.loads(call.arguments)["a"] in (1, 2)
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "3"}
    again = client.responses.create(
        **(wanted | {"tool_choice": "none"}), input=[*asked, call, output], max_output_tokens=4
    )
    assert [item.type for item in again.output] == ["message"]
    assert again.usage.input_tokens > answer.usage.input_tokens


def test_a_stream_of_calls_has_the_events_of_openai(client: OpenAI) -> None:
    with client.responses.stream(
        model="tiny", tools=[FUNCTION], tool_choice={"type": "function", "name": "add"},
        input="1 + 2?", temperature=0,
    ) as stream:  # fmt: skip
        events = list(stream)
    [call] = events[-1].response.output
    kinds = [event.type for event in events]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert kinds[2] == "response.output_item.added"
    assert kinds[-3:] == [
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert set(kinds[3:-3]) == {"response.function_call_arguments.delta"}
    assert "".join(event.delta for event in events[3:-3]) == call.arguments
    assert json.loads(call.arguments)["a"] in (1, 2)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"previous_response_id": "resp_1"}, "keeps no conversations"),
        ({"conversation": "conv_1"}, "keeps no conversations"),
        ({"background": True}, "in the background"),
        ({"tools": [{"type": "web_search"}]}, "Item 0 of tools is not a function"),
        ({"tools": [FUNCTION], "tool_choice": "add"}, "tool_choice must be"),
        ({"tool_choice": "required"}, "only allowed with tools"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type must be"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "must have a schema"),
        ({"input": [{"type": "function_call", "name": "add"}]}, "Item 0 of the input has no arg"),
        (
            {"input": [{"type": "function_call", "call_id": "1", "name": "a", "arguments": "x"}]},
            "not the JSON text of an object",
        ),
        ({"input": [{"type": "function_call_output", "output": 1}]}, "not text"),
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
