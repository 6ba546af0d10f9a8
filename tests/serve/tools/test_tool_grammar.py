"""A model under the grammar of a style can call tools rightly, and in no other way."""

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tokenizers import AddedToken
from tool_answers import SETS, parse, rendered
from tool_templates import SPECIAL, TEMPLATES, TOOLS

from text_helpers import byte_level
from tsqp.errors import PromptError
from tsqp.model.config import ModelConfig
from tsqp.serve.tools.styles import STYLES
from tsqp.tee.guided.guide import Guides
from tsqp.tee.structured_outputs import StructuredOutputsParams
from tsqp.tee.text.tokenizer import Tokenizer

NAMED = {"type": "function", "function": {"name": "add"}}
ONE = [("add", {"a": 1})]


class Model:
    """A tokenizer, and what a grammar lets a model write with it."""

    def __init__(self, folder: Path, special: list[str]) -> None:
        backend = byte_level()
        backend.add_tokens([AddedToken(text, special=True, normalized=False) for text in special])
        (folder / "config.json").write_text('{"model_type": "llama"}')
        backend.save(str(folder / "tokenizer.json"))
        self.tokenizer = Tokenizer(str(folder))
        self.size = backend.get_vocab_size()
        config: Any = type("Config", (), {"vocab_size": self.size, "eos_token_ids": (2,)})
        typed: ModelConfig = config
        self._guides = Guides(self.tokenizer, typed)

    def special(self) -> dict[str, int]:
        return self.tokenizer.special_ids

    def accepts(self, grammar: str, text: str) -> bool:
        """Whether a model can write this text and end there."""
        guide = self._guides.guide(StructuredOutputsParams(grammar=grammar))
        for token_id in self.tokenizer.encode(text, add_special_tokens=False):
            if guide.mask_V is None or not guide.mask_V[token_id]:
                return False
            guide.advance(token_id)
        return guide.may_end


