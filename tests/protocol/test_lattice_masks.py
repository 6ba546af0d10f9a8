"""`pad --field lattice`: what the trusted side keeps, and what a session asks of a worker."""

import errno
import gc
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from protocol_helpers import Main
from torch import Tensor

from tsqp import LLM, SamplingParams
from tsqp.algebra.fixed_point import Bounds
from tsqp.algebra.residue_blocks import BLOCK, halves
from tsqp.checkpoint import weights as weights_module
from tsqp.checkpoint.footprint import hint_bytes, trusted_bytes
from tsqp.checkpoint.random_weights import GEOMETRIES
from tsqp.errors import HandshakeError, LatticeError, OutOfMemory, UnsupportedModel, UsageError
from tsqp.gpu import worker as worker_module
from tsqp.gpu.worker import Worker
from tsqp.model.linear_group import LinearGroup
from tsqp.runtime import build, field_auto
from tsqp.tee.crypto.lattice import LatticeProvider
from tsqp.tee.crypto.pads import Pads
from tsqp.tee.offload import lattice_group
from tsqp.tee.offload.field_choice import MaskCosts, measure_costs
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


@pytest.mark.parametrize(("lattice", "bytes_each"), [(False, 8), (True, 20)])
def test_the_formula_counts_the_check_vectors_of_each_worker(
    lattice: bool, bytes_each: int
) -> None:
    config = GEOMETRIES["smollm2-135m"]
    features = 30 * (960 + 576 + 3072 + 576 + 3 * 576 + 1536) + 49_152 + 576
    one, three = (
        trusted_bytes(config, torch.float32, "pad", lattice=lattice, alternatives=number)
        for number in (1, 3)
    )
    assert three - one == 2 * bytes_each * features


def test_too_little_memory_for_hints_is_told_with_the_other_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weights_module, "available_bytes", lambda: 2**20)
    with pytest.raises(
        OutOfMemory,
        match=r"hints of random:tiny:0, which --field wide .* bytes.* or choose --field wide\.$",
    ):
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
    with pytest.raises(UsageError, match="--field lattice is for --privacy pad"):
        private(privacy="shares", worker=["inproc", "inproc"], insecure_same_host=True)


