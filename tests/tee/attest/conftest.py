"""Makes the fakes importable, and lets nothing pause."""

import sys
from pathlib import Path

import pytest

from tsqp.tee.attest import configfs

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configfs, "PAUSE_S", 0.0)
