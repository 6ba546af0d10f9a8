"""Names that would break a promise: nothing unpickled, no weak randomness in the trusted side."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "tsqp"
FILES = sorted(SOURCE.rglob("*.py"))


def names(path: Path) -> Iterator[str]:
    """Every dotted name that a file imports or uses, and each beginning of one."""
    tree = ast.parse(path.read_text())
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                aliases[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
                yield from beginnings(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield from beginnings(f"{node.module}.{alias.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            first, _, rest = ast.unparse(node).partition(".")
            yield from beginnings(aliases.get(first, first) + (f".{rest}" if rest else ""))


@cache
def all_names(path: Path) -> frozenset[str]:
    return frozenset(names(path))


def beginnings(name: str) -> Iterator[str]:
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        yield ".".join(parts[:length])


def users(name: str, files: list[Path] = FILES) -> list[str]:
    return [str(path.relative_to(SOURCE)) for path in files if name in all_names(path)]


def test_the_search_finds_what_is_there() -> None:
    assert len(FILES) > 40
    assert "wire/zmq.py" in users("zmq.Context")
    assert "tee/decoder.py" in users("torch.Tensor")
    assert "gpu/backends/cuda.py" in users("torch.cuda")
    assert users("numpy.random.Philox") == ["checkpoint/random_weights.py"]


@pytest.mark.parametrize("name", ["pickle", "marshal", "torch.load", "shelve", "joblib", "dill"])
def test_nothing_is_unpickled(name: str) -> None:
    assert users(name) == []


@pytest.mark.parametrize("name", ["eval", "exec", "compile", "__import__"])
def test_nothing_is_evaluated(name: str) -> None:
    assert users(name) == []


def test_the_trusted_side_uses_no_weak_randomness_and_no_gpu() -> None:
    files = [path for path in FILES if path.is_relative_to(SOURCE / "tee")]
    assert len(files) > 10
    for path in files:
        for name in all_names(path):
            forbidden = name in ("random", "numpy.random", "torch.cuda")
            assert not forbidden and not name.startswith("torch.rand"), (path, name)


@pytest.mark.parametrize(
    ("name", "files"),
    [("zmq", ["wire/server_socket.py", "wire/zmq.py"]), ("mmap", ["wire/shm.py"])],
)
def test_few_files_know(name: str, files: list[str]) -> None:
    assert sorted(users(name)) == files


def test_no_helper_process_shares_memory() -> None:
    assert users("multiprocessing") == []
