"""The product of residues in one launch, without a GPU: interpreted, and compiled ahead of time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tsqp.gpu.backends.fast_product import fast_product

pytest.importorskip("triton", reason="needs Triton: pip install 'tsqp[cuda]'")

HERE = Path(__file__).parent
MOST_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a block may take


@pytest.mark.parametrize(
    ("shapes", "cases"), [([], 20), pytest.param(["--all"], 30, marks=pytest.mark.slow)]
)
def test_interpreted_kernels_give_the_products_of_big_integers(
    shapes: list[str], cases: int, tmp_path: Path
) -> None:
    result = subprocess.run(
        [sys.executable, HERE / "interpreted_kernels.py", *shapes],
        env=os.environ | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads(result.stdout) == {"cases": cases, "wrong": []}


@pytest.mark.parametrize(
    "capability",
    [pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(100, marks=pytest.mark.slow)],
)
def test_kernels_compile_for_a_gpu_and_fit_into_it(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled_kernels = pytest.importorskip("compiled_kernels")
    fields = compiled_kernels.FIELDS.values()
    chosen = list(fields)[:1] if capability == 90 else fields
    for field in chosen:
        for rows in compiled_kernels.ROWS:
            use = compiled_kernels.compile_kernel(capability, field, rows)
            print(use)
            assert use.shared <= MOST_SHARED[capability]
            assert use.registers <= 255
            assert use.instructions  # of tensor cores


def test_a_device_on_which_triton_fails_takes_library_calls(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert fast_product(torch.device("cpu")) is None  # there is no interpreter in this process
    assert "Triton fails on this device" in caplog.text
