"""Answers have the form that was asked for, and forms that cannot be had are refused."""

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tsqp.errors import PromptError, UsageError
from tsqp.runtime.generate import generate
from tsqp.tee.engine.engine import Engine
from tsqp.tee.guided import guide as guide_module
from tsqp.tee.guided.guide import Guide
from tsqp.tee.sampler import Sampler
from tsqp.tee.sampling import Completion, SamplingParams
from tsqp.tee.structured_outputs import MAX_CHARACTERS, StructuredOutputsParams

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "pets": {"type": "array", "items": {"enum": ["cat", "dög"]}, "maxItems": 3},
    },
    "required": ["name", "age", "pets"],
    "additionalProperties": False,
}
PROMPT = [5, 40, 50]


def ask(
    engine: Engine, form: StructuredOutputsParams, *, count: int = 3, **others: Any
) -> list[Completion]:
    settings = {"temperature": 1.5, "max_tokens": 600, "seed": 1, "n": count} | others
    return generate(engine, [PROMPT], SamplingParams(structured_outputs=form, **settings))


def test_a_json_schema_is_followed(guided: Engine) -> None:
    for form in (
        StructuredOutputsParams(json=PERSON),
        StructuredOutputsParams(json=json.dumps(PERSON)),
    ):
        for answer in ask(guided, form):
            assert answer.finish_reason == "stop"
            found = json.loads(answer.text)
            assert list(found) == ["name", "age", "pets"]
            assert 0 <= found["age"] <= 150
            assert set(found["pets"]) <= {"cat", "dög"}
            assert len(found["name"]) <= 5


def test_any_json_object_is_an_object(guided: Engine) -> None:
    form = StructuredOutputsParams(json_object=True)
    [*_, end] = guided._intake._tokenizer.encode("}")  # likelier, so that answers end
    answers = ask(guided, form, count=4, max_tokens=120, logit_bias={end: 4.0})
    done = [answer for answer in answers if answer.finish_reason == "stop"]
    assert done
    for answer in done:
        assert isinstance(json.loads(answer.text), dict)


def test_an_expression_is_matched_by_the_whole_answer(guided: Engine) -> None:
    expression = r"[a-d]{3,8}-(漢字|[0-9]{2})"
    for answer in ask(guided, StructuredOutputsParams(regex=expression)):
        assert re.fullmatch(expression, answer.text)
        assert answer.finish_reason == "stop"


CHOICES = ["yes", "yes, of course", 'a "quote" \\ n', "two\nlines\t", "é 漢 😀", "/x/i", "\x01"]


def test_one_of_the_choices_is_the_answer(guided: Engine) -> None:
    form = StructuredOutputsParams(choice=CHOICES)
    assert {each.text for each in ask(guided, form, count=24)} <= set(CHOICES)
    for choice in CHOICES:
        [answer] = ask(guided, StructuredOutputsParams(choice=(choice,)), count=1)
        assert (answer.text, answer.finish_reason) == (choice, "stop")


def test_a_grammar_is_followed(guided: Engine) -> None:
    lark = 'start: sum\nsum: NUMBER ("+" NUMBER)~1..3\nNUMBER: /[0-9]{1,2}/'
    for answer in ask(guided, StructuredOutputsParams(grammar=lark)):
        assert re.fullmatch(r"\d{1,2}(\+\d{1,2}){1,3}", answer.text)


def test_greedy_answers_are_followed_and_free_of_what_the_batch_does(guided: Engine) -> None:
    form = StructuredOutputsParams(json=PERSON)
    params = SamplingParams(temperature=0, max_tokens=300, structured_outputs=form)
    [alone] = generate(guided, [PROMPT], params)
    together = generate(guided, [[9], PROMPT, [7, 8]], params)
    assert together[1] == alone
    json.loads(alone.text)


def test_the_answer_ends_where_nothing_may_follow_without_an_end_token(guided: Engine) -> None:
    [answer] = ask(guided, StructuredOutputsParams(choice=["ab"]), count=1)
    assert answer.text == "ab"
    assert 2 not in answer.token_ids


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_an_end_token_may_come_only_where_the_grammar_may_end(
    ignore_eos: bool, guided: Engine
) -> None:
    form = StructuredOutputsParams(regex="a{3,20}")
    answers = ask(guided, form, count=20, logit_bias={2: 60}, ignore_eos=ignore_eos)
    lengths = {len(answer.text) for answer in answers}
    assert lengths == {20} if ignore_eos else lengths <= {3, 4, 5}  # a token may be "aaa"
    assert all(set(each.text) == {"a"} for each in answers)
    assert all((2 in each.token_ids) is not ignore_eos for each in answers)


