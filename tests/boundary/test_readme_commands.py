"""Every command that README.md shows can be given as it stands there."""

import os
import re
import shlex
from pathlib import Path

from command_line_helpers import surface

ROOT = Path(__file__).parents[2]
COMMAND = re.compile(r"^(?:\$ )?(?:\.venv/bin/)?(tsqp|scripts/\S+)(?= |$)")


def shown_commands() -> list[list[str]]:
    """The words of each `tsqp …` and `scripts/…` line in a fenced block."""
    readme = (ROOT / "README.md").read_text()
    found = []
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", readme, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if match := COMMAND.match(line.strip()):
                words = shlex.split(line.strip()[match.start(1) :], comments=True)
                found.append(words[: words.index("&")] if "&" in words else words)
    return found


def test_the_readme_shows_commands() -> None:
    assert len(shown_commands()) >= 3


def test_every_command_in_the_readme_exists_with_its_options() -> None:
    known = surface()
    for program, *words in shown_commands():
        if program != "tsqp":
            script = ROOT / program
            assert script.is_file(), program
            assert os.access(script, os.X_OK), program
            continue
        names = [word for word in words if not word.startswith("-")]
        command = names[0] if names else ""
        assert command in known, words
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert options <= {*known[command], *known[""], "--help"}, words
