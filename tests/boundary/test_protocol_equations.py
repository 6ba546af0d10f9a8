"""Every equation of the protocol that the project cites is defined in docs/protocol.md."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
CITED = re.compile(r"\[P(\d+)\]")
DEFINED = re.compile(r"^- \*\*\[P(\d+)\]\*\*", re.MULTILINE)
FOLDERS = ("src", "tests", "docs", "scripts")


def cited_in() -> dict[str, set[int]]:
    files = [ROOT / "README.md", ROOT / "SECURITY.md"]
    for folder in FOLDERS:
        files += (path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md", ""))
    found = {}
    for path in filter(Path.is_file, files):
        if "__pycache__" not in path.parts:
            found[str(path.relative_to(ROOT))] = set(map(int, CITED.findall(path.read_text())))
    return found


def test_every_cited_equation_is_defined_once() -> None:
    defined = list(map(int, DEFINED.findall((ROOT / "docs/protocol.md").read_text())))
    assert len(defined) == len(set(defined)) >= 9
    for path, cited in cited_in().items():
        assert cited <= set(defined), f"{path} cites an equation that docs/protocol.md lacks"


def test_the_code_cites_every_equation() -> None:
    defined = set(map(int, DEFINED.findall((ROOT / "docs/protocol.md").read_text())))
    in_code = set().union(*(cited for path, cited in cited_in().items() if path.startswith("src/")))
    assert in_code == defined