def test_min_tokens_holds_as_long_as_something_may_follow(guided: Engine) -> None:
    form = StructuredOutputsParams(regex="(漢){1,9}")
    [answer] = ask(guided, form, count=1, min_tokens=500, logit_bias={2: 50})
    assert answer.text == "漢" * 9


def test_biases_and_penalties_cannot_break_the_form(guided: Engine) -> None:
    form = StructuredOutputsParams(regex="(ab){10}")
    answers = ask(
        guided,
        form,
        logit_bias=dict.fromkeys(range(0, 300, 3), 100.0),
        repetition_penalty=1e30,
        presence_penalty=2,
        frequency_penalty=2,
        top_k=3,
        top_p=0.3,
        min_p=0.5,
    )
    assert {each.text for each in answers} == {"ab" * 10}


def test_logprobs_describe_the_model_without_the_form(guided: Engine) -> None:
    params = {"temperature": 0, "max_tokens": 1, "logprobs": 2}
    [free] = generate(guided, [PROMPT], SamplingParams(**params))
    form = StructuredOutputsParams(choice=["ab"])
    [held] = generate(guided, [PROMPT], SamplingParams(structured_outputs=form, **params))
    assert free.logprobs is not None
    assert held.logprobs is not None
    assert held.logprobs[0].top == free.logprobs[0].top
    assert held.logprobs[0].rank > 1


@pytest.mark.parametrize("prompt", [[1], [0], [200], list(range(3, 259, 40))], ids=str)
def test_the_text_is_that_of_the_answers_own_bytes(prompt: list[int], guided: Engine) -> None:
    """Whether the prompt ends inside a character, or has no text at all."""
    for text in (" x", "x", "漢"):
        form = StructuredOutputsParams(choice=[text])
        params = SamplingParams(max_tokens=9, structured_outputs=form)
        assert generate(guided, [prompt], params)[0].text == text


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens_that_a_grammar_names_are_in_the_text_if_requested(
    skip: bool, guided: Engine
) -> None:
    form = StructuredOutputsParams(grammar='start: "a" <|start|> "b" <[1]> "c"')
    [answer] = ask(guided, form, count=1, skip_special_tokens=skip)
    names = guided._intake._tokenizer.special_ids  # type: ignore[union-attr]
    second = next(text for text, token_id in names.items() if token_id == 1)
    assert answer.text == ("abc" if skip else f"a<|start|>b{second}c")
    free = SamplingParams(max_tokens=1, logit_bias={0: 100.0}, temperature=0, stop_token_ids=[3])
    [answer] = generate(guided, [PROMPT], free)
    assert answer.text == ""


def test_the_token_that_ends_an_answer_is_not_in_its_text(guided: Engine) -> None:
    form = StructuredOutputsParams(regex="a{3,20}")
    [answer] = ask(guided, form, count=1, logit_bias={2: 60}, skip_special_tokens=False)
    assert re.fullmatch("a{3,5}", answer.text)
    assert answer.token_ids[-1] == 2


def test_stop_strings_end_an_answer_early(guided: Engine) -> None:
    form = StructuredOutputsParams(choice=["abcdef"])
    [answer] = ask(guided, form, count=1, stop="d")
    assert (answer.text, answer.finish_reason) == ("abc", "stop")


def test_a_sequence_that_begins_again_goes_on_in_the_same_place(guided: Engine) -> None:
    form = StructuredOutputsParams(json=PERSON)
    params = SamplingParams(temperature=1.5, max_tokens=400, seed=3, structured_outputs=form)
    [wanted] = generate(guided, [PROMPT], params)
    number = guided.add(PROMPT, params)
    done = None
    for step in range(400):
        [output] = guided.step()
        done = output.completion
        if done is not None:
            break
        if step % 7 == 3:  # what the loss of a worker does
            sequence = guided._scheduler.find(number)
            assert sequence is not None
            guided._session.kv.free(sequence)
            sequence.restart()
            guided._scheduler.requeue()
    assert done == wanted


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of json, regex.* 0 are given"),
        ({"json_object": False}, "0 are given"),
        ({"json": {}, "regex": "a"}, "2 are given"),
        ({"json": "{"}, "not valid JSON"),
        ({"json": "[" * 100_000}, "not valid JSON"),
        ({"json": "[]"}, "must be a JSON schema"),
        ({"json": True}, "must be a JSON schema"),
        ({"json": {"const": float("nan")}}, "not finite"),
        ({"json": {1: 2}}, "key that is not a text"),
        ({"json": {"const": {1, 2}}}, "a value of type set"),
        ({"json": {"title": "x" * MAX_CHARACTERS}}, "at most"),
        ({"json": {"title": "\ud800"}}, "not valid Unicode"),
        ({"regex": ""}, "is empty"),
        ({"regex": 5}, "must be a text, not an int"),
        ({"regex": "a" * (MAX_CHARACTERS + 1)}, "at most"),
        ({"choice": []}, "at least one text"),
        ({"choice": "abc"}, "at least one text"),
        ({"choice": ["a", ""]}, "is empty"),
        ({"choice": ["a", 1]}, "must be a text"),
        ({"choice": ["a" * MAX_CHARACTERS, "b"]}, "at most"),
        ({"grammar": ["start"]}, "must be a text"),
        ({"json_object": 1}, "True or False"),
    ],
)
def test_a_form_of_the_wrong_type_is_refused_when_it_is_made(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(PromptError, match=message) as refused:
        StructuredOutputsParams(**given)
    assert len(str(refused.value)) < 200


def test_a_schema_nested_too_deeply_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(70):
        schema = {"items": schema}
    with pytest.raises(PromptError, match="nested more than 64 levels"):
        StructuredOutputsParams(json=schema)


def test_a_form_is_not_shown_by_its_representation() -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["canary"]))
    assert "canary" not in repr(params)


