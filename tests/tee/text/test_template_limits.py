"""A chat template can neither go on for ever, nor fill the memory, nor leave its sandbox.

No test here waits for a clock: what a template may do is counted, so each of them ends soon, and
the limit of pytest is the deadline for one that does not.
"""

import itertools
import tracemalloc
from contextlib import suppress
from typing import Any

import pytest

from chat_styles import STYLES
from tsqp.errors import PromptError, TokenizerError, TSQPError
from tsqp.tee.text import template_values
from tsqp.tee.text.chat_messages import check_messages
from tsqp.tee.text.chat_template import MAX_SOURCE, ChatTemplate

LONG = check_messages([{"role": "user", "content": "a" * 5000}])


def repeated(step: str, start: str = "'aaaaaaaa'", then: str = "") -> str:
    """A template that does something to `ns.t` sixty times."""
    return (
        f"{{% set ns = namespace(t={start}) %}}{{% for i in range(60) %}}{step}{{% endfor %}}{then}"
    )


def doubled(value: str, start: str = "'aaaaaaaa'", then: str = "") -> str:
    return repeated("{% set ns.t = " + value + " %}", start, then)


ENDLESS = {
    "loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "loops that filter": "{% for i in range(99999) %}{% for j in range(99999) if false %}"
    "{% endfor %}{% endfor %}",
    "a range": "{% for i in range(10**9) %}{% endfor %}",
    "a range as a list": "{{ range(10**9) | list | length }}",
    "a search in ranges": "{% for i in range(100000) %}{{ 'x' in range(100000) }}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "recursion of a caller": "{% macro m() %}{% call m() %}{{ caller() }}{% endcall %}"
    "{% endmacro %}{{ m() }}",
    "a recursive loop": "{% for x in [[1]] recursive %}{{ loop([x, x]) }}{% endfor %}",
    "a repeated text": "{{ 'a' * 10**10 }}",
    "a repeated text, turned round": "{{ 10**10 * 'a' }}",
    "a repeated list": "{{ [1] * 10**10 }}",
    "a repeated empty list": "{{ [] * 10**30 }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "a power of a fraction": "{{ 2.5 ** 10000 }}",
    "rounding": "{{ 1.5 | round(10**9, 'ceil') }}",
    "rounding whole numbers": "{{ 15 | round(-(10**12)) }}",
    "signs for signs": "{{ ('%%' * 5000000) % () }}",
    "titles": "{{ ('a ' * 5000000) | title | length }}",
    "many parameters": "{% for i in range(100000) %}{% macro m("
    + ",".join(f"p{n}" for n in range(15000))
    + ") %}{% endmacro %}{{ m() }}{% endfor %}",
    "many branches": "{% for i in range(100000) %}{% if i %}"
    + "{% elif i %}" * 8000
    + "{% endif %}{% endfor %}"
    + "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "a long path": "{{ [1] | map(attribute='x.' * 1000000) | list }}",
    "products": doubled("ns.t * ns.t", "7"),
    "a number in the source": "{{ 0x" + "f" * 1000 + " }}",
    "a number from a text": "{{ ('f' * 1000) | int(base=16) }}",
    "doubling by ~": doubled("ns.t ~ ns.t"),
    "doubling by +": doubled("ns.t + ns.t"),
    "doubling in a block": repeated(
        "{% set t %}{{ ns.t }}{{ ns.t }}{% endset %}{% set ns.t = t %}"
    ),
    "doubling in a macro": "{% macro m(t) %}{{ t }}{{ t }}{% endmacro %}" + doubled("m(ns.t)"),
    "doubling a list": doubled("ns.t + ns.t", "[1]"),
    "doubling a tuple": doubled("ns.t + ns.t", "(1,)"),
    "a nested list as text": doubled("[ns.t, ns.t]", then="{{ ns.t }}"),
    "a nested list as JSON": doubled("[ns.t, ns.t]", then="{{ ns.t | tojson }}"),
    "a nested object as JSON": doubled("{'a': ns.t, 'b': ns.t}", then="{{ ns.t | tojson }}"),
    "a nested tuple as a key": doubled("(ns.t, ns.t)", then="{{ {ns.t: 1} }}"),
    "comparing nested lists": "{% set a = namespace(t=1) %}{% set b = namespace(t=1) %}"
    "{% for i in range(60) %}{% set a.t = [a.t, a.t] %}{% set b.t = [b.t, b.t] %}{% endfor %}"
    "{{ a.t == b.t }}",
    "comparing lists of 18 levels for ever": "{% set a = namespace(t=1) %}"
    "{% set b = namespace(t=1) %}{% for i in range(18) %}{% set a.t = [a.t, a.t] %}"
    "{% set b.t = [b.t, b.t] %}{% endfor %}{% for i in range(99999) %}{{ a.t == b.t }}{% endfor %}",
    "a deep list": "{% set ns = namespace(t=1) %}{% for i in range(1000) %}{% set ns.t = [ns.t] %}"
    "{% endfor %}",
    "replacing": doubled("ns.t.replace('a', 'aaaaaaaa')", "'a'"),
    "the filter replace": doubled("ns.t | replace('a', 'aaaaaaaa')", "'a'"),
    "joining": doubled("ns.t.join(['aa', 'aa', 'aa'])", "'a'"),
    "the filter join": doubled("[1, 2, 3, 4] | join(ns.t)", "'a'"),
    "sorting": "{% for i in range(100000) %}{{ range(100000) | sort | length }}{% endfor %}",
    "summing lists": "{{ [range(90000) | list] * 1000 | sum(start=[]) | length }}",
    "indenting JSON": "{{ [[1]] | tojson(indent=10**9) }}",
    "separators": "{{ [1, 2] | tojson(separators=[' ' * 100, ':']) }}",
    "JSON in ASCII": "{% for i in range(100000) %}{{ ('é' * 10000) | tojson(ensure_ascii=True) }}"
    "{% endfor %}",
    "indenting": "{{ 'a\nb' | indent(10**9) }}",
    "indenting by a text": doubled("ns.t | indent(ns.t, first=true)", "'a\na'"),
    "padding": "{{ 'a'.ljust(10**10) }}",
    "filling with zeros": "{{ 'a'.zfill(10**10) }}",
    "tabs": "{{ ('\t' * 10000).expandtabs(10**6) }}",
    "centring": "{{ 'a' | center(10**10) }}",
    "formatting": "{{ '%10000000000d' % 1 }}",
    "formatting with a star": "{{ '%*d' % (10**10, 1) }}",
    "formatting a fraction": "{{ '%.10000000000f' % 1.5 }}",
    "the method format": "{{ '{:>10000000000}'.format(1) }}",
    "the filter format": "{{ '%10000000000d' | format(1) }}",
    "a wide date": "{{ strftime_now('%1000000000Y') }}",
    "a long date": "{{ strftime_now('%Y' * 1000) }}",
    "looking from the end": "{{ ('a' * 100000).rfind('a' * 40000 + 'b') }}",
    "looking for long texts": "{{ ('a' * 1000000).find('b' + 'a' * 400000) }}",
    "stripping": "{{ ('a' * 1000000).strip('b' * 1000000) }}",
    "stripping many characters off": "{% set c = 'b' * 100000 %}{% for i in range(100000) %}"
    "{{ 'a'.strip(c) }}{% endfor %}",
    "methods of long texts": "{% set t = 'b' * 100000 %}{% set l = [t.upper] * 20000 %}{{ l }}",
    "comparing methods": "{% set l = [('b' * 100000).upper] * 9000 %}"
    "{% set m = [('b' * 100000).upper] * 9000 %}{% for i in range(99999) %}{{ l == m }}"
    "{% endfor %}",
    "many pieces": "{{ ('a ' * 5000000).split() | length }}",
    "many characters": "{{ ('a' * 10000000) | list | length }}",
    "much output": "{% for i in range(100000) %}{{ messages }}{% endfor %}",
    "much output of its own": "{% for i in range(100000) %}" + "x" * 100_000 + "{% endfor %}",
    "steps without a loop": "{{ 1 }}\n" * 5000
    + "{% for i in range(1000) %}{% for j in range(1000) %}{{ i }}{% endfor %}{% endfor %}",
    "deep expressions": "{{ " + "-" * 400 + "1 }}",
    "long sums": "{{ 1" + " + 1" * 2000 + " }}",
    "deep blocks": "{% if 1 %}" * 300 + "{% endif %}" * 300,
    "lorem ipsum": "{{ lipsum(n=1000000) }}",
}


