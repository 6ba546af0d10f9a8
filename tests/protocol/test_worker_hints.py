"""`--hints worker`: a worker makes the hints of lattice masks, which are used only if right."""

from collections.abc import Callable, Sequence
from contextlib import closing

import numpy as np
import pytest
import torch
from protocol_helpers import Main
from torch import Tensor

from tsqp import LLM, SamplingParams
from tsqp.algebra.hints import make_hints
from tsqp.algebra.params import DEGREE, LATTICE
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.checkpoint.quantize import quantize_all
from tsqp.errors import IntegrityError, OutOfMemory
from tsqp.gpu.worker import Worker
from tsqp.tee.crypto.freivalds import MAX_FAILURES, FailureLimit
from tsqp.tee.crypto.lattice import LatticeProvider
from tsqp.tee.offload import worker_hints

MODEL = "random:tiny"
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
PROMPT = [3, 141, 59]
FEATURES = 96  # of a row of `qkv`, whose low words come first


def private(**options: object) -> LLM:
    return LLM(MODEL, **({"field": "lattice", "worker": "inproc", "pad_memory": 0} | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"worker": "local"}, {"worker": "local", "shm": False}])
def test_answers_with_hints_of_a_worker_are_those_with_hints_made_here(
    options: dict[str, object],
) -> None:
    with private() as llm:
        expected = llm.generate([PROMPT], GREEDY)[0].token_ids
    with private(hints="worker", **options) as llm:
        assert llm.generate([PROMPT], GREEDY)[0].token_ids == expected


def test_hints_of_a_worker_are_the_products_of_the_public_polynomials() -> None:
    with private(hints="worker") as llm:
        assert llm._pads is not None
        provider = llm._pads._provider
        assert isinstance(provider, LatticeProvider)
        public, hints = provider._public, provider._hints
    with closing(open_checkpoint(MODEL)) as checkpoint:
        for group, weights in quantize_all(checkpoint):
            made = make_hints(public, weights.weight_FD)
            assert np.array_equal(made.low_GNB, hints[group].low_GNB)
            assert np.array_equal(made.high_GNB, hints[group].high_GNB)


def flip_a_bit(z_TB: Tensor) -> None:
    z_TB[7, 11] ^= 4


def swap_two_rows(z_TB: Tensor) -> None:
    z_TB[:2] = z_TB[:2].flip(0)


def add_q(z_TB: Tensor) -> None:
    low_TF = z_TB[:, : 4 * FEATURES].view(torch.int32)
    z_TB[:, 4 * FEATURES :].view(torch.int16)[5] += 2**14  # q, and a little more
    low_TF[5] -= LATTICE.gap


LIES: list[Callable[[Tensor], object]] = [flip_a_bit, swap_two_rows, add_q, Tensor.zero_]


@pytest.mark.parametrize("lie", LIES)
def test_wrong_hints_of_a_worker_are_refused(
    lie: Callable[[Tensor], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = Worker.run, list[int]()

    def lying(
        worker: Worker, operation: object, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        run(worker, operation, inputs, outputs)  # type: ignore[arg-type]
        calls.append(1)
        if len(calls) == 3:
            lie(outputs[0])

    monkeypatch.setattr("tsqp.runtime.build.process_limit", limit := FailureLimit())
    monkeypatch.setattr(Worker, "run", lying)
    with pytest.raises(
        IntegrityError,
        match=r"The worker at inproc made wrong hints for group qkv of layer 0; no mask",
    ):
        private(hints="worker")
    assert len(calls) <= DEGREE // worker_hints.ROWS  # nothing more is asked of it
    assert limit._left == MAX_FAILURES - 1


def test_a_worker_that_has_no_memory_for_hints_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise OutOfMemory("there is no memory")

    monkeypatch.setattr(Worker, "run", failing)
    with pytest.raises(Exception, match="The worker failed: there is no memory"):
        private(hints="worker")


def test_the_option_belongs_to_lattice_masks(main: Main) -> None:
    result = main("generate", MODEL, "--worker", "inproc", "--field", "wide", "--hints", "worker")
    assert result.status == 2
    assert "--hints is for --privacy pad with --field lattice" in result.stderr