@pytest.mark.parametrize(
    ("costs", "field"),
    [
        (MaskCosts(2e-3, 1e-4, 1e-3, 3e-4), "lattice"),
        (MaskCosts(1e-3, 1e-4, 2e-3, 3e-4), "wide"),
        (MaskCosts(1e-3, 1e-4, 1e-3, 3e-4), "wide"),  # dearer only to use
        (MaskCosts(1e-3, 5e-4, 1.1e-3, 3e-4), "lattice"),
    ],
)
def test_auto_takes_what_costs_less_and_says_why(
    costs: MaskCosts,
    field: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(field_auto, "measure_costs", lambda *_: costs)
    with caplog.at_level(logging.INFO, "tsqp"), private(field="auto") as llm:
        assert llm._options.field == field
        llm.generate([PROMPT], GREEDY)
    lattice = f"{1e3 * costs.lattice_s:.3f} ms of processor time for lattice masks"
    pads = f"{1e3 * costs.pads_s:.3f} ms for pads and {1e3 * costs.pad_loops_s:.3f} ms to use them"
    assert f"field {field}: a token takes {lattice}" in caplog.text
    assert f"{1e3 * costs.lattice_loops_s:.3f} ms to use them, or {pads}" in caplog.text


def test_auto_takes_pads_where_hints_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(field_auto, "available_bytes", lambda: 2**20)
    with caplog.at_level(logging.INFO, "tsqp"), private(field="auto") as llm:
        assert llm._options.field == "wide"
    needed = trusted_bytes(GEOMETRIES["tiny"], torch.float32, "pad", lattice=True)
    assert f"would take {needed} bytes, and 1048576 are available" in caplog.text


@pytest.mark.parametrize("field", ["lattice", "wide"])
def test_auto_uses_given_hints_if_it_takes_lattice_masks(
    field: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    costs = {"lattice": MaskCosts(2, 0, 1, 0), "wide": MaskCosts(1, 0, 2, 0)}[field]
    monkeypatch.setattr(field_auto, "measure_costs", lambda *_: costs)
    with caplog.at_level(logging.INFO, "tsqp"), private(field="auto", hints="worker") as llm:
        assert (llm._options.field, llm._options.hints) == (
            field,
            "worker" if field == "lattice" else None,
        )
        llm.generate([PROMPT], GREEDY)
    assert ("the hints are not used" in caplog.text) is (field == "wide")
    assert ("waiting for the worker to make the hints" in caplog.text) is (field == "lattice")


def test_auto_says_that_it_is_wide_without_a_choice(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO, "tsqp"),
        private(field="auto", privacy="tee", worker=None, fixed_point=True, pad_memory=None) as llm,
    ):
        assert llm._options.field == "wide"
    assert "field wide: auto measures only with --privacy pad" in caplog.text
    with pytest.raises(UsageError, match="--hints is for --privacy pad"):
        private(field="auto", privacy="tee", worker=None, fixed_point=True, hints="worker")


def test_the_loops_around_a_call_are_measured_too() -> None:
    costs = measure_costs({LinearGroup(0, "up", 512, 128): (512, 128)}, 2**24)
    assert min(costs.pads_s, costs.pad_loops_s, costs.lattice_s, costs.lattice_loops_s) > 0


def test_auto_measures_that_masks_save_more_in_wide_layers_than_in_narrow_ones() -> None:
    def advantage(features: int, width: int) -> float:
        shapes = {LinearGroup(0, "up", features, width): (features, width)}
        costs = measure_costs(shapes, 2**30)
        assert costs.lattice_is_cheaper or width < 4096
        pads_s, lattice_s = (
            costs.pads_s + costs.pad_loops_s,
            costs.lattice_s + costs.lattice_loops_s,
        )
        return pads_s / lattice_s

    # About thirty; and a few, since one call costs pads more than all products of a layer so small.
    # Times are measured, so a busy machine gets three tries.
    assert any(advantage(16_384, 4096) > 2 * advantage(16, 16) for _ in range(3))


def test_a_field_that_is_none_is_refused_with_the_choice() -> None:
    with pytest.raises(UsageError, match="choose auto, wide, compact or lattice"):
        private(field="narrow")


@pytest.mark.parametrize("rows", [1, 200])
def test_a_wrong_product_of_a_mask_ends_lattice_offload_for_good(
    rows: int, switch: Switch, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, calls = LatticeProvider.make, list[int]()
    run = Worker.run

    def make_wrong(
        provider: LatticeProvider, group: LinearGroup, pads: Pads, place: list[int]
    ) -> None:
        make(provider, group, pads, place)
        if (group.layer, group.name) == (1, "o"):
            # A high bit: more than the noise, which rounding would take away.
            halves(pads.u_NF)[-1, place, 2 * BLOCK] ^= 0x40

    def counting(worker: Worker, operation: object, inputs: Sequence[Tensor], outputs: object):  # type: ignore[no-untyped-def]
        calls.append(1)
        run(worker, operation, inputs, outputs)  # type: ignore[arg-type]

    with private() as other, private() as llm:
        monkeypatch.setattr(LatticeProvider, "make", make_wrong)
        monkeypatch.setattr(Worker, "run", counting)
        with pytest.raises(
            LatticeError, match=r"group o of layer 1 .* The worker did not cause this"
        ):
            llm.generate([[1] * rows], GREEDY)
        asked = len(calls)
        for each in (llm, other):
            with pytest.raises(Exception, match=r"uses no more lattice masks|has ended"):
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


def refusing(opening: Callable[..., int], refused: Path) -> Callable[..., int]:
    """`os.open` of a user who may not read one file; root may read all."""

    def opened(path: object, *arguments: Any, **more: Any) -> int:
        if path == refused:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opening(path, *arguments, **more)

    return opened


def test_hints_that_prepare_wrote_are_used_and_a_file_that_cannot_be_is_one_sentence(
    main: Main, tmp_path: Path, ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, hints = tmp_path / "tiny.tsqp.safetensors", tmp_path / "tiny.tsqp.hints"
    result = main("prepare", MODEL, prepared, "--hints", hints)
    assert result.status == 0, result.stderr
    assert f"--field lattice --hints {hints}" in result.stderr
    command = ["generate", MODEL, "--worker", "inproc", "--field", "lattice", "--hints", hints]
    command += ["--prompt-ids", ids, "--pad-memory", "0", "--max-tokens", 2, "--json"]
    result = main(*command)
    assert result.status == 0, result.stderr
    hints.write_bytes(hints.read_bytes()[:-1])
    result = main(*command)
    assert (result.status, result.stdout) == (1, "")
    assert f"Cannot use the hints in {hints}" in result.error
    monkeypatch.setattr(os, "open", refusing(os.open, hints))
    result = main(*command)
    assert (result.status, result.stdout) == (1, "")
    assert result.error.endswith(f"Cannot open {hints}: Permission denied; let this user read it.")
    monkeypatch.undo()
    result = main("prepare", MODEL, tmp_path / "again.tsqp.safetensors", "--hints", hints)
    assert f"{hints} exists; name a new file" in result.error
