"""Fields of vLLM, and roles of OpenAI's that older templates do not know."""

import json
import re

import pytest
from serve_client import Server

from tsqp.serve.roles import with_known_roles

NUMBER = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
          "additionalProperties": False}  # fmt: skip
FORMS = {
    "json": (NUMBER, r'\{\s*"a"\s*:\s*[12]\s*\}'),
    "regex": ("[abc]{3}", "[abc]{3}"),
    "choice": (["yes", "perhaps"], "yes|perhaps"),
    "grammar": ('start: "x" /[0-9]{2}/', "x[0-9]{2}"),
    "json_object": (True, r"\{.*"),
}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CANARY = "CANARYcrocus1207"


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("stream", [True, False])
def test_structured_outputs_hold_chats_and_completions(
    server: Server, kind: str, stream: bool
) -> None:
    form, pattern = FORMS[kind]
    fields = {"structured_outputs": {kind: form}, "max_tokens": 60, "seed": 4, "stream": stream}
    chat, text = server.chat(**fields), server.complete("a", **fields)
    if stream:
        chunks = [each for event in chat.events for each in event["choices"]]
        answers = [
            "".join(each["delta"].get("content", "") for each in chunks),
            "".join(each["text"] for event in text.events for each in event["choices"]),
        ]
    else:
        answers = [chat.json["choices"][0]["message"]["content"], text.json["choices"][0]["text"]]
    for answer in answers:
        assert re.fullmatch(pattern, answer, re.DOTALL), answer


def test_a_schema_may_be_text_and_null_means_left_out(server: Server) -> None:
    form = {"json": json.dumps(NUMBER), "regex": None}
    answer = server.chat(structured_outputs=form, max_tokens=60).json
    assert json.loads(answer["choices"][0]["message"]["content"])["a"] in (1, 2)
    assert server.chat(structured_outputs=None).status == 200
    assert (
        server.chat(structured_outputs={"regex": "ab"}, tools=[TOOL], tool_choice="none")
        .json["choices"][0]["message"]["content"]
        .startswith("ab"[:2])
    )


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({CANARY: 1}, "structured_outputs has a key that this server does not know."),
        ({"regex": "a", CANARY: 1}, "has a key that this server does not know"),
        ({}, "exactly one of json, regex, choice, grammar"),
        ({"regex": "a", "choice": ["a"]}, "exactly one"),
        ({"regex": f"({CANARY}"}, "structured_outputs"),
        ({"choice": []}, "structured_outputs.choice must be a list of at least one text"),
        ({"choice": [1]}, "choice"),
        ({"json": CANARY}, "structured_outputs.json is not valid JSON"),
        ({"grammar": CANARY}, "structured_outputs"),
        (CANARY, "must be"),
    ],
)
def test_wrong_structured_outputs_are_one_sentence(server: Server, form: object, said: str) -> None:
    for reply in (
        server.chat(structured_outputs=form),
        server.complete("a", structured_outputs=form),
    ):
        assert reply.status == 400, reply.body
        assert said in reply.error["message"]
        assert reply.error["message"].endswith(".")
        assert reply.error["param"].startswith("structured_outputs")
        assert CANARY not in reply.body.decode()


def test_structured_outputs_beside_another_form_are_refused(server: Server) -> None:
    form = {"regex": "a"}
    for fields in ({"response_format": {"type": "json_object"}}, {"tools": [TOOL]}):
        reply = server.chat(structured_outputs=form, **fields)
        assert (reply.status, reply.error["param"]) == (400, "structured_outputs")


def test_a_developer_is_the_system_where_the_template_knows_no_developer(server: Server) -> None:
    def tokens(role: str) -> list[int]:
        messages = [{"role": role, "content": "Be kind"}, {"role": "user", "content": "Hi"}]
        found: list[int] = server.ask("/tokenize", {"messages": messages}).json["tokens"]
        return found

    assert tokens("developer") == tokens("system") != tokens("user")
    answers = [
        server.ask(
            "/v1/chat/completions",
            {"messages": [{"role": role, "content": "Be kind"}, {"role": "user", "content": "Hi"}],
             "temperature": 0, "max_tokens": 5},
        ).json["choices"]
        for role in ("developer", "system")
    ]  # fmt: skip
    assert answers[0] == answers[1]


def test_a_template_that_has_the_role_keeps_it() -> None:
    messages = [{"role": "developer", "content": "a"}, {"role": "user", "content": "b"}, {}]
    knows = "{% if message.role == 'developer' %}"
    assert with_known_roles(messages, knows) == messages
    assert with_known_roles(messages, {"default": "", "tool_use": knows}) == messages
    for other in ("", None, {"default": "{{ system }}"}):
        assert [each.get("role") for each in with_known_roles(messages, other)] == [
            "system", "user", None,
        ]  # fmt: skip
