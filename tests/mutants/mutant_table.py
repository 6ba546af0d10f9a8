"""The table of mutants: changes to the code that break a claim, and that some test must notice.

The entries are in the TOML files of this folder, one file for each kind of claim. `scripts/mutants`
makes the changes and runs the tests; see docs/testing.md.
"""

import ast
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

FOLDER = Path(__file__).parent


class TableError(Exception):
    """An entry that does not fit the code any more, or is not an entry."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change.

    Attributes:
        name: unique; words joined by hyphens.
        breaks: the claim that no longer holds, as one sentence.
        file: below src/tsqp.
        old: text that is in the file exactly once; whole lines, or a part of one.
        new: what takes its place.
        tests: below tests, as FILE::TEST; at least one of them must fail.
    """

    name: str
    breaks: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def apply(self, root: Path) -> str:
        """The changed text of the file, which is checked to be Python; nothing is written.

        Raises:
            TableError: the old text is not there exactly once, or the new one is not Python.
        """
        path = root / "src" / "tsqp" / self.file
        if not path.is_file():
            raise TableError(f"{self.name}: there is no file {self.file}.")
        text = path.read_text()
        if (count := text.count(self.old)) != 1:
            raise TableError(f"{self.name}: the old text is in {self.file} {count} times.")
        changed = text.replace(self.old, self.new)
        try:
            ast.parse(changed)
        except SyntaxError as exc:
            raise TableError(f"{self.name}: the new text is not Python: {exc}.") from exc
        return changed

    def check_tests(self, root: Path) -> None:
        """Raise TableError unless each test exists."""
        for test in self.tests:
            file, _, name = test.partition("::")
            path = root / "tests" / file
            if not path.is_file() or name.partition("[")[0] not in _functions(path):
                raise TableError(f"{self.name}: there is no test {test}.")


def load(folder: Path = FOLDER) -> list[Mutant]:
    """All entries, in the order of the files' names.

    Raises:
        TableError: an entry lacks a field or has another one, or a name comes twice.
    """
    mutants = []
    for path in sorted(folder.glob("*.toml")):
        for entry in tomllib.loads(path.read_text())["mutant"]:
            if entry.keys() != {field.name for field in fields(Mutant)}:
                raise TableError(f"{path.name}: an entry has the fields {', '.join(entry)}.")
            mutants.append(Mutant(**(entry | {"tests": tuple(entry["tests"])})))
    names = [mutant.name for mutant in mutants]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise TableError(f"{', '.join(sorted(repeated))}: such a name is there more than once.")
    return mutants


def _functions(path: Path) -> set[str]:
    nodes = ast.parse(path.read_text()).body
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
