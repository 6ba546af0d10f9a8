"""The table of mutants fits the code, and `scripts/mutants` tells what it finds.

`scripts/mutants` itself makes the changes, which takes minutes; see docs/testing.md.
"""

import subprocess
import sys
from dataclasses import replace
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "mutants"))

from mutant_table import Mutant, TableError, load  # noqa: E402

MUTANTS = load()
ONE = MUTANTS[0]


@pytest.fixture(scope="module")
def script() -> Any:
    loader = SourceFileLoader("mutants_script", str(ROOT / "scripts" / "mutants"))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules[loader.name] = module  # dataclasses look there
    loader.exec_module(module)
    return module


def test_there_are_mutants_for_every_kind_of_claim() -> None:
    assert len(MUTANTS) >= 40
    folders = {Path(mutant.file).parts[0] for mutant in MUTANTS}
    assert {"algebra", "cli", "gpu", "checkpoint", "tee", "wire"} <= folders


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_an_entry_fits_the_code_and_names_tests_that_exist(mutant: Mutant) -> None:
    mutant.apply(ROOT)
    mutant.check_tests(ROOT)
    assert mutant.old != mutant.new
    assert mutant.tests
    assert mutant.breaks.endswith(".")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"old": "nobody wrote this"}, "is in .* 0 times"),
        ({"old": "import "}, r"is in .* \d+ times"),
        ({"file": "tee/nowhere.py"}, "there is no file tee/nowhere.py"),
        ({"new": "def"}, "is not Python"),
        ({"tests": ("tee/crypto/test_check.py::test_nothing",)}, "no test tee/crypto/test_check"),
        ({"tests": ("tee/crypto/test_nowhere.py::test_it",)}, "no test tee/crypto/test_nowhere"),
    ],
)
def test_an_entry_that_no_longer_fits_is_an_error(changes: dict[str, Any], words: str) -> None:
    mutant = replace(ONE, **changes)
    with pytest.raises(TableError, match=f"^{ONE.name}: .*{words}"):
        mutant.apply(ROOT)
        mutant.check_tests(ROOT)


def test_a_name_that_comes_twice_is_an_error(tmp_path: Path) -> None:
    entry = '[[mutant]]\nname = "a"\nbreaks = ""\nfile = ""\nold = ""\nnew = ""\ntests = []\n'
    (tmp_path / "a.toml").write_text(entry)
    assert load(tmp_path)[0].name == "a"
    (tmp_path / "b.toml").write_text(entry)
    with pytest.raises(TableError, match="a: such a name is there more than once"):
        load(tmp_path)
    (tmp_path / "b.toml").write_text("[[mutant]]\nname = 'b'\n")
    with pytest.raises(TableError, match=r"b\.toml: an entry has the fields name\."):
        load(tmp_path)


FAILED = "FAILED tests/wire/test_a.py::test_b - AssertionError: no\n"


@pytest.mark.parametrize(
    ("status", "output", "verdict"),
    [
        (0, "2 passed", "SURVIVED"),
        (1, f"E   assert 1 == 2\n{FAILED}", "killed"),
        (-7, "", "killed"),
        (None, "", "killed by timeout"),
        (1, f"E   Failed: Timeout (>30.0s) from pytest-timeout.\n{FAILED}", "killed by timeout"),
        (1, f"E   NameError: name 'x' is not defined\n{FAILED}", "ERROR"),
        (1, f"E   numba.core.errors.TypingError: Failed\n{FAILED}", "ERROR"),
        (2, "1 error during collection", "ERROR"),
        (4, "not found: test_a.py::test_b", "ERROR"),
        (5, "no tests ran", "ERROR"),
    ],
)
def test_only_a_test_that_fails_notices_a_change(
    status: int | None, output: str, verdict: str, script: Any
) -> None:
    assert script.judge(status, output)[0] == verdict


def test_a_mutant_that_does_not_exist_is_wrong_usage() -> None:
    result = subprocess.run(
        [sys.executable, ROOT / "scripts" / "mutants", "no-such-name"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == 2
    assert result.stderr == "error: there is no mutant no-such-name.\n"
