"""Texts know which of their characters the template wrote, whatever is done to them."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsqp.tee.text.origin import CALLER, TEMPLATE, Text, concat, origin_of, text_of, written
from tsqp.tee.text.template_methods import TEXT_METHODS
from tsqp.tee.text.template_values import Allowance

# Lower case letters come from the caller, and all other characters from the template.
CHARACTERS = st.sampled_from("ab  \n\t<|A")
TEXTS = st.text(CHARACTERS, max_size=12)
SHORT = st.text(CHARACTERS, min_size=1, max_size=2)


def mixed(plain: str) -> Text:
    return text_of(plain, "".join(CALLER if each.islower() else TEMPLATE for each in plain))


def assert_in_place(value: Any) -> None:
    """Each character has the origin that it had."""
    for text in value if isinstance(value, list | tuple) else [value]:
        if isinstance(text, str):
            assert origin_of(text) == mixed(text).origin


def call(name: str, text: str, *arguments: Any) -> Any:
    return TEXT_METHODS[name](Allowance(0), text, *arguments)


METHODS: dict[str, list[Callable[[st.DataObject], tuple[Any, ...]]]] = {
    **{name: [lambda _: ()] for name in ("split", "rsplit", "splitlines")},
    **{name: [lambda _: (), lambda d: (d.draw(SHORT),)] for name in ("strip", "lstrip", "rstrip")},
    **{
        name: [lambda d: (d.draw(SHORT),)]
        for name in ("partition", "rpartition", "removeprefix", "removesuffix")
    },
}
CUTS = [lambda d: (d.draw(SHORT), d.draw(st.integers(-1, 3))), lambda d: (None, 1)]
METHODS["split"] += CUTS
METHODS["rsplit"] += CUTS
METHODS["splitlines"] += [lambda _: (True,)]


@pytest.mark.parametrize("name", METHODS)
@given(plain=TEXTS, data=st.data())
@settings(max_examples=60)
def test_methods_give_what_python_gives_with_the_origin_in_place(
    name: str, plain: str, data: st.DataObject
) -> None:
    for arguments in (each(data) for each in METHODS[name]):
        result = call(name, mixed(plain), *arguments)
        assert result == getattr(plain, name)(*arguments)
        assert_in_place(result)


@given(plain=TEXTS, old=SHORT, new=TEXTS, count=st.integers(-1, 3))
def test_replacing_and_joining(plain: str, old: str, new: str, count: int) -> None:
    replaced = call("replace", mixed(plain), mixed(old), mixed(new), count)
    assert replaced == plain.replace(old, new, count)
    assert_in_place(replaced)
    joined = call("join", mixed(old), [mixed(plain), mixed(new), mixed("a")])
    assert joined == old.join([plain, new, "a"])
    assert_in_place(joined)


@given(plain=st.text(max_size=8), split=st.integers(0, 8))
def test_case_is_changed_as_python_does_and_never_in_favour_of_the_caller(
    plain: str, split: int
) -> None:
    text = concat([plain[:split], written(plain[split:])])
    for name in ("upper", "lower", "title", "capitalize", "swapcase"):
        changed = call(name, text)
        assert changed == getattr(plain, name)()
        if plain[:split]:
            assert origin_of(changed)[0] == CALLER
        else:
            assert CALLER not in origin_of(changed)


def test_plain_texts_are_the_callers_and_forgetting_is_safe() -> None:
    text = written("<|a|>")
    assert origin_of("<|a|>") == CALLER * 5
    assert origin_of(text + "") == CALLER * 5  # an operation that knows nothing of origins
    assert origin_of(str(text)) == CALLER * 5
