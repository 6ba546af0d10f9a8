"""Loops are compiled for those who use them, when they say so, and with nobody else's settings."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tsqp import LLM, SamplingParams
from tsqp.algebra.native import Kernel, compiled
from tsqp.algebra.params import FIELDS, Field
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.gpu.backends.cpu import CpuBackend
from tsqp.gpu.worker import Worker
from tsqp.gpu.worker_weights import load_integers
from tsqp.wire.messages import Product, SeedProduct

TWO_TOKENS = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)


@compiled("int64(int32[::1])")
def _add_up(values_N: NDArray[np.int32]) -> int:
    total = 0
    for i in range(values_N.size):
        total += values_N[i]
    return total


def test_threads_that_need_a_kernel_at_once_all_get_its_result() -> None:
    values_N = np.arange(10, dtype=np.int32)
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(_add_up, [values_N] * 8)) == [45] * 8


def test_a_kernel_refuses_other_types_than_its_own() -> None:
    _add_up.compile()
    with pytest.raises(TypeError):
        _add_up(np.arange(10, dtype=np.float64))


@pytest.mark.parametrize(("privacy", "worker"), [("tee", None), ("open", "inproc")])
def test_modes_without_residues_wait_for_no_compiler(
    privacy: str, worker: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a kernel was needed")

    monkeypatch.setattr(Kernel, "compile", refuse)
    monkeypatch.setattr(Kernel, "__call__", refuse)
    with LLM("random:tiny", privacy=privacy, worker=worker) as llm:
        assert len(llm.generate([[1, 2, 3]], TWO_TOKENS)[0].token_ids) == 2


class Watch:
    """Which kernels are ready, and which are used."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ready: set[str] = set()
        self.used: set[str] = set()
        compile_kernel, call_kernel = Kernel.compile, Kernel.__call__

        def compile_it(kernel: Kernel) -> None:
            self.ready.add(kernel.name)
            compile_kernel(kernel)

        def call(kernel: Kernel, *arguments: object) -> object:
            self.used.add(kernel.name)
            return call_kernel(kernel, *arguments)

        monkeypatch.setattr(Kernel, "compile", compile_it)
        monkeypatch.setattr(Kernel, "__call__", call)

    def loaded(self) -> set[str]:
        """What is ready now; from here on, what is used is counted anew."""
        ready = self.ready | self.used  # in an earlier test one may have been compiled by a call
        self.used.clear()
        return ready


FIXED_POINT = {"privacy": "tee", "fixed_point": True}
PAD = {"privacy": "pad", "worker": "local", "pad_memory": 0}
SHARES = {"privacy": "shares", "worker": ["local", "local"], "insecure_same_host": True}


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (FIXED_POINT, "wide"),
        (FIXED_POINT, "lattice"),
        *((PAD, field) for field in FIELDS),
        (SHARES, "compact"),
    ],
    ids=lambda value: value if isinstance(value, str) else value["privacy"],
)
def test_the_trusted_side_compiles_nothing_once_it_is_loaded(
    options: dict[str, Any], field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(monkeypatch)
    with LLM("random:tiny", field=field, **options) as llm:
        ready = watch.loaded()
        llm.generate([[1, 2, 3]], TWO_TOKENS)
    assert watch.used
    assert watch.used <= ready


@pytest.mark.parametrize("field", list(FIELDS.values()), ids=list(FIELDS))
def test_a_worker_compiles_nothing_once_it_is_loaded(
    field: Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(monkeypatch)
    checkpoint = open_checkpoint("random:tiny")
    worker = Worker(None, load_integers(checkpoint, CpuBackend()))
    ready = watch.loaded()
    out_TB = torch.empty(2, 64 * field.residue_bytes, dtype=torch.uint8)
    worker.run(SeedProduct(0, "o", field.name, 2, bytes(32)), [], [out_TB])
    worker.run(Product(0, "o", field.name), [torch.zeros_like(out_TB)], [out_TB])
    assert watch.used
    assert watch.used <= ready


HOSTILE = """
disable_jit: 1
boundscheck: 1
opt: 0
dump_llvm: 1
cpu_name: generic
chrome_trace: trace.json
debug: 1
"""
COMPILE = """
import os, sys
import numpy as np
if len(sys.argv) > 1:
    import yaml  # as something else may have done
from tsqp.algebra import rejection
assert "numba" not in sys.modules
print(rejection.accept(np.array([1, 2, 3], np.uint32), 2, 3, np.empty(3, np.int32)))
import numba
names = "DISABLE_JIT BOUNDSCHECK OPT DUMP_LLVM CPU_NAME CHROME_TRACE DEBUG"
found = {name: getattr(numba.config, name) for name in names.split()}
print(found | {"OPT": int(found["OPT"])})
assert rejection._accept._run.nopython_signatures
assert os.environ["NUMBA_OPT"] == "0"
import yaml
assert yaml.safe_load("a: 1") == {"a": 1}
"""
DEFAULTS = {
    "DISABLE_JIT": 0, "BOUNDSCHECK": None, "OPT": 3, "DUMP_LLVM": 0, "CPU_NAME": None,
    "CHROME_TRACE": "", "DEBUG": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [pytest.param([], marks=pytest.mark.slow), ["yaml"]],
    ids=["first", "yaml is there already"],
)
def test_settings_of_numba_have_no_effect_wherever_they_are(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".numba_config.yaml").write_text(HOSTILE)
    for line in HOSTILE.split("\n")[1:-1]:
        name, value = line.split(": ")
        monkeypatch.setenv(f"NUMBA_{name.upper()}", value)
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", COMPILE, *arguments],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (0, f"2\n{DEFAULTS}\n"), result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".numba_config.yaml"]


def test_modes_without_residues_do_not_import_numba() -> None:
    code = (
        "import sys; from tsqp import LLM\n"
        "for privacy, worker in (('tee', None), ('open', 'inproc')):\n"
        "    with LLM('random:tiny', privacy=privacy, worker=worker) as llm:\n"
        "        assert llm.generate([1, 2, 3])\n"
        "print({'numba', 'matplotlib', 'sympy', 'pandas'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=240
    )
    assert result.stdout == "set()\n"
