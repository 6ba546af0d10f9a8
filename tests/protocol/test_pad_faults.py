"""In `pad`, what cannot be right ends a request, a session or the start, and gives no answer."""

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from pad_answers import EVERY, linear, tokens
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tsqp import LLM
from tsqp.errors import IntegrityError, NumericalError, TSQPError, UnsupportedModel
from tsqp.gpu.worker import Worker
from tsqp.model.config import layer_groups
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.crypto.freivalds import MAX_FAILURES, FailureLimit
from tsqp.tee.crypto.pad_pool import PadPool
from tsqp.tee.crypto.pads import Pads
from tsqp.tee.offload.masked import MaskedGroup
from tsqp.tee.offload.offload import Linear
from tsqp.wire.client import RemoteChannel


def test_an_activation_that_is_no_number_ends_the_request_by_its_layer(small_llama: Path) -> None:
    with LLM(str(small_llama), worker="inproc") as llm:
        x_TD = torch.ones(2, 48)
        x_TD[1, 3] = float("nan")
        with pytest.raises(NumericalError, match="input of group qkv of layer 1"):
            linear(llm, layer_groups(llm.config, 1).qkv, x_TD)
        assert tokens(llm, [[1, 2, 3]])  # and the session goes on


def test_a_group_too_wide_for_the_field_is_refused_by_its_figures(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=120_000,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(1.0)
    model.save_pretrained(tmp_path)
    expected = "group down of layer 0 does not fit the compact field: .* 64 are needed"
    with pytest.raises(UnsupportedModel, match=expected):
        LLM(str(tmp_path), privacy="tee", fixed_point=True, field="compact")
    LLM(str(tmp_path), privacy="tee", fixed_point=True, field="wide").close()


def test_weights_that_are_no_numbers_are_refused_by_name(small_llama: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(small_llama)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("inf")
    model.save_pretrained(tmp_path)
    with pytest.raises(TSQPError, match=r"layers\.1\.mlp\.up_proj\.weight .* NaN or infinity"):
        LLM(str(tmp_path), privacy="tee", fixed_point=True)


def test_a_session_ends_with_a_wrong_answer_and_forgets_its_check_vectors(
    small_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsqp.runtime.build.process_limit", FailureLimit())
    run = Worker.run

    def lie(worker: Worker, operation: object, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        run(worker, operation, inputs, outputs)  # type: ignore[arg-type]
        outputs[0][0, 0] ^= 1

    before = living_groups()
    with LLM(str(small_llama), worker="inproc", pad_memory=2**20) as llm:
        groups = living_groups() - before  # which hold the vectors
        assert len(groups) == 9
        llm.fill_pads()
        assert llm.pads is not None and llm.pads.stock_bytes > 0
        monkeypatch.setattr(Worker, "run", lie)
        with pytest.raises(IntegrityError, match="wrong product for group qkv of layer 0"):
            tokens(llm, [[1, 2, 3]])
        monkeypatch.setattr(Worker, "run", run)  # honest again, but nobody asks
        with pytest.raises(IntegrityError, match="wrong product for group qkv of layer 0"):
            tokens(llm, [[1, 2, 3]])
        assert llm.pads is not None and llm.pads.stock_bytes == 0
        assert not groups & living_groups()


def test_a_lie_is_remembered_by_the_next_session_even_if_its_end_was_interrupted(
    small_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsqp.runtime.build.process_limit", limit := FailureLimit())
    run, calls = Worker.run, list[int]()

    def lie(worker: Worker, operation: object, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        run(worker, operation, inputs, outputs)  # type: ignore[arg-type]
        calls.append(1)
        outputs[0][0, 0] ^= 1

    def interrupted(_: PadPool) -> None:
        raise KeyboardInterrupt

    with LLM(str(small_llama), worker="inproc", pad_memory=0) as llm:
        monkeypatch.setattr(Worker, "run", lie)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(PadPool, "close", interrupted)
            tokens(llm, [[1, 2, 3]])
        for _ in range(2):
            with pytest.raises(IntegrityError, match="wrong product for group qkv of layer 0"):
                tokens(llm, [[1, 2, 3]])
            with pytest.raises(IntegrityError, match="wrong product for group qkv of layer 0"):
                llm.score([1, 2, 3])
        assert len(calls) == 1
    assert limit._left == MAX_FAILURES - 1


def living_groups() -> set[int]:
    """All that nobody has let go of yet."""
    gc.collect()
    return {id(each) for each in gc.get_objects() if type(each) is MaskedGroup}


@EVERY
@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_wrong_row_of_any_block_gives_up_all_of_the_answer(
    block: int, field: str, small_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsqp.runtime.build.process_limit", limit := FailureLimit())
    run, calls = Worker.run, iter(range(3))

    def lie(worker: Worker, operation: object, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        run(worker, operation, inputs, outputs)  # type: ignore[arg-type]
        if next(calls) == block:
            outputs[0][-1, -1] ^= 1

    with LLM(str(small_llama), worker="inproc", field=field) as llm:
        assert llm._offload is not None
        monkeypatch.setattr(Worker, "run", lie)
        pending = llm._offload.start(Linear(layer_groups(llm.config, 1).down, torch.randn(300, 88)))
        with pytest.raises(IntegrityError, match="group down of layer 1"), pending:
            raise AssertionError("somebody was given the answer")
        assert limit._left == MAX_FAILURES - 1  # one lie, counted once
        with pytest.raises(IntegrityError, match="group down of layer 1"):
            llm._offload.start(Linear(layer_groups(llm.config, 1).down, torch.randn(1, 88)))


@pytest.mark.parametrize("interrupted", [KeyboardInterrupt, MemoryError])
def test_a_call_that_is_interrupted_gives_back_its_memory_and_its_pads_are_gone(
    interrupted: type[BaseException], small_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[np.ndarray] = []
    take, mask = PadPool.take, MaskedGroup.mask

    def noting(pool: PadPool, group: LinearGroup, rows: int) -> Pads:
        pads = take(pool, group, rows)
        taken.append(pads.r_ND.copy())  # they are wiped afterwards
        return pads

    def interrupt(*_: object) -> None:
        raise interrupted

    monkeypatch.setattr(PadPool, "take", noting)
    with LLM(str(small_llama), worker="local", timeout=60) as llm:
        assert isinstance(llm._channels[0], RemoteChannel)
        arena = llm._channels[0]._arena
        assert arena is not None
        monkeypatch.setattr(MaskedGroup, "mask", interrupt)
        for _ in range(5):
            with pytest.raises(interrupted):
                linear(llm, layer_groups(llm.config, 0).qkv, torch.ones(3, 48))
        monkeypatch.setattr(MaskedGroup, "mask", mask)
        assert not arena._used
        linear(llm, layer_groups(llm.config, 0).qkv, torch.ones(3, 48))
    rows = np.concatenate(taken)
    assert len(rows) == len({row.tobytes() for row in rows}) == 18
