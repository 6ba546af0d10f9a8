"""Answers of a form, and calls of tools, as openai-python sees them."""

import json
from collections.abc import Iterable
from typing import Any, Literal

import jsonschema
import pytest
from openai import OpenAI
from pydantic import BaseModel
from serve_client import Server

from tsqp.errors import UsageError
from tsqp.serve.answer_form import answer_form
from tsqp.serve.errors import APIError
from tsqp.serve.options import ServeOptions

ASKED = [{"role": "user", "content": "What is 1 + 2?"}]
NUMBER = {"enum": [1, 2, 30]}


def tool(name: str, **properties: object) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


ADD, NOW = tool("add", a=NUMBER, b=NUMBER), tool("now")
TOOLS = [ADD, NOW]
NAMED = {"type": "function", "function": {"name": "add"}}
WANTED: dict[str, Any] = {"model": "tiny", "messages": ASKED, "tools": TOOLS}


class Sum(BaseModel):
    total: Literal[3, 4]
    parts: tuple[Literal[1], Literal[2]]
    is_sure: bool


def bias(server: Server, text: str) -> dict[str, int]:
    """Makes these characters come wherever they may, whatever the weights are."""
    return {str(each): 100 for each in server.ask("/tokenize", {"prompt": text}).json["tokens"]}


def check_calls(calls: Iterable[Any], names: set[str]) -> None:
    found = {each["function"]["name"]: each["function"] for each in (TOOLS)}
    for call in calls:
        assert call.type == "function"
        assert call.id.isalnum() and len(call.id) == 9
        assert call.function.name in names
        arguments = json.loads(call.function.arguments)
        jsonschema.validate(arguments, found[call.function.name]["parameters"])


def test_a_class_is_a_form_whose_answers_are_its_objects(client: OpenAI) -> None:
    answer = client.chat.completions.parse(model="tiny", messages=ASKED, response_format=Sum, n=3)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        assert choice.message.parsed is not None and choice.message.parsed.total in (3, 4)
    with client.chat.completions.stream(
        model="tiny", messages=ASKED, response_format=Sum
    ) as stream:
        message = stream.get_final_completion().choices[0].message
    assert isinstance(message.parsed, Sum)


def test_completions_have_forms_and_json_objects_are_objects(server: Server) -> None:
    schema = {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 2}
    form = {"type": "json_schema", "json_schema": {"name": "pair", "schema": schema}}
    for choice in server.complete(["a", "b"], response_format=form, max_tokens=99).json["choices"]:
        jsonschema.validate(json.loads(choice["text"]), schema)
    [choice] = server.chat(
        response_format={"type": "json_object"}, temperature=0, logit_bias=bias(server, "}")
    ).json["choices"]
    assert isinstance(json.loads(choice["message"]["content"]), dict)


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_calls_that_must_be_made_are_made_and_valid(client: OpenAI, choice: Any) -> None:
    answer = client.chat.completions.create(
        **WANTED, tool_choice=choice, n=3, parallel_tool_calls=False, logprobs=True
    )
    for each in answer.choices:
        assert each.finish_reason == "tool_calls"
        assert each.message.content is None
        assert each.logprobs is not None and each.logprobs.content
        assert len(each.message.tool_calls or ()) == 1
        check_calls(each.message.tool_calls or (), {"add"} if choice == NAMED else {"add", "now"})


def test_a_stream_gives_the_name_of_a_call_and_then_its_arguments(client: OpenAI) -> None:
    wanted = WANTED | {"tool_choice": NAMED, "seed": 5}
    [whole] = client.chat.completions.create(**wanted).choices
    chunks = [each.choices[0] for each in client.chat.completions.create(**wanted, stream=True)]
    pieces = [each.delta.tool_calls[0] for each in chunks if each.delta.tool_calls]
    assert chunks[0].delta.role == "assistant"
    assert [each.finish_reason for each in chunks if each.finish_reason] == ["tool_calls"]
    assert not any(each.delta.content for each in chunks)
    first, *rest = pieces
    assert (first.index, first.type, first.function.name) == (0, "function", "add")
    assert first.id and first.function.arguments == ""
    assert len(rest) > 1
    for each in rest:
        assert (each.index, each.id, each.function.name) == (0, None, None)
    text = "".join(each.function.arguments for each in rest)
    assert whole.message.tool_calls is not None
    assert text == whole.message.tool_calls[0].function.arguments
    with client.chat.completions.stream(**wanted) as stream:
        message = stream.get_final_completion().choices[0].message
    check_calls(message.tool_calls or (), {"add"})


def test_calls_and_their_results_go_back_into_the_conversation(
    client: OpenAI, server: Server
) -> None:
    [choice] = client.chat.completions.create(**WANTED, tool_choice=NAMED).choices
    sent = choice.message.model_dump(exclude_none=True)
    call = sent["tool_calls"][0]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "3"}
    messages = [*ASKED, sent, result]
    again = client.chat.completions.create(**WANTED | {"messages": messages}, max_tokens=4)
    assert again.choices[0].finish_reason in ("length", "stop")
    ids = server.ask("/tokenize", {"messages": messages, "tools": TOOLS}).json["tokens"]
    assert len(ids) == again.usage.prompt_tokens
    text = server.ask("/detokenize", {"tokens": ids}).json["prompt"]
    shown = {"name": "add", "arguments": json.loads(call["function"]["arguments"])}
    assert f"<tool_call>\n{json.dumps(shown)}\n</tool_call>" in text
    assert json.dumps(ADD) in text


def test_with_auto_and_none_an_answer_may_be_text(server: Server) -> None:
    for choice in ("auto", "none", None):
        [found] = server.chat(
            tools=TOOLS,
            tool_choice=choice,
            max_tokens=3,
            temperature=0,
            logit_bias=bias(server, "<"),
        ).json["choices"]
        assert found["message"] == {"role": "assistant", "content": "<<<", "refusal": None}


def test_a_form_beside_tools_is_the_form_of_answers_that_call_nothing(
    client: OpenAI, server: Server
) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "no", "schema": {"enum": ["no"]}}}
    wanted = WANTED | {"response_format": form, "parallel_tool_calls": False}
    for choice, begin in (("auto", "<"), ("auto", '"'), ("none", "<")):
        [found] = client.chat.completions.create(
            **wanted, tool_choice=choice, logit_bias=bias(server, begin)
        ).choices
        if choice == "auto" and begin == "<":
            assert found.finish_reason == "tool_calls"
            check_calls(found.message.tool_calls or (), {"add", "now"})
        else:
            assert (found.message.content, found.finish_reason) == ('"no"', "stop")


def test_an_answer_that_is_cut_in_a_call_says_so(server: Server) -> None:
    length = len('<tool_call>\n{"name": "add", "arguments": {"a')  # a token for each character
    [choice] = server.chat(tools=[ADD], tool_choice="required", max_tokens=length).json["choices"]
    assert choice["finish_reason"] == "length"
    [call] = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "add"
    assert call["function"]["arguments"].startswith("{") and len(call["function"]["arguments"]) == 3


def test_a_model_whose_style_is_not_known_says_what_to_do() -> None:
    llm: Any = None
    with pytest.raises(APIError, match="leave tools out, set tool_choice to none") as caught:
        answer_form(llm, None, None, TOOLS, None, parallel=None)
    assert (caught.value.status, caught.value.body.error.param) == (400, "tools")
    assert answer_form(llm, None, None, TOOLS, "none", parallel=None).tools is None
    with pytest.raises(UsageError, match="no such tool call parser"):
        ServeOptions(tool_call_parser="none")
