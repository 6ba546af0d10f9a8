"""`pad` computes what `tee --fixed-point` computes, to the last bit; the worker sees residues."""

import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from segment_reader import ENOUGH, Reader
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tsqp import LLM, SamplingParams
from tsqp.algebra import residue_bytes
from tsqp.algebra.params import FIELDS, Field
from tsqp.errors import IntegrityError, NumericalError, TSQPError, UnsupportedModel, WorkerLost
from tsqp.gpu.worker import Worker
from tsqp.model.config import layer_groups, linear_groups
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.crypto import pad_providers
from tsqp.tee.crypto.freivalds import MAX_FAILURES, FailureLimit
from tsqp.tee.crypto.pad_pool import PadPool
from tsqp.tee.crypto.pads import Pads
from tsqp.tee.offload.base import Linear
from tsqp.tee.offload.masked import Masked, MaskedGroup
from tsqp.wire.client import RemoteChannel
from tsqp.wire.shm import SealedSegment

EVERY = pytest.mark.parametrize("field", list(FIELDS))
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
PROMPTS = [[5, 6, 7], list(range(100, 260)), [9]]
FEW_PROMPTS = [[5, 6, 7], list(range(100, 130)), [9]]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with biases and an output projection of its own."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=199,
        hidden_size=48,
        intermediate_size=88,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name else 0.0
            parameter.copy_(centre + 0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def tokens(llm: LLM, prompts: list[list[int]] = PROMPTS) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in llm.generate(prompts, GREEDY)]


def linear(llm: LLM, group: LinearGroup, x_TD: Tensor) -> Tensor:
    """What the offload answers to one request."""
    assert llm._offload is not None
    with llm._offload.start(Linear(group, x_TD)) as y_TF:
        return y_TF.clone()


def every_group(llm: LLM) -> dict[LinearGroup, Tensor]:
    """The answers of all groups to rows that depend on nothing but their width."""
    generator = torch.Generator().manual_seed(5)
    return {
        group: linear(llm, group, torch.randn(3, group.width, generator=generator))
        for group in linear_groups(llm.config)
    }


@pytest.mark.parametrize(
    ("field", "prompts", "budget"),
    [
        ("wide", FEW_PROMPTS, 2**28),
        pytest.param("wide", PROMPTS, None, marks=pytest.mark.slow),
        pytest.param("compact", PROMPTS, None, marks=pytest.mark.slow),
    ],
    ids=["wide-few", "wide", "compact"],
)
def test_groups_and_whole_answers_of_a_real_model_equal_the_fixed_point_reference(
    field: str, prompts: list[list[int]], budget: int | None, demo_path: Path
) -> None:
    with LLM("demo", privacy="tee", fixed_point=True, field=field, dtype="float32") as reference:
        expected, groups = tokens(reference, prompts), every_group(reference)
    options: dict[str, Any] = {
        "privacy": "pad", "field": field, "dtype": "float32", "prefill_chunk": 100
    }  # fmt: skip
    with LLM("demo", worker="inproc", pad_memory=0, **options) as inline:
        assert tokens(inline, prompts) == expected
        found = every_group(inline)
    assert len(groups) == 30 * 4 + 1
    assert all(torch.equal(found[group], y_TF) for group, y_TF in groups.items())
    with LLM("demo", worker="local", pad_memory=budget, timeout=60, **options) as ahead:
        ahead.fill_pads()
        assert tokens(ahead, prompts) == expected
        assert ahead.pads is not None and ahead.pads.ahead_rows > 0


@EVERY
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_group_of_a_model_with_biases_is_bit_equal(
    field: str, dtype: str, small: Path
) -> None:
    options = {"field": field, "dtype": dtype}
    generator = torch.Generator().manual_seed(3)
    with (
        LLM(str(small), privacy="tee", fixed_point=True, **options) as reference,
        LLM(str(small), privacy="pad", worker="inproc", **options) as padded,
    ):
        for group in linear_groups(padded.config):
            for rows in (1, 2, 300):
                x_TD = torch.randn(rows, group.width, generator=generator).to(reference.dtype)
                y_TF = linear(padded, group, x_TD)
                assert y_TF.dtype == reference.dtype
                assert torch.equal(y_TF, linear(reference, group, x_TD))


