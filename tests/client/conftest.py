"""Samples of real platforms, and platforms of our own."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(TESTS), str(TESTS / "protocol")]

from fake_platform import FakePlatform  # noqa: E402
from protocol_helpers import Commands  # noqa: E402


@pytest.fixture(scope="session")
def platform() -> FakePlatform:
    """An SEV-SNP platform with certificates of our own."""
    return FakePlatform()


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    """Runs commands; what they started must be gone at the end."""
    commands = Commands(tmp_path)
    try:
        yield commands
        commands.finish()
    finally:
        commands.close()
