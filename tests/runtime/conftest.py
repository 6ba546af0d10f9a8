"""Helpers of the other folders, and what must be left behind by every test here: nothing."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(TESTS), str(TESTS / "protocol")]

from protocol_helpers import Commands  # noqa: E402


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Commands]:
    """Runs commands; what they and this process started must be gone at the end."""
    commands = Commands(tmp_path)
    for name, value in commands.tag.items():
        monkeypatch.setenv(name, value)  # local workers inherit it
    try:
        yield commands
        commands.finish()
    finally:
        commands.close()
