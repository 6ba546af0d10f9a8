"""The direction of imports, as pyproject.toml states it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_import_contract_is_kept() -> None:
    code = "from importlinter.cli import lint_imports_command as lint; lint()"
    result = subprocess.run(
        [sys.executable, "-c", code, "--no-cache", "--no-logo"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"NO_COLOR": "1"},
        timeout=60,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "5 kept, 0 broken" in result.stdout


def test_the_command_line_starts_without_torch_and_without_a_server() -> None:
    heavy = {"torch", "transformers", "fastapi", "pydantic", "uvicorn", "prometheus_client"}
    code = f"import sys, tsqp.cli; print(*sorted({heavy} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout == "\n"


def test_only_the_server_loads_what_a_server_needs() -> None:
    """Forms of answers have a package of their own, which is loaded with the first form."""
    heavy = {"fastapi", "pydantic", "starlette", "uvicorn", "prometheus_client", "llguidance"}
    code = (
        "import sys, tsqp, tsqp.cli.open_llm, tsqp.cli.printing, tsqp.runtime.async_llm;"
        "import tsqp.runtime.llm, tsqp.tee.guided.guide;"
        f"tsqp.StructuredOutputsParams(regex='a'); print(*sorted({heavy} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout == "\n"


def test_a_worker_loads_nothing_of_the_trusted_side() -> None:
    code = "import sys, tsqp.gpu.serve; print([m for m in sys.modules if 'tsqp.tee' in m])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout == "[]\n"