@pytest.mark.parametrize("attack", ENDLESS)
def test_a_template_that_would_not_end_or_fit_is_stopped(
    attack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_values, "BASE_UNITS", 50_000)  # a twentieth, to be quick
    with pytest.raises(TSQPError) as stopped:
        ChatTemplate(ENDLESS[attack], {}).render(LONG)
    assert "aaaa" not in str(stopped.value)
    assert stopped.value.__context__ is None


@pytest.mark.parametrize(
    "attack",
    [
        "doubling by ~",
        pytest.param("doubling a list", marks=pytest.mark.slow),
        "many pieces",
        "many characters",
        pytest.param("replacing", marks=pytest.mark.slow),
    ],
)
def test_a_template_that_makes_much_is_stopped_before_it_takes_memory(attack: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(TSQPError):
            ChatTemplate(ENDLESS[attack], {}).render(LONG)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 200 * 2**20


@pytest.mark.parametrize("source", ["x" * (MAX_SOURCE + 1), "{{ " + "(" * 5000 + "1" + ")" * 5000])
def test_a_source_that_is_too_long_or_too_deep_is_refused(source: str) -> None:
    with pytest.raises(TokenizerError, match=r"longer than|cannot be used"):
        ChatTemplate(source, {})


ALIKE = ("sums", "filters", "comparisons", "lists")
HOSTILE_SOURCES = {
    "sums": "{{ 1" + "+1" * 60_000 + " }}",
    "attributes": "{{ x" + ".y" * 60_000 + " }}",
    "filters": "{{ x" + "|y" * 60_000 + " }}",
    "comparisons": "{{ 1" + "<1" * 60_000 + " }}",
    "lists": "{{ [" + "1," * 60_000 + "] }}",
    "brackets": "{{ " + "[" * 60_000,
    "comments": "{#" * 60_000,
    "raw blocks": "{% raw %}" * 14_000,
    "digits": "{{ " + "1" * 120_000 + " }}",
    "spaces": "{{" + " " * 120_000 + "}}",
    "macros and calls": "{% macro a(x) %}{% endmacro %}{{ a(1) }}" * 3000,
    "loops": "{% for m in a %}{% endfor %}{% set a = b %}" * 3000,
    "names of names": "".join(f"{{% set a{n + 1} = a{n} %}}" for n in range(5000, 0, -1))
    + "{% set a1 = messages %}",
}


@pytest.mark.parametrize(
    "kind",
    [
        # These do alike, and each takes a second or two.
        pytest.param(kind, marks=pytest.mark.slow) if kind in ALIKE else kind
        for kind in HOSTILE_SOURCES
    ],
)
def test_the_parser_ends_soon_whatever_the_source(kind: str) -> None:
    with suppress(TokenizerError):
        ChatTemplate(HOSTILE_SOURCES[kind], {})


def test_a_template_that_is_not_jinja_is_refused() -> None:
    with pytest.raises(TokenizerError, match=r"cannot be used \(.* in line 2\)"):
        ChatTemplate("\n{% for %}", {})


def test_a_list_weighs_what_it_holds_as_often_as_it_holds_it() -> None:
    allowance = template_values.Allowance(0)
    value: Any = allowance.items([1])
    for level in range(1, 10):
        value = allowance.items([value, value])
        assert template_values.weigh(value) == 2 ** (level + 1) + 2**level - 1
    pair = allowance.fields([("a" * 32, value)])
    assert template_values.weigh(pair) == 1 + 3 + template_values.weigh(value)


def test_nesting_is_counted() -> None:
    macro = "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(N) }}"
    assert ChatTemplate(macro.replace("N", "10"), {}).render([]) == ""
    with pytest.raises(TokenizerError, match="it is nested too deep"):
        ChatTemplate(macro.replace("N", "75"), {}).render([])


def test_a_long_conversation_is_well_within_the_limits() -> None:
    long = [
        {"role": role, "content": "Some words. " * 200}
        for _, role in itertools.product(range(200), ("user", "assistant"))
    ]
    for source in STYLES.values():
        assert len(ChatTemplate(source, {"bos_token": "", "eos_token": ""}).render(long)) > 960_000
    collecting = (
        "{% set ns = namespace(all=[]) %}{% for m in messages %}{% set ns.all = ns.all + [m] %}"
        "{% endfor %}{{ ns.all | length }}"
    )
    assert ChatTemplate(collecting, {}).render(long) == "400"


ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__class__ }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception['__globals__'] }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ namespace().__class__ }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ namespace(__class__=1) }}",
    "{{ namespace({'__class__': 1}) }}",
    "{{ dict.fromkeys }}",
    "{{ messages.append({}) }}",
    "{{ messages.sort() }}",
    "{{ messages[0].update({}) }}",
    "{{ messages[0]['update']({}) }}",
    "{{ messages[0].pop('role') }}",
    "{{ messages[0].setdefault('x', 1) }}",
    "{{ self.__init__ }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ [''] | map(attribute='__class__') | list }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ '{a.__class__}'.format_map({'a': ''}) }}",
    "{{ ''.encode() }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ joiner() }}",
    "{{ loop.__class__ }}",
    "{% for x in [1] %}{{ loop.__class__ }}{{ loop._iterator }}{{ loop.cycle }}{% endfor %}",
    "{% macro m() %}{% endmacro %}{{ m.__class__ }}{{ m.call }}",
    "{{ ''.join.owner }}{{ ''.join.__self__ }}",
    "{{ (1).__class__ }}{{ none.__class__ }}{{ true.real }}{{ (1.5).hex }}",
    "{{ [raise_exception, range] }}",
    "{{ [namespace(a=1)] }}{{ {1: 'x'.upper} }}",
    "{{ range(3).__class__ }}{{ nothing.__class__ }}",
    "{% include 'x' %}",
    "{% import 'x' as x %}",
    "{% from 'x' import y %}",
    "{% extends 'x' %}",
    "{% block b %}{% endblock %}",
    "{% autoescape true %}{% endautoescape %}",
    "{{ messages(*[1]) }}",
    "{{ dict(**{'__class__': 1}) }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_cannot_leave_its_sandbox(source: str) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "x"}]
    try:
        text = ChatTemplate(source, {}).render(messages)
    except (TokenizerError, PromptError):
        pass
    else:
        assert text.strip("[]") in ("", "Undefined")  # what is not there is nothing
    assert messages == [{"role": "user", "content": "x"}]


def test_what_templates_may_not_use_is_named() -> None:
    for source, what in (
        ("{{ 'x' | center(3) }}", "the filter center"),
        ("{% include 'x' %}", "the statement 'include'"),
        ("{{ ''.format() }}", "the method 'format'"),
    ):
        with pytest.raises(TokenizerError, match=f"uses {what}, which TSQP does not run"):
            ChatTemplate(source, {}).render([])