@EVERY
def test_the_fixed_point_product_is_that_of_float64(field: str, small: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    exact = LlamaForCausalLM.from_pretrained(small, dtype=torch.float64).model.layers[1]
    with LLM(str(small), privacy="tee", fixed_point=True, field=field, dtype="float32") as llm:
        x_TD = torch.randn(50, 48, generator=generator)
        y_TF = linear(llm, layer_groups(llm.config, 1).o, x_TD).double()
        weight_FD = exact.self_attn.o_proj.weight.detach()
        scale_F = weight_FD.abs().amax(1, keepdim=True) / 127
        rounded_FD = (weight_FD / scale_F).round() * scale_F
        expected_TF = x_TD.double() @ rounded_FD.t() + exact.self_attn.o_proj.bias.detach()
        # What is left are 48 activations rounded to steps of 1/a, far below a weight's rounding.
        step = 2.0**-12 if field == "compact" else 2.0**-20
        assert (y_TF - expected_TF).abs().max() < 48 * step


@pytest.mark.parametrize(
    "field", ["wide", "lattice", pytest.param("compact", marks=pytest.mark.slow)]
)
def test_lanes_and_chunks_do_not_change_the_tokens(field: str, small: Path) -> None:
    answers = []
    for lanes, chunk in ((1, 512), (2, 512), (2, 37)):
        options: dict[str, Any] = {"microbatches": lanes, "prefill_chunk": chunk, "timeout": 60}
        with LLM(str(small), worker="local", field=field, pad_memory=2**25, **options) as llm:
            answers.append(tokens(llm, [[n % 199 for n in p] for p in PROMPTS]))
    assert answers[0] == answers[1] == answers[2]


class Watched:
    """Notes what an in-process worker receives."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.received: list[np.ndarray] = []
        run = Worker.run

        def noting(worker: Worker, operation: object, inputs: list[Tensor], outputs: object):  # type: ignore[no-untyped-def]
            residues_TD = np.empty((len(inputs[0]), inputs[0].shape[1] // 4), np.int32)
            residue_bytes.unpack(inputs[0].numpy(), FIELDS["wide"], residues_TD)
            self.received.append(residues_TD)
            return run(worker, operation, inputs, outputs)  # type: ignore[arg-type]

        monkeypatch.setattr(Worker, "run", noting)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    yield Watched(monkeypatch)


def test_the_worker_sees_other_residues_each_time_the_same_prompt_comes(
    watched: Watched, small: Path
) -> None:
    with LLM(str(small), worker="inproc") as llm:
        first = tokens(llm, [[1, 2, 3] * 40])
        seen = watched.received
        watched.received = []
        assert tokens(llm, [[1, 2, 3] * 40]) == first
    assert len(seen) == len(watched.received) > 100
    equal = sum(int((a == b).sum()) for a, b in zip(seen, watched.received, strict=True))
    values = sum(a.size for a in seen)
    assert equal <= 3  # of which chance would give values / p
    assert values > 10_000


def test_what_the_worker_sees_is_spread_over_the_whole_field(watched: Watched, small: Path) -> None:
    with LLM(str(small), worker="inproc") as llm:
        tokens(llm, [[7] * 200])
    seen = np.concatenate([residues.reshape(-1) for residues in watched.received])
    counts = np.bincount(seen.astype(np.int64) * 64 // FIELDS["wide"].p, minlength=64)
    expected = seen.size / 64
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert statistic < 150  # 63 degrees of freedom: more than that once in 10^8 runs


class Exposed:
    """Notes which memory is shared with a worker, and where the inputs of calls lie in it.

    Attributes:
        offsets: of the inputs, in the segment.
        unit: of the last row, the size of one step of its integers.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.descriptor = -1
        self.offsets: set[int] = set()
        self.unit = 0.0
        open_segment, mask = SealedSegment.open, MaskedGroup.mask

        def noting(pid: int, descriptor: int, size: int) -> SealedSegment:
            self.descriptor = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDONLY)
            segment = open_segment(pid, descriptor, size)
            self._start = segment.tensor(0, (1,), torch.uint8).data_ptr()
            return segment

        def noting_place(group: MaskedGroup, x_TD: Tensor, r_TD, c_TB: Tensor, rows) -> Masked:  # type: ignore[no-untyped-def]
            self.offsets.add(c_TB.data_ptr() - self._start)
            masked = mask(group, x_TD, r_TD, c_TB, rows)
            self.unit = float(masked.unit_T[-1])
            return masked

        monkeypatch.setattr(SealedSegment, "open", noting)
        monkeypatch.setattr(MaskedGroup, "mask", noting_place)


@pytest.fixture
def exposed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Exposed]:
    exposed = Exposed(monkeypatch)
    yield exposed
    os.close(exposed.descriptor)


ROWS, WIDTH = 4, 32_768


