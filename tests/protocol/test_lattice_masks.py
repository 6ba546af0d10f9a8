"""`pad --field lattice`: what the trusted side keeps, and what a session asks of a worker."""

import gc
from collections.abc import Sequence
from dataclasses import replace

import msgspec
import pytest
import torch
from torch import Tensor

from tsqp import LLM, SamplingParams
from tsqp.algebra.fixed_point import Bounds
from tsqp.checkpoint import weights as weights_module
from tsqp.checkpoint.footprint import hint_bytes, trusted_bytes
from tsqp.checkpoint.random_weights import GEOMETRIES
from tsqp.errors import HandshakeError, LatticeError, OutOfMemory, UnsupportedModel, UsageError
from tsqp.gpu import worker as worker_module
from tsqp.gpu.worker import Worker
from tsqp.runtime import build
from tsqp.tee.crypto.lattice import LatticeProvider
from tsqp.tee.crypto.stock import Pads
from tsqp.tee.offload import lattice_group
from tsqp.tee.offload.lattice_group import Switch

MODEL = "random:tiny"
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
PROMPT = [3, 141, 59]


@pytest.fixture
def switch(monkeypatch: pytest.MonkeyPatch) -> Switch:
    """The switch of the process, for tests that turn it off."""
    switch = Switch()
    monkeypatch.setattr(lattice_group, "process_switch", switch)
    monkeypatch.setattr(build, "process_switch", switch)
    return switch


def private(**options: object) -> LLM:
    return LLM(MODEL, **({"field": "lattice", "worker": "inproc", "pad_memory": 0} | options))  # type: ignore[arg-type]


def test_hints_take_what_the_formula_says_and_integer_weights_do_not_stay() -> None:
    gc.collect()
    before = {id(each) for each in gc.get_objects()}
    with private(worker="local") as llm:
        provider = llm._pads._provider if llm._pads is not None else None
        assert isinstance(provider, LatticeProvider)
        hints = [provider._public, *provider._hints.values()]
        assert sum(each.nbytes for each in hints) == hint_bytes(llm.config)
        gc.collect()
        held = [
            each
            for each in gc.get_objects()
            if id(each) not in before and isinstance(each, Tensor) and each.dtype == torch.int8
        ]
        assert held == []
        llm.generate([PROMPT], GREEDY)


def test_the_formula_counts_hints_and_no_weights() -> None:
    config = GEOMETRIES["smollm2-135m"]
    outputs = 30 * (960 + 576 + 3072 + 576) + 49_152
    found = trusted_bytes(config, torch.float32, "pad", lattice=True)
    embedding = 4 * 49_152 * 576
    assert hint_bytes(config) == pytest.approx(12_288 * (outputs + 1536), rel=1e-3)
    assert found == pytest.approx(hint_bytes(config) + embedding + 49_152 * 576, rel=0.01)


def test_too_little_memory_for_hints_is_told_with_the_other_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weights_module, "available_bytes", lambda: 2**20)
    with pytest.raises(OutOfMemory, match=r"hints of random:tiny:0, which --field wide .* bytes"):
        private()


def test_a_worker_that_does_not_know_the_field_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    welcome = Worker.welcome

    def older(worker: Worker, hello: object) -> object:
        found = welcome(worker, hello)  # type: ignore[arg-type]
        return msgspec.structs.replace(found, abilities=worker_module.PRIVATE_ABILITIES)

    monkeypatch.setattr(Worker, "welcome", older)
    with pytest.raises(HandshakeError, match="cannot do lattice_product; install the same tsqp"):
        private()
    private(field="wide").close()


def test_shares_have_no_lattice_masks() -> None:
    with pytest.raises(UsageError, match="--field lattice goes with --privacy pad"):
        private(privacy="shares", worker=["inproc", "inproc"], insecure_same_host=True)


def test_auto_is_a_field_and_others_are_refused_by_name() -> None:
    with private(field="auto") as llm:
        assert llm._options.field.name in ("wide", "lattice")
    with pytest.raises(UsageError, match="choose auto, wide, compact or lattice"):
        private(field="narrow")


@pytest.mark.parametrize("rows", [1, 200])
def test_a_wrong_product_of_a_mask_ends_lattice_offload_for_good(
    rows: int, switch: Switch, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, calls = LatticeProvider.make, list[int]()
    run = Worker.run

    def make_wrong(provider: LatticeProvider, key: tuple[int, str], count: int) -> Pads:
        pads = make(provider, key, count)
        if key == (1, "o"):
            pads.u_NF[:, -2] ^= 0x40  # more than the noise, which rounding would take away
        return pads

    def counting(worker: Worker, operation: object, inputs: Sequence[Tensor], outputs: object):  # type: ignore[no-untyped-def]
        calls.append(1)
        run(worker, operation, inputs, outputs)  # type: ignore[arg-type]

    with private() as other, private() as llm:
        monkeypatch.setattr(LatticeProvider, "make", make_wrong)
        monkeypatch.setattr(Worker, "run", counting)
        with pytest.raises(LatticeError, match=r"group o of layer 1 .* no worker can bring about"):
            llm.generate([[1] * rows], GREEDY)
        asked = len(calls)
        for each in (llm, other):
            with pytest.raises(Exception, match=r"nothing is offloaded with lattice|has ended"):
                each.generate([PROMPT], GREEDY)
        assert len(calls) == asked  # nothing was tried again
    with pytest.raises(LatticeError, match="--field wide, and report it"):
        private()
    with private(field="wide") as llm:
        llm.generate([PROMPT], GREEDY)


def test_a_group_too_wide_for_the_field_is_refused_by_its_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of = Bounds.of

    def enormous(integers_FD: Tensor) -> Bounds:
        return replace(of(integers_FD), l1=2**40)

    monkeypatch.setattr(Bounds, "of", enormous)
    with pytest.raises(UnsupportedModel, match="qkv of layer 0 does not fit the lattice field"):
        private()


def test_masks_made_ahead_give_the_tokens_of_fixed_point() -> None:
    with private(privacy="tee", worker=None, fixed_point=True, pad_memory=None) as llm:
        expected = llm.generate([PROMPT], GREEDY)[0].token_ids
    with private(worker="local", pad_memory=2**22) as llm:
        llm.fill_pads()
        assert llm.generate([PROMPT], GREEDY)[0].token_ids == expected
        assert llm.pads is not None and llm.pads.ahead_rows > 0
