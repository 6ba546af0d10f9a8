"""CONTRIBUTING.md names files that exist, and what they hold."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
ROWS = re.findall(r"^\| `([^`]+)` \| (.*) \|$", TEXT, re.MULTILINE)
PATH = re.compile(r"`((?:src|tests|scripts|deploy|docs)/[^`\s]*)`")
NAME = re.compile(r"`([A-Z]\w+|_?[A-Z][A-Z_]+|[a-z]+_\w+)`")


def test_each_addition_has_its_files() -> None:
    titles = [line for line in TEXT.splitlines() if line.startswith("## Add")]
    assert len(titles) == 5
    assert len(ROWS) > 50


def test_every_file_that_is_named_exists() -> None:
    commands = re.findall(r"^\$ .*?((?:scripts|tests)/[\w/.-]+)", TEXT, re.MULTILINE)
    for path in {*PATH.findall(TEXT), *commands}:
        assert (ROOT / path).exists(), path


def test_each_file_holds_the_names_that_its_row_gives() -> None:
    for path, words in ROWS:
        texts = [(ROOT / each).read_text() for each in [path, *PATH.findall(words)]]
        for name in NAME.findall(PATH.sub("", words)):
            assert any(re.search(rf"\b{name}\b", text) for text in texts), (path, name)