@pytest.fixture(scope="module")
def broad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a group whose rows are long, so that writing them takes a while."""
    folder = tmp_path_factory.mktemp("broad")
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=199,
        hidden_size=16,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def row_of(residue: int, field: Field) -> bytes:
    """A row of equal residues, as it crosses: words, or three planes of bytes."""
    each = residue.to_bytes(field.residue_bytes, "little")
    if field.residue_bytes == 4:
        return each * WIDTH
    return b"".join(bytes([plane]) * WIDTH for plane in each)


@pytest.mark.parametrize("field", ["wide", "compact"])
def test_whoever_maps_the_shared_memory_sees_finished_residues_only(
    field: str, broad: Path, exposed: Exposed, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, r = FIELDS[field].p, 0x5A3C1E77 if field == "wide" else 0x5A3C1E
    monkeypatch.setattr(pad_providers, "uniform", lambda shape, _: np.full(shape, r, np.int32))
    options = {"worker": "local", "field": field, "dtype": "float32", "prefill_chunk": ROWS}
    x_TD = torch.ones(ROWS, WIDTH)
    with LLM(str(broad), pad_memory=0, timeout=60, **options) as llm:  # type: ignore[arg-type]
        assert llm.transport != "inline"
        expected = linear(llm, layer_groups(llm.config, 0).down, x_TD)
        places, xq = set(exposed.offsets), round(1 / exposed.unit)
        content = row_of((xq + r) % p, FIELDS[field]) * ROWS
        # As they cross, and as they are computed with.
        secrets = [row_of(value, FIELDS[field])[:256] for value in (xq, r)]
        secrets += [value.to_bytes(4, "little") * 64 for value in (xq, r)]
        with Reader(exposed.descriptor, sorted(places), content, secrets) as reader:
            end, answers = time.monotonic() + 60, 0
            while answers < 100 or not reader.has_looked():
                assert time.monotonic() < end
                answers += 1
                assert torch.equal(linear(llm, layer_groups(llm.config, 0).down, x_TD), expected)
        assert exposed.offsets == places
    assert reader.seen["looks"] >= ENOUGH
    assert (reader.seen["others"], reader.seen["leaks"]) == (0, 0)


def test_an_activation_that_is_no_number_ends_the_request_by_its_layer(small: Path) -> None:
    with LLM(str(small), worker="inproc") as llm:
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


def test_weights_that_are_no_numbers_are_refused_by_name(small: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(small)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("inf")
    model.save_pretrained(tmp_path)
    with pytest.raises(TSQPError, match=r"layers\.1\.mlp\.up_proj\.weight .* NaN or infinity"):
        LLM(str(tmp_path), privacy="tee", fixed_point=True)


def test_a_session_ends_with_a_wrong_answer_and_forgets_its_check_vectors(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsqp.runtime.build.process_limit", FailureLimit())
    run = Worker.run

    def lie(worker: Worker, operation: object, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        run(worker, operation, inputs, outputs)  # type: ignore[arg-type]
        outputs[0][0, 0] ^= 1

    before = living_groups()
    with LLM(str(small), worker="inproc", pad_memory=2**20) as llm:
        groups = living_groups() - before  # which hold the vectors
        assert len(groups) == 9
        llm.fill_pads()
        assert llm.pads is not None and llm.pads.stock_bytes > 0
        monkeypatch.setattr(Worker, "run", lie)
        with pytest.raises(IntegrityError, match="wrong product for group qkv of layer 0"):
            tokens(llm, [[1, 2, 3]])
        monkeypatch.setattr(Worker, "run", run)  # honest again, but nobody asks
        with pytest.raises(WorkerLost, match="has ended"):
            tokens(llm, [[1, 2, 3]])
        assert llm.pads is not None and llm.pads.stock_bytes == 0
        assert not groups & living_groups()


def living_groups() -> set[int]:
    """All that nobody has let go of yet."""
    gc.collect()
    return {id(each) for each in gc.get_objects() if type(each) is MaskedGroup}


@EVERY
@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_wrong_row_of_any_block_gives_up_all_of_the_answer(
    block: int, field: str, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsqp.runtime.build.process_limit", limit := FailureLimit())
    run, calls = Worker.run, iter(range(3))

    def lie(worker: Worker, operation: object, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        run(worker, operation, inputs, outputs)  # type: ignore[arg-type]
        if next(calls) == block:
            outputs[0][-1, -1] ^= 1

    with LLM(str(small), worker="inproc", field=field) as llm:
        assert llm._offload is not None
        monkeypatch.setattr(Worker, "run", lie)
        pending = llm._offload.start(Linear(layer_groups(llm.config, 1).down, torch.randn(300, 88)))
        with pytest.raises(IntegrityError, match="group down of layer 1"), pending:
            raise AssertionError("somebody was given the answer")
        assert limit._left == MAX_FAILURES - 1  # one lie, counted once
        with pytest.raises(WorkerLost, match="has ended"):
            llm._offload.start(Linear(layer_groups(llm.config, 1).down, torch.randn(1, 88)))


@pytest.mark.parametrize("interrupted", [KeyboardInterrupt, MemoryError])
def test_a_call_that_is_interrupted_gives_back_its_memory_and_its_pads_are_gone(
    interrupted: type[BaseException], small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[np.ndarray] = []
    take, mask = PadPool.take, MaskedGroup.mask

    def noting(pool: PadPool, group: LinearGroup, rows: int) -> Pads:
        pads = take(pool, group, rows)
        taken.append(pads.r_ND)
        return pads

    def interrupt(*_: object) -> None:
        raise interrupted

    monkeypatch.setattr(PadPool, "take", noting)
    with LLM(str(small), worker="local", timeout=60) as llm:
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
