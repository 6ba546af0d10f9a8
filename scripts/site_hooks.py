"""Builds the site from the files of a checkout, at their own paths, so that links work in both.

mkdocs reads one folder only. Here the pages are `docs/` and the documents above it, together with
every file that one of them links to. The page of the Python interface is made from `__all__`.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from markdown import Extension, Markdown
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import tsqp

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")
PYTHON = """# Python

What `import tsqp` offers. Examples are in [generation](docs/generation.md), and the options of
`LLM` and `AsyncLLM` are the fields of `Options`.

"""


class _ListsAsOnGitHub(Extension):
    """The text of a list item may be indented by two or three spaces, not by four only."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.tab_length = 2
        md.build_parser()  # again: its parts have read the length


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    # First, because it rebuilds what later ones add to.
    config.markdown_extensions.insert(0, _ListsAsOnGitHub())  # type: ignore[arg-type]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Replace the pages of `docs/` by those of the checkout."""
    theme = [file for file in files if file.src_dir != config.docs_dir]
    paths = sorted({path.relative_to(ROOT).as_posix() for path in _paths()})
    options: dict[str, Any] = {"use_directory_urls": config.use_directory_urls}
    found = [File(path, str(ROOT), config.site_dir, **options) for path in paths]
    names = [name for name in tsqp.__all__ if not name.startswith("__")]
    python = PYTHON + "\n\n".join(f"::: tsqp.{name}" for name in names)
    return Files([*theme, *found, File.generated(config, "python.md", content=python)])


def _paths() -> Iterator[Path]:
    """Every document, and every file that one of them links to."""
    folders = "", "docs", "docs/decisions", "benchmarks", "deploy"
    for page in (page for folder in folders for page in (ROOT / folder).glob("*.md")):
        yield page
        for link in LINK.findall(page.read_text()):
            target = (page.parent / link).resolve()
            if target.is_file() and target.is_relative_to(ROOT):
                yield target
