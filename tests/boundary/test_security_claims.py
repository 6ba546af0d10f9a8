"""SECURITY.md names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
NAMED = re.compile(r"`(tests/[^`]*)`")


def test_every_test_that_security_md_names_exists() -> None:
    named = NAMED.findall((ROOT / "SECURITY.md").read_text())
    assert len(named) > 100
    for each in named:
        path, _, name = each.partition("::")
        found = ROOT / path
        assert list(ROOT.glob(path)) if "*" in path else found.exists(), each
        if name:
            assert f"def {name}(" in found.read_text(), each