def test_params_take_only_their_own_type() -> None:
    with pytest.raises(PromptError, match="must be StructuredOutputsParams, not a dict"):
        SamplingParams(structured_outputs={"json": {}})  # type: ignore[arg-type]


SECRET = "canary_xyzzy"
INVALID = [
    ({"json": {"enum": [SECRET], "type": "integer"}}, "cannot be satisfied"),
    ({"json": {"type": "string", "minLength": 5, "maxLength": 3}}, "cannot be satisfied"),
    (
        {"json": {"required": [SECRET], "properties": {SECRET: False}, "type": "object"}},
        "satisfied",
    ),
    ({"json": {"type": SECRET}}, "is not valid"),
    ({"json": {"not": {"const": SECRET}}}, "keywords that are not supported: not"),
    ({"json": {"uniqueItems": True, "title": SECRET}}, "not supported: uniqueItems"),
    ({"json": {"oneOf": [{"type": "string"}, {"minLength": 3}]}}, "not supported: oneOf"),
    ({"json": {"$ref": f"http://localhost/{SECRET}"}}, "not valid"),
    ({"json": {"$ref": f"#/{SECRET}"}}, "not valid"),
    ({"json": {"type": "string", "pattern": f"({SECRET}"}}, "not valid"),
    ({"json": {"type": "string", "format": SECRET}}, "not valid"),
    ({"json": {"x-guidance": {"lenient": True}, "not": {"const": SECRET}}}, "not supported: not"),
    ({"json": {"properties": {f"{SECRET}{i}": {} for i in range(4500)}}}, "too complex"),
    (
        {
            "json": {
                "properties": {
                    f"p{i}": {"type": "number", "multipleOf": i + 1} for i in range(1500)
                }
            }
        },
        "too complex",
    ),
    ({"regex": f"({SECRET}"}, "expression of structured outputs is not valid"),
    ({"regex": f"(?={SECRET})a"}, "not valid"),
    ({"regex": r"(a)\1"}, "not valid"),
    ({"grammar": f"start: {SECRET}"}, "not valid"),
    ({"grammar": f'rule: "{SECRET}"'}, "not valid"),
    ({"grammar": "start: " + "(" * 3000 + f'"{SECRET}"' + ")" * 3000}, "not valid"),
    ({"grammar": 'start: <|no_such_token|> "a"'}, "not valid"),
    ({"grammar": f'start: %json {{"enum": []}} "{SECRET}"'}, "cannot be satisfied"),
    ({"grammar": '{"grammars": []}'}, "not valid"),
    ({"grammar": 'start: ""'}, "only an empty answer"),
    ({"regex": "(|)"}, "only an empty answer"),
    ({"regex": "a{0}"}, "only an empty answer"),
]


@pytest.mark.parametrize(("given", "message"), INVALID)
def test_a_form_that_cannot_be_followed_is_refused_without_quoting_it(
    given: dict[str, Any], message: str, guided: Engine, capfd: pytest.CaptureFixture[str]
) -> None:
    form = StructuredOutputsParams(**given)
    with pytest.raises(PromptError, match=message) as refused:
        guided.add(PROMPT, SamplingParams(structured_outputs=form))
    assert not guided.has_unfinished
    assert "canary" not in str(refused.value)
    assert refused.value.__cause__ is None
    assert refused.value.__suppress_context__ or refused.value.__context__ is None
    assert capfd.readouterr() == ("", "")


