"""Answers of this server have the form that OpenAI's own document gives them."""

from collections import Counter
from typing import Any

import pytest
from openai_document import (
    CHAT,
    CHUNK,
    COMPLETION,
    ERROR,
    EVENT,
    EXCEPTIONS,
    MODELS,
    RESPONSE,
    events_of,
    faults,
    only_request,
    read_document,
    with_exceptions,
)
from serve_client import Reply, Server

PARAMETERS = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": PARAMETERS}}
FUNCTION = {"type": "function", "name": "add"}
CALLS = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 50}
LOGPROBS = {"logprobs": True, "top_logprobs": 2}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
SUM = {"format": {"type": "json_schema", "name": "sum", "schema": {"enum": [1, 2]}, "strict": True}}

CHATS: dict[str, dict[str, object]] = {
    "a chat": {},
    "two answers": {"n": 2},
    "log-probabilities": LOGPROBS,
    "calls": CALLS,
    "a stream": USAGE,
    "a stream of two answers": USAGE | {"n": 2},
    "a stream of log-probabilities": USAGE | LOGPROBS,
    "a stream of calls": USAGE | CALLS,
}
COMPLETIONS: dict[str, dict[str, object]] = {
    "a completion": {},
    "an echo with log-probabilities": {"echo": True, "logprobs": 2},
    "a stream of completions": USAGE,
    "a stream of completions with log-probabilities": USAGE | {"logprobs": 2},
}
RESPONSES: dict[str, dict[str, object]] = {
    "a response": {"instructions": "Be brief."},
    "a response with a form": {"text": SUM, "max_output_tokens": 40},
    "a response with calls": {"tools": [FUNCTION], "tool_choice": "required"},
    "a response with a named call": {"tools": [FUNCTION], "tool_choice": FUNCTION},
    "events": {"stream": True},
    "events of calls": {"stream": True, "tools": [FUNCTION], "tool_choice": "required"},
}
WRONG: dict[str, tuple[str, dict[str, object]]] = {
    "a wrong field": ("/v1/chat/completions", {"messages": [], "n": 0}),
    "no such model": ("/v1/completions", {"prompt": "a", "model": "gpt"}),
    "too long": ("/v1/completions", {"prompt": "a" * 5000}),
    "no such response": ("/v1/responses", {"input": "a", "previous_response_id": "resp_1"}),
}
LENGTHS = {
    "/v1/chat/completions": "max_completion_tokens",
    "/v1/completions": "max_tokens",
    "/v1/responses": "max_output_tokens",
}
ANSWERS = {
    "/v1/chat/completions": (CHAT, CHUNK),
    "/v1/completions": (COMPLETION, COMPLETION),
    "/v1/responses": (RESPONSE, EVENT),
}
PROMPTS: dict[str, dict[str, object]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}]},
    "/v1/completions": {"prompt": "Hello"},
    "/v1/responses": {"input": "Hello"},
}
SUPPORTED = {
    "temperature", "top_p", "stream", "logprobs", "echo", "seed", "presence_penalty",
    "frequency_penalty", "user", "instructions", "metadata", "store",
}  # fmt: skip
NAMES = [*CHATS, *COMPLETIONS, *RESPONSES, *WRONG, "models"]

Sample = list[tuple[str, Any]]  # names of schemas, and what has to fit them


@pytest.fixture(scope="session")
def document() -> dict[str, Any]:
    return read_document()


