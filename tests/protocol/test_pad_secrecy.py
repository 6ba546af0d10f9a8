"""The worker sees only residues in `pad`: uniform ones, and other ones for each request."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pad_answers import linear, tokens
from segment_reader import ENOUGH, Reader
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mask_blocks import to_blocks
from tsqp import LLM
from tsqp.algebra import residue_bytes
from tsqp.algebra.params import FIELDS, LATTICE, Field
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.checkpoint.quantize import quantize_all
from tsqp.gpu.worker import Worker
from tsqp.model.config import layer_groups
from tsqp.model.linear_group import LinearGroup
from tsqp.tee.crypto import pad_providers
from tsqp.tee.crypto.lattice import LatticeProvider
from tsqp.tee.crypto.pads import Pads
from tsqp.tee.offload.lattice_group import LatticeGroup
from tsqp.tee.offload.masked import MaskedGroup
from tsqp.wire.shm import SealedSegment


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
    watched: Watched, small_llama: Path
) -> None:
    with LLM(str(small_llama), worker="inproc") as llm:
        first = tokens(llm, [[1, 2, 3] * 40])
        seen = watched.received
        watched.received = []
        assert tokens(llm, [[1, 2, 3] * 40]) == first
    assert len(seen) == len(watched.received) > 100
    equal = sum(int((a == b).sum()) for a, b in zip(seen, watched.received, strict=True))
    values = sum(a.size for a in seen)
    assert equal <= 3  # of which chance would give values / p
    assert values > 10_000


def test_what_the_worker_sees_is_spread_over_the_whole_field(
    watched: Watched, small_llama: Path
) -> None:
    with LLM(str(small_llama), worker="inproc") as llm:
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
        delta: what these integers are multiplied by.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.descriptor = -1
        self.offsets: set[int] = set()
        self.unit, self.delta = 0.0, 1
        open_segment = SealedSegment.open

        def noting(pid: int, descriptor: int, size: int) -> SealedSegment:
            self.descriptor = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDONLY)
            segment = open_segment(pid, descriptor, size)
            self._start = segment.tensor(0, (1,), torch.uint8).data_ptr()
            return segment

        def noting_place(mask: Callable[..., Any], group: Any, *given: Any) -> Any:
            self.offsets.add(given[2].data_ptr() - self._start)
            masked = mask(group, *given)
            self.unit, self.delta = float(masked.unit_T[-1]), getattr(group, "delta", 1)
            return masked

        monkeypatch.setattr(SealedSegment, "open", noting)
        for kind in (MaskedGroup, LatticeGroup):
            noted = lambda *given, mask=kind.mask: noting_place(mask, *given)  # noqa: E731
            monkeypatch.setattr(kind, "mask", noted)


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
    """A row of equal residues, as it crosses: words, three planes of bytes, or low and high."""
    each = residue.to_bytes(field.residue_bytes, "little")
    if field.residue_bytes == 4:
        return each * WIDTH
    if field.residue_bytes == 6:
        return each[:4] * WIDTH + each[4:] * WIDTH
    return b"".join(bytes([plane]) * WIDTH for plane in each)


def make_masks_of(r: int, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All lattice masks have this residue everywhere, and no noise."""
    with closing(open_checkpoint(str(model))) as checkpoint:
        sums_F = {
            group: weights.weight_FD.long().sum(dim=1).tolist()
            for group, weights in quantize_all(checkpoint)
        }

    def make(_: object, group: LinearGroup, pads: Pads, place: list[int]) -> None:
        r_ND = np.full((len(place), group.width), r)
        u_NF = np.array([[total * r % LATTICE.p for total in sums_F[group]]] * len(place))
        pads.put(place, Pads(to_blocks(r_ND), to_blocks(u_NF)))

    monkeypatch.setattr(LatticeProvider, "make", make)


# In the lattice field, the public polynomials of the wide group take 400 MB and some seconds.
@pytest.mark.parametrize(
    "field", ["wide", "compact", pytest.param("lattice", marks=pytest.mark.slow)]
)
def test_whoever_maps_the_shared_memory_sees_finished_residues_only(
    field: str, broad: Path, exposed: Exposed, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = FIELDS[field].p
    r = {"wide": 0x5A3C1E77, "compact": 0x5A3C1E, "lattice": 0x1B2D5A3C1E77}[field]
    make_masks_of(r, broad, monkeypatch)
    monkeypatch.setattr(pad_providers, "uniform", lambda shape, _: np.full(shape, r, np.int32))
    options = {"worker": "local", "field": field, "dtype": "float32", "prefill_chunk": ROWS}
    x_TD = torch.ones(ROWS, WIDTH)
    with LLM(str(broad), pad_memory=0, timeout=60, **options) as llm:  # type: ignore[arg-type]
        assert llm.transport != "inline"
        expected = linear(llm, layer_groups(llm.config, 0).down, x_TD)
        places, xq = set(exposed.offsets), round(1 / exposed.unit)
        plain = exposed.delta * xq
        content = row_of((plain + r) % p, FIELDS[field]) * ROWS
        # As they cross, and as they are computed with.
        secrets = [row_of(value, FIELDS[field])[:256] for value in (xq, plain, r)]
        itemsize = np.dtype(FIELDS[field].dtype).itemsize
        secrets += [value.to_bytes(itemsize, "little") * 64 for value in (xq, plain, r)]
        with Reader(exposed.descriptor, sorted(places), content, secrets) as reader:
            end, answers = time.monotonic() + 60, 0
            while answers < 100 or not reader.has_looked():
                assert time.monotonic() < end
                answers += 1
                assert torch.equal(linear(llm, layer_groups(llm.config, 0).down, x_TD), expected)
        assert exposed.offsets == places
    assert reader.seen["looks"] >= ENOUGH
    assert (reader.seen["others"], reader.seen["leaks"]) == (0, 0)
