"""The product of residues in one launch, without a GPU: interpreted, and compiled ahead of time."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tsqp.algebra.params import Field
from tsqp.gpu.backends import cuda_product, product_choice

pytest.importorskip("triton", reason="needs Triton: pip install 'tsqp[cuda]'")

HERE = Path(__file__).parent
MOST_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a block may take


@pytest.mark.parametrize(
    ("shapes", "cases"), [([], 29), pytest.param(["--all"], 39, marks=pytest.mark.slow)]
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
    product = product_choice.choose_product(torch.device("cpu"))  # without the interpreter
    assert isinstance(product, partial) and product.func is cuda_product.packed_product
    assert "Triton's product in int8 fails on cpu" in caplog.text


def test_a_product_that_is_wrong_on_a_device_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(c_TB: Tensor, weight_FD: Tensor, field: Field, out_TB: Tensor) -> None:
        cuda_product.packed_product(c_TB, weight_FD, field, out_TB)
        out_TB[-1, -1] ^= 1

    right = cuda_product.packed_product
    candidates = [("A product", wrong), ("Another", right)]
    monkeypatch.setattr(product_choice, "_candidates", lambda device: candidates)
    assert product_choice.choose_product(torch.device("cpu")) is right
    assert "A product is wrong on cpu" in caplog.text


@pytest.mark.parametrize(("capability", "expected"), [((9, 0), False), ((10, 3), True)])
def test_digits_are_bfloat16_where_int8_is_slow(
    capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda", 0)
    assert cuda_product.prefers_bfloat16(device) is expected
    names = [name for name, _ in product_choice._candidates(device)]
    assert names[0] == f"Triton's product in {'bfloat16' if expected else 'int8'}"
    assert names[-1].startswith("the library's product in")