@pytest.fixture(scope="session")
def samples(server: Server) -> dict[str, Sample]:
    """Real answers of each kind."""
    found: dict[str, Sample] = {"models": [(MODELS, server.ask("/v1/models").json)]}
    for name, fields in CHATS.items():
        reply = server.chat(**fields)
        assert reply.status == 200, reply.body
        streams = fields.get("stream", False)
        found[name] = [(CHUNK, x) for x in reply.events] if streams else [(CHAT, reply.json)]
    for name, fields in COMPLETIONS.items():
        reply = server.complete(["ab", "c"], **fields)
        assert reply.status == 200, reply.body
        answers = reply.events if "stream" in fields else [reply.json]
        found[name] = [(COMPLETION, x) for x in answers]
    for name, fields in RESPONSES.items():
        reply = server.ask("/v1/responses", {"input": "Hello", "max_output_tokens": 50} | fields)
        assert reply.status == 200, reply.body
        streams = fields.get("stream", False)
        found[name] = (
            [(EVENT, x) for x in events_of(reply.body.decode())]
            if streams
            else [(RESPONSE, reply.json)]
        )
    for name, (path, body) in WRONG.items():
        reply = server.ask(path, body)
        assert reply.status in (400, 404)
        found[name] = [(ERROR, reply.json)]
    return found


@pytest.fixture(scope="session")
def excepted(document: dict[str, Any]) -> dict[str, Any]:
    return with_exceptions(document, EXCEPTIONS)


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_fits_the_document(
    name: str, samples: dict[str, Sample], excepted: dict[str, Any]
) -> None:
    assert samples[name]
    for schema, value in samples[name]:
        assert list(faults(excepted, schema, value)) == []


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_every_exception_is_needed(
    name: str, samples: dict[str, Sample], document: dict[str, Any]
) -> None:
    others = with_exceptions(document, EXCEPTIONS.keys() - {name})
    assert any(list(faults(others, *each)) for sample in samples.values() for each in sample)


def run_cases(
    server: Server, document: dict[str, Any], excepted: dict[str, Any], path: str, cases: int
) -> Counter[int]:
    """Send that many requests of OpenAI's document to an endpoint, and check every answer.

    Most of them want what this server does not have, so each is sent again without that.

    Returns:
        How many answers had each status.
    """
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings

    statuses: Counter[int] = Counter()
    operation = schemathesis.openapi.from_dict(only_request(document, path))[path]["POST"]

    @given(case=operation.as_strategy())
    @settings(
        max_examples=cases, deadline=None, database=None, derandomize=True,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def send(case: Any) -> None:
        for body in (short(path, case.body), modest(path, case.body)):
            reply = server.ask(path, body)
            statuses[reply.status] += 1
            check(excepted, path, reply)

    send()
    return statuses


def short(path: str, body: object) -> object:
    """A request for the model that there is, and for few tokens."""
    if not isinstance(body, dict):
        return body
    small = {"model": "tiny", LENGTHS[path]: 4}
    return {name: value for name, value in body.items() if name not in LENGTHS.values()} | small


def modest(path: str, body: object) -> object:
    """A prompt that is answered, with those fields of a request that this server has too."""
    given = body if isinstance(body, dict) else {}
    kept = {name: value for name, value in given.items() if name in SUPPORTED}
    return short(path, PROMPTS[path] | kept)


def check(excepted: dict[str, Any], path: str, reply: Reply) -> None:
    """An answer is of OpenAI's form, whole or as a stream, or an error of the client."""
    whole, event = ANSWERS[path]
    if reply.status != 200:
        assert 400 <= reply.status < 500, reply.body
        assert list(faults(excepted, ERROR, reply.json)) == []
    elif reply.headers["content-type"].startswith("text/event-stream"):
        for each in events_of(reply.body.decode()):
            assert list(faults(excepted, event, each)) == []
    else:
        assert list(faults(excepted, whole, reply.json)) == []


@pytest.mark.parametrize("path", ANSWERS)
@pytest.mark.filterwarnings("ignore")
def test_requests_of_the_document_get_its_answers(
    path: str, server: Server, document: dict[str, Any], excepted: dict[str, Any]
) -> None:
    assert run_cases(server, document, excepted, path, 10)[200] >= 3


@pytest.mark.slow
@pytest.mark.parametrize("path", ANSWERS)
@pytest.mark.filterwarnings("ignore")
def test_hundreds_of_requests_of_the_document(
    path: str, server: Server, document: dict[str, Any], excepted: dict[str, Any]
) -> None:
    assert run_cases(server, document, excepted, path, 300)[200] >= 100
