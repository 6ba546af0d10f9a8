"""The wheel holds the package and nothing else, and works where nothing else is installed."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXTRAS = {"audit", "bench", "client", "cuda", "dev", "docs", "ray", "serve"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory"]
    subprocess.run([*build, str(folder)], cwd=ROOT, check=True, timeout=60, capture_output=True)
    [made] = folder.iterdir()
    return made


def test_a_wheel_holds_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    source = ROOT / "src"
    expected = {
        str(path.relative_to(source))
        for path in (source / "tsqp").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as file:
        found = {name for name in file.namelist() if ".dist-info/" not in name}
    assert found == expected
    assert {"tsqp/py.typed", "tsqp/serve/page/page.js"} <= found


def test_the_metadata_of_a_wheel_names_the_command_the_licence_and_the_extras(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        [info] = {name.partition("/")[0] for name in file.namelist() if ".dist-info/" in name}
        metadata = Parser().parsestr(file.read(f"{info}/METADATA").decode())
        commands = file.read(f"{info}/entry_points.txt").decode()
        assert f"{info}/licenses/LICENSE" in file.namelist()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra", [])) == EXTRAS
    assert "tsqp = tsqp.cli:main" in commands


@pytest.mark.slow
def test_an_installed_wheel_generates_through_a_worker_process(wheel: Path, tmp_path: Path) -> None:
    def run(*command: str, timeout: float = 60) -> str:
        pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **pip}
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=environment,
            timeout=timeout,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(sys.executable, "-m", "venv", "env")
    pip = [str(tmp_path / "env/bin/python"), "-m", "pip", "install", "--quiet"]
    given = f"{wheel}[audit,client,serve]"
    run(*pip, "--constraint", str(ROOT / "constraints.txt"), given, timeout=250)
    tsqp = str(tmp_path / "env/bin/tsqp")
    prompt = tmp_path / "ids.json"
    prompt.write_text("[1, 2, 3]")
    model = ["generate", "random:tiny", "--prompt-ids", str(prompt), "--max-tokens", "4"]
    last = run(tsqp, *model, "--worker", "local", "--json").splitlines()[-1]
    assert len(json.loads(last)["outputs"][0]["token_ids"]) == 4
    for command in ("serve", "proxy", "audit", "chat"):
        run(tsqp, command, "--help")


def install_site(
    wheel: Path, folder: Path, locked: str, umask: int
) -> "subprocess.CompletedProcess[str]":
    """Run `deploy/site` in a folder of its own, with a lock file without packages."""
    deploy = folder / "deploy"
    deploy.mkdir(parents=True)
    shutil.copy(ROOT / "deploy" / "site", deploy)
    (deploy / "requirements.lock").write_text(f"# Written by deploy/lock, for Python {locked} on\n")
    python = folder / "python"  # has built the wheel already
    build = f'case "$*" in *"pip wheel"*) shift 6; exec cp {wheel} "$1";; esac'
    python.write_text(f'#!/bin/sh\n{build}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return subprocess.run(
        [deploy / "site", python, folder / "site"], capture_output=True, text=True, umask=umask
    )


def test_what_is_installed_does_not_depend_on_where_and_by_whom(
    wheel: Path, tmp_path: Path
) -> None:
    found = []
    for name, umask in (("a", 0o22), ("b", 0o77)):
        done = install_site(wheel, tmp_path / name, f"3.{sys.version_info.minor}", umask)
        assert done.returncode == 0, done.stderr
        site = tmp_path / name / "site"
        paths = [path for path in sorted(site.rglob("*")) if path.is_file()]
        found.append({
            str(path.relative_to(site)): (path.stat().st_mode, path.read_bytes()) for path in paths
        })  # fmt: skip
    assert found[0] == found[1]
    assert "tsqp/cli/serve.py" in found[0]
    assert {name.partition("/")[0] for name in found[0]} == {"tsqp", "tsqp-0.1.0.dist-info"}


def test_a_lock_file_for_another_python_is_refused(wheel: Path, tmp_path: Path) -> None:
    done = install_site(wheel, tmp_path, "3.1", 0o22)
    assert done.returncode == 1
    assert "error: requirements.lock is for another Python" in done.stderr
    assert not (tmp_path / "site").exists()
