"""Loops are compiled for those who use them, and when they say so."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tsqp import LLM, SamplingParams
from tsqp.algebra.native import Kernel, compiled
from tsqp.algebra.params import FIELDS, Field
from tsqp.gpu.weights import load_integers
from tsqp.gpu.worker import Worker
from tsqp.model.checkpoint import open_checkpoint
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
            self.ready.add(name_of(kernel))
            compile_kernel(kernel)

        def call(kernel: Kernel, *arguments: object) -> object:
            self.used.add(name_of(kernel))
            return call_kernel(kernel, *arguments)

        monkeypatch.setattr(Kernel, "compile", compile_it)
        monkeypatch.setattr(Kernel, "__call__", call)

    def loaded(self) -> set[str]:
        """What is ready now; from here on, what is used is counted anew."""
        ready = self.ready | self.used  # in an earlier test one may have been compiled by a call
        self.used.clear()
        return ready


def name_of(kernel: Kernel) -> str:
    return f"{kernel._dispatcher.__module__}.{kernel._dispatcher.__name__}"


@pytest.mark.parametrize("field", list(FIELDS))
@pytest.mark.parametrize(
    "options",
    [
        {"privacy": "tee", "fixed_point": True},
        {"privacy": "pad", "worker": "local", "pad_memory": 0},
        {"privacy": "shares", "worker": ["local", "local"], "insecure_same_host": True},
    ],
    ids=["fixed-point", "pad", "shares"],
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
    worker = Worker(None, load_integers(checkpoint, torch.device("cpu")))
    ready = watch.loaded()
    out_TB = torch.empty(2, 64 * field.residue_bytes, dtype=torch.uint8)
    worker.run(SeedProduct(0, "o", field.name, 2, bytes(32)), [], [out_TB])
    worker.run(Product(0, "o", field.name), [torch.zeros_like(out_TB)], [out_TB])
    assert watch.used
    assert watch.used <= ready
