"""Loops are compiled for those who use them, and when they say so."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray

from tsqp import LLM, SamplingParams
from tsqp.algebra.native import Kernel, compiled

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