def test_a_panic_of_the_library_is_an_error_of_the_request(
    guided: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PanicException(BaseException):
        pass

    class Panics:
        def consume_token(self, token_id: int) -> bool:
            raise PanicException("a secret")

    numbers = [guided.add(PROMPT, SamplingParams(temperature=0, max_tokens=3)) for _ in range(2)]
    form = StructuredOutputsParams(regex="[a-z]{50}")
    failing = guided.add(PROMPT, SamplingParams(structured_outputs=form))
    sequence = guided._scheduler.find(failing)
    assert sequence is not None
    assert sequence.sampler._guide is not None
    sequence.sampler._guide._matcher = Panics()  # type: ignore[assignment]
    outputs = []
    while guided.has_unfinished:
        outputs += guided.step()
    [error] = [each.error for each in outputs if each.error is not None]
    assert isinstance(error, PromptError)
    assert "secret" not in str(error)
    assert {each.sequence for each in outputs if each.completion} == set(numbers)


def test_a_grammar_that_becomes_too_complex_ends_its_own_answer_only(guided: Engine) -> None:
    rules = "\n".join(
        f'r{i}: "a" r{(i * 7 + 1) % 60} | r{(i + 1) % 60} "a" | "a"' for i in range(60)
    )
    form = StructuredOutputsParams(grammar=f"start: r0 r1 r2\n{rules}")
    bad = guided.add(PROMPT, SamplingParams(structured_outputs=form, max_tokens=400))
    good = guided.add(PROMPT, SamplingParams(temperature=0, max_tokens=3))
    ended = {}
    while guided.has_unfinished:
        ended |= {each.sequence: each for each in guided.step() if each.completion or each.error}
    assert ended[good].completion is not None
    error = ended[bad].error
    assert error is None or isinstance(error, PromptError)


def test_an_answer_with_a_dead_end_gets_an_error(guided: Engine) -> None:
    form = StructuredOutputsParams(grammar='start: "a" B\nB: /b/ & /c/')
    with pytest.raises(PromptError, match="The answer cannot go on"):
        ask(guided, form, count=1)


def test_a_missing_package_is_named_with_its_extra(
    guided: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    form = StructuredOutputsParams(regex="a")
    with pytest.raises(UsageError, match=r"pip install 'tsqp\[serve\]'"):
        guided.add(PROMPT, SamplingParams(structured_outputs=form))


def test_a_grammar_is_compiled_once_for_each_request(
    guided: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    grammar = guide_module._grammar

    def counted(llguidance: Any, params: StructuredOutputsParams) -> str:
        compiled.append(params)
        return grammar(llguidance, params)

    monkeypatch.setattr(guide_module, "_grammar", counted)
    form = StructuredOutputsParams(regex="[a-z]{5}")
    guided.compile(SamplingParams(structured_outputs=form))
    texts = {each.text for each in ask(guided, form, count=5)}
    assert compiled == [form]
    assert len(texts) > 1
    ask(guided, StructuredOutputsParams(regex="[a-z]{5}"), count=1)
    assert len(compiled) == 2


def test_grammars_are_compiled_in_several_threads_at_once(guided: Engine) -> None:
    forms = [StructuredOutputsParams(regex=f"[a-z]{{{n % 4 + 2}}}") for n in range(8)]
    with ThreadPoolExecutor(8) as threads:
        jobs = [
            threads.submit(guided.compile, SamplingParams(structured_outputs=form))
            for form in forms * 5
        ]
        for job in jobs:
            job.result(timeout=60)
    for number, form in enumerate(forms):
        [answer] = ask(guided, form, count=1)
        assert len(answer.text) == number % 4 + 2


class FakeGuide(Guide):
    """Allows some tokens, whatever came before."""

    def __init__(self, allowed: list[int], size: int, *, may_end: bool) -> None:
        self.mask_V = torch.zeros(size, dtype=torch.bool)
        self.mask_V[allowed] = True
        self.may_end = may_end

    def advance(self, token_id: int) -> None:
        pass


@pytest.mark.parametrize("temperature", [0.0, 0.01, 1.0, 100.0])
@pytest.mark.parametrize("may_end", [True, False])
def test_nothing_but_what_is_allowed_is_drawn(temperature: float, may_end: bool) -> None:
    logits_V = torch.linspace(-30, 30, 40)
    drawn = set()
    for seed in range(60):
        params = SamplingParams(temperature=temperature, seed=seed, top_k=5, top_p=0.99)
        sampler = Sampler(params, [1], {39}, FakeGuide([3, 7, 8], 40, may_end=may_end))
        drawn.add(sampler.sample(logits_V))
    assert drawn <= {3, 7, 8, 39}
    assert (39 in drawn) is may_end
    assert (
        len(drawn) == {0.0: 1, 0.01: 1, 1.0: 1 if may_end else 2, 100.0: 3 + may_end}[temperature]
    )
