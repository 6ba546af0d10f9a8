"""Requests made from the server's own OpenAPI document: no 500, and no answer of another form."""

import json
from typing import Any

import pytest
from serve_client import DEADLINE_S, KEY, Server

PATHS = [
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize",
]  # fmt: skip


def run_cases(server: Server, cases: int) -> int:
    """Send that many generated requests to each endpoint; returns how many there were."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    document = server.ask("/openapi.json").json
    document["components"]["schemas"] = _small(document["components"]["schemas"])
    schema = schemathesis.openapi.from_dict(document)
    sent: list[str] = []

    def answers(context: Any, response: Any, case: Any) -> bool | None:
        """No 5xx, but 503 of a full queue, which a slow machine may have."""
        if response.status_code == 503 and b'"queue_full"' in response.content:
            return None
        return not_a_server_error(context, response, case)

    for result in schema.get_all_operations():
        operation = result.ok()

        @given(case=operation.as_strategy())
        @settings(
            max_examples=cases, deadline=None, database=None, derandomize=True,
            phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        def send(case: Any) -> None:
            sent.append(case.path)
            case.call_and_validate(
                base_url=f"http://127.0.0.1:{server.port}",
                headers={"Authorization": f"Bearer {KEY}"},
                timeout=DEADLINE_S,  # a long answer on a machine that is busy
                checks=[
                    answers,
                    checks.status_code_conformance,
                    checks.content_type_conformance,
                    checks.response_schema_conformance,
                ],
            )

        send()
    return len(sent)


def _small(schemas: dict[str, Any]) -> dict[str, Any]:
    """The schemas with small numbers of tokens, so that thousands of answers take seconds."""
    text = json.dumps(schemas).replace(str(2**63), "8").replace('"maximum": 128', '"maximum": 4')
    small: dict[str, Any] = json.loads(text)
    return small


def test_the_document_has_every_endpoint_and_says_what_errors_look_like(server: Server) -> None:
    document = server.ask("/openapi.json").json
    assert {*PATHS, "/v1/models", "/health", "/metrics"} <= set(document["paths"])
    for path in PATHS:
        responses = document["paths"][path]["post"]["responses"]
        assert "422" not in responses
        assert "ErrorAnswer" in json.dumps(responses["400"])


@pytest.mark.filterwarnings("ignore")
def test_generated_requests_get_answers_of_the_documented_form(server: Server) -> None:
    assert run_cases(server, 12) >= 50


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_thousand_generated_requests(server: Server) -> None:
    assert run_cases(server, 600) >= 2000