@pytest.fixture(scope="module", params=["tokens", "text"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """With openings that are special tokens, and without."""
    folder = tmp_path_factory.mktemp("tools")
    return Model(folder, SPECIAL if request.param == "tokens" else [])


def no_id(text: str) -> str:
    """Without the ids that the template of Mistral adds to calls of earlier messages."""
    for number in range(3):
        text = text.replace(f', "id": "call{number:05d}"', "")
    return text


def written(name: str, calls: list[tuple[str, Any]], content: str | None = None) -> str:
    return no_id(rendered(name, calls, content))


@pytest.mark.parametrize("name", TEMPLATES)
def test_calls_as_the_template_renders_them_are_allowed(name: str, model: Model) -> None:
    style = STYLES[name]
    for choice in ("auto", "required"):
        grammar = style.grammar(TOOLS, choice, special=model.special())
        for calls in SETS:
            if len(calls) == 1 or style.may_call_several:
                assert model.accepts(grammar, written(name, calls)), (choice, calls)


@pytest.mark.parametrize("name", TEMPLATES)
def test_auto_allows_text_before_a_call_or_instead_of_it(name: str, model: Model) -> None:
    style = STYLES[name]
    grammar = style.grammar(TOOLS, "auto", special=model.special())
    for text in ("", "Just text.\n", "a < b, <tool, [TOOL { ", "漢字 }"):
        assert model.accepts(grammar, text), text
    if name not in ("llama3_json", "mistral"):
        assert model.accepts(grammar, written(name, ONE, "Let me see: <b> {"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_required_and_named_choices_allow_calls_only(name: str, model: Model) -> None:
    style = STYLES[name]
    required = style.grammar(TOOLS, "required", special=model.special())
    named = style.grammar(TOOLS, NAMED, special=model.special())
    for grammar in (required, named):
        assert model.accepts(grammar, written(name, ONE))
        assert not model.accepts(grammar, "")
        assert not model.accepts(grammar, "Hello")
        assert not model.accepts(grammar, f"x{written(name, ONE)}")
    assert model.accepts(required, written(name, [("now", {})]))
    assert not model.accepts(named, written(name, [("now", {})]))


@pytest.mark.parametrize("name", TEMPLATES)
def test_none_allows_no_call(name: str, model: Model) -> None:
    grammar = STYLES[name].grammar(TOOLS, "none", special=model.special())
    assert model.accepts(grammar, "Just text, with <b> and so on.")
    assert not model.accepts(grammar, written(name, ONE))


@pytest.mark.parametrize("name", TEMPLATES)
def test_several_calls_need_parallel(name: str, model: Model) -> None:
    style = STYLES[name]
    for choice, parallel in (("auto", False), ("required", False), (NAMED, True)):
        grammar = style.grammar(TOOLS, choice, parallel=parallel, special=model.special())
        assert model.accepts(grammar, written(name, ONE))
        if style.may_call_several:
            assert not model.accepts(grammar, written(name, ONE * 2)), choice


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("add", {"a": 100}),
        ("add", {"a": "1"}),
        ("add", {"note": "x"}),
        ("add", {"a": 1, "note": "much too long"}),
        ("add", {"a": 1, "b": 2}),
        ("find_place", {"place": "Paris"}),
        ("find_place", {}),
        ("now", {"x": 1}),
        ("unknown", {}),
    ],
)
@pytest.mark.parametrize("name", TEMPLATES)
def test_arguments_and_names_that_no_tool_has_cannot_be_written(
    name: str, tool: str, arguments: dict[str, Any], model: Model
) -> None:
    text = written(name, [(tool, arguments)])
    for choice in ("auto", "required"):
        grammar = STYLES[name].grammar(TOOLS, choice, special=model.special())
        assert not model.accepts(grammar, text)


def test_tools_without_strict_ignore_keywords_that_cannot_be_enforced(model: Model) -> None:
    parameters = {"properties": {"a": {"type": "array", "uniqueItems": True}}}
    tool: dict[str, Any] = {"name": "add", "parameters": parameters}
    grammar = STYLES["hermes"].grammar([{"type": "function", "function": tool}], "required")
    assert model.accepts(grammar, written("hermes", [("add", {"a": [1, 1]})]))
    grammar = STYLES["hermes"].grammar([{"type": "function", "function": {**tool, "strict": True}}])
    with pytest.raises(PromptError, match="uniqueItems"):
        model.accepts(grammar, "")


FUNCTION = {"name": "f", "parameters": {"type": "object"}}


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        ([], "auto", "at least one"),
        ({"type": "function"}, "auto", "at least one"),
        (["f"], "auto", "Tool 1 is not a function"),
        ([{"type": "web_search"}], "auto", "Tool 1 is not a function"),
        ([{"type": "function", "function": {}}], "auto", "no name"),
        ([{"type": "function", "function": {"name": 'a"b'}}], "auto", "no name"),
        ([{"function": FUNCTION}, {"function": FUNCTION}], "auto", "the same name"),
        ([{"function": {"name": f"f{i}"}} for i in range(129)], "auto", "at most 128"),
        ([{"function": {"name": "f", "parameters": []}}], "auto", "not the JSON schema"),
        (
            [{"function": {"name": "f", "parameters": {"type": "array"}}}],
            "auto",
            "not the JSON schema",
        ),
        ([{"function": {"name": "f", "parameters": {"a": {1}}}}], "auto", "value of type set"),
        ([{"function": FUNCTION}], "any", "tool_choice must be"),
        ([{"function": FUNCTION}], {"type": "function"}, "tool_choice must be"),
        ([{"function": FUNCTION}], {"type": "function", "function": {"name": "g"}}, "not among"),
        ([{"function": FUNCTION}], 5, "tool_choice must be"),
    ],
)
def test_tools_and_choices_that_are_not_valid_are_refused(
    tools: Any, choice: Any, message: str
) -> None:
    with pytest.raises(PromptError, match=message):
        STYLES["hermes"].grammar(tools, choice)


def test_what_a_model_writes_under_the_grammar_is_parsed_into_valid_calls(model: Model) -> None:
    """Random choices among what is allowed, without an end before it must come."""
    draw = random.Random(1)
    names = {token_id: text for text, token_id in model.special().items()}
    schemas = {each["function"]["name"]: each["function"].get("parameters", {}) for each in TOOLS}
    for style in STYLES.values():
        grammar = style.grammar(TOOLS, "required", parallel=False, special=model.special())
        for _ in range(3):
            guide = model._guides.guide(StructuredOutputsParams(grammar=grammar))
            ids: list[int] = []
            while guide.mask_V is not None and len(ids) < 600:
                allowed = guide.mask_V.nonzero()[:, 0].tolist()
                ids.append(draw.choice(allowed))
                guide.advance(ids[-1])
            text = b"".join(
                names[i].encode() if i in names else model.tokenizer.bytes_of(i) or b"" for i in ids
            ).decode()
            content, [(tool, arguments)] = parse(style, text)
            assert content == ""
            jsonschema.validate(json.loads(arguments), schemas[tool])
