"""README.zh-CN.md says what README.md says: the same commands, figures and links in each place.

Words are not compared. Code blocks and tables must agree in order. In prose the order of words
differs: each section must have the same code, numbers and link targets.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENGLISH, CHINESE = "README.md", "README.zh-CN.md"
CODE = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)]+)\)")
NUMBER = re.compile(r"\d[\d.,]*\d|\d|[⁻⁰¹²³⁴-⁹]+")
UNIT = re.compile(r"\s*(ms|s|MB|GB|%)?(?![A-Za-z])")


@dataclass
class Section:
    """What lies between two headings."""

    title: str = "the beginning"
    blocks: list[str] = field(default_factory=list)
    tables: list[list[list[str]]] = field(default_factory=list)
    prose: str = ""


def sections(text: str) -> Iterator[Section]:
    """The sections of a document, in order."""
    parts = re.split(r"^(```.*?^```)$", text, flags=re.MULTILINE | re.DOTALL)
    section, in_table = Section(), False
    for number, part in enumerate(parts):
        if number % 2:
            section.blocks.append(part)
            continue
        for line in part.splitlines():
            if line.startswith("#"):
                yield section
                section = Section(line.strip("# "))
            elif line.startswith("|"):
                if not in_table:
                    section.tables.append([])
                section.tables[-1].append([cell.strip() for cell in line.split("|")[1:-1]])
            else:
                section.prose += line + "\n"
            in_table = line.startswith("|")
    yield section


def figures(text: str) -> list[str]:
    """The numbers of a text with their units, in order, without those of code and links."""
    text = LINK.sub("]", CODE.sub("", text))
    found = []
    for match in NUMBER.finditer(text):
        unit = UNIT.match(text, match.end())
        found.append(f"{match[0]} {unit[1]}" if unit and unit[1] else match[0])
    return found


def links(text: str) -> list[str]:
    """The targets of a text's links, but for those of one README to the other."""
    return [target for target in LINK.findall(text) if target not in (ENGLISH, CHINESE)]


def differences(english: str, chinese: str) -> list[str]:
    """What to change: where the two differ, and in what."""
    left, right = list(sections(english)), list(sections(chinese))
    if len(left) != len(right):
        return [f"{ENGLISH} has {len(left) - 1} headings, and {CHINESE} has {len(right) - 1}"]
    found: list[str] = []

    def compare(where: str, kind: str, one: object, other: object) -> None:
        if one != other:
            found.append(f"{where}: {kind} {one} in {ENGLISH}, {other} in {CHINESE}")

    for a, b in zip(left, right, strict=True):
        where = f"“{a.title}” / “{b.title}”"
        compare(where, "code blocks", a.blocks, b.blocks)
        for kind, read in (("code", CODE.findall), ("numbers", figures), ("links", links)):
            one, other = Counter(read(a.prose)), Counter(read(b.prose))
            compare(where, kind, sorted((one - other).elements()), sorted((other - one).elements()))
        shapes = [[[len(row) for row in table] for table in each.tables] for each in (a, b)]
        compare(where, "cells of the rows of tables", *shapes)
        if shapes[0] != shapes[1]:
            continue
        for table, (rows, others) in enumerate(zip(a.tables, b.tables, strict=True), 1):
            for row, other_row in zip(rows, others, strict=True):
                for column, (cell, other_cell) in enumerate(zip(row, other_row, strict=True), 1):
                    place = f"{where}, table {table}, row “{row[0]}”, column {column}"
                    for kind, read in (("code", CODE.findall), ("numbers", figures)):
                        compare(place, kind, read(cell), read(other_cell))
                    compare(place, "links", links(cell), links(other_cell))
    return found


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_chinese_readme_has_the_commands_figures_and_links_of_the_english_one() -> None:
    found = differences(read(ENGLISH), read(CHINESE))
    assert not found, f"Translate what changed, or copy the figures to {CHINESE}:\n" + "\n".join(
        found
    )


def test_each_readme_links_to_the_other() -> None:
    assert f"]({CHINESE})" in read(ENGLISH).split("##")[0]
    assert f"]({ENGLISH})" in read(CHINESE).split("##")[0]


def test_a_figure_that_changes_in_one_of_them_is_named() -> None:
    english = read(ENGLISH)
    table = re.search(r"\| (\d+\.\d+) s \|", english)
    assert table is not None
    changed = english.replace(table[0], "| 98765 s |", 1)
    [difference] = differences(changed, read(CHINESE))
    assert "numbers ['98765 s']" in difference and f"['{table[1]} s']" in difference


def test_a_command_that_changes_in_one_of_them_is_noticed() -> None:
    assert differences(read(ENGLISH).replace("tsqp serve demo", "tsqp serve x", 1), read(CHINESE))
    assert differences(read(ENGLISH).replace("`ipc:///PATH`", "`ipc://x`", 1), read(CHINESE))
