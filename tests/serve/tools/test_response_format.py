"""OpenAI's response formats become structured outputs."""

import json
from typing import Any

import pytest

from tsqp.errors import PromptError
from tsqp.serve.tools import structured_outputs_of

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "uniqueItems": True}


@pytest.mark.parametrize("given", [None, {"type": "text"}])
def test_text_has_no_form(given: Any) -> None:
    assert structured_outputs_of(given) is None


def test_json_objects_and_schemas() -> None:
    found = structured_outputs_of({"type": "json_object"})
    assert found is not None
    assert found.json == '{"type": "object"}'
    inner = {"name": "n", "schema": SCHEMA, "strict": True}
    for given in ({"type": "json_schema", "json_schema": inner}, {"type": "json_schema", **inner}):
        found = structured_outputs_of(given)
        assert found is not None
        assert isinstance(found.json, str)
        assert json.loads(found.json) == SCHEMA


@pytest.mark.parametrize("strict", [None, False])
def test_without_strict_a_schema_is_enforced_as_far_as_possible(strict: bool | None) -> None:
    given = {"type": "json_schema", "json_schema": {"schema": SCHEMA, "strict": strict}}
    found = structured_outputs_of(given)
    assert found is not None
    assert found.grammar is not None
    schema = json.loads(found.grammar.removeprefix("start: %json "))
    assert schema.pop("x-guidance")["lenient"] is True
    assert schema == SCHEMA


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("json", "must be an object"),
        ({}, r"response_format\.type must be"),
        ({"type": "secret"}, r"response_format\.type must be"),
        ({"type": "json_schema"}, "must have a schema"),
        ({"type": "json_schema", "json_schema": []}, "must have a schema"),
        ({"type": "json_schema", "json_schema": {"schema": "{}"}}, "must have a schema"),
        (
            {"type": "json_schema", "json_schema": {"schema": {}, "strict": "yes"}},
            "has a strict that is not",
        ),
        ({"type": "json_schema", "json_schema": {"schema": {"a": {1}}}}, "value of type set"),
    ],
)
def test_other_formats_are_refused(given: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message) as refused:
        structured_outputs_of(given)
    assert "secret" not in str(refused.value)
