"""The container files pass their linter, and hold what their users run."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

DEPLOY = Path(__file__).parents[2] / "deploy"
FILES = sorted(DEPLOY.glob("*/Containerfile"))
HADOLINT = Path(sys.executable).with_name("hadolint")
ENTRY = {
    "serve": '["/opt/tsqp/bin/tsqp", "serve"]',
    "worker": '["/opt/tsqp/bin/tsqp", "worker", "--serve", "private"]',
}
PORT = {"serve": "8443", "worker": "5555"}

each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)


def instructions(file: Path) -> list[tuple[str, str]]:
    text = file.read_text().replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and line[0] != "#"]
    return [(name, rest.strip()) for name, rest in lines]


def test_there_is_a_file_for_each_side() -> None:
    assert [file.parent.name for file in FILES] == ["serve", "worker"]


@each_file
def test_the_linter_finds_nothing_wrong(file: Path) -> None:
    done = subprocess.run(
        [HADOLINT, "--no-color", file], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_linter_finds_a_fault(tmp_path: Path) -> None:
    bad = tmp_path / "Containerfile"
    bad.write_text(FILES[0].read_text() + "RUN cd /tmp && apt-get install curl\n")
    done = subprocess.run([HADOLINT, bad], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "DL3015" in done.stdout


@each_file
def test_the_container_has_no_root_and_runs_its_side(file: Path) -> None:
    found = instructions(file)
    side = file.parent.name
    assert [rest for name, rest in found if name == "USER"] == ["10001:10001"]
    assert [rest for name, rest in found if name == "ENTRYPOINT"] == [ENTRY[side]]
    assert ("EXPOSE", PORT[side]) in found


@each_file
def test_what_the_container_copies_is_there(file: Path) -> None:
    sources = [
        source
        for name, rest in instructions(file)
        if name == "COPY" and "--from" not in rest
        for source in shlex.split(rest)[:-1]
    ]
    assert len(sources) >= 5
    assert all((DEPLOY.parent / source).exists() for source in sources)


def test_the_trusted_side_installs_only_wheels_with_a_known_hash() -> None:
    commands = [rest for name, rest in instructions(FILES[0]) if name == "RUN"]
    installs = [each for rest in commands for each in rest.split("&&") if "pip install" in each]
    assert len(installs) == 2
    assert "--require-hashes" in installs[0] and "requirements.lock" in installs[0]
    assert "--no-deps" in installs[1] and "--no-index" in installs[1]
