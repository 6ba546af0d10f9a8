"""What a `WorkerView` shows: rows of one request, as they went out, to one tenant, for a while."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tee_helpers import write_llama
from transformers import LlamaForCausalLM

from tsqp import AsyncLLM, SamplingParams
from tsqp.algebra import residue_bytes
from tsqp.algebra.params import FIELDS, WIDE, Field
from tsqp.model.linear_group import LinearGroup
from tsqp.nn.attention import Segment
from tsqp.tee.offload.offload import Linear
from tsqp.tee.worker_view import COLUMNS, KEPT_S, MOST_REQUESTS, ROWS, Sample, WorkerView

LAYER, WIDTH = 1, 8
OUTPUT = LinearGroup(LAYER, "o", 4, WIDTH)


class Watched:
    """A view and its clock, with a call of the layer that is sampled."""

    def __init__(self) -> None:
        self.now = 0.0
        self.view = WorkerView(lambda: self.now)
        self.view.group = OUTPUT

    def step(self, **ids: int) -> None:
        """Begin a step of sequences, given as kv_<id of KV>=<id of sequence>."""
        chunks: Any = [
            SimpleNamespace(sequence=SimpleNamespace(kv_id=int(kv[3:]), id=sequence))
            for kv, sequence in ids.items()
        ]
        self.view.begin_step(chunks)

    def call(
        self,
        segments: Sequence[tuple[int, int]],
        values: Sequence[float],
        group: LinearGroup = OUTPUT,
    ) -> None:
        """Attend to segments, given as (id of KV, length), and send one row for each value."""
        self.view.attended(LAYER, [Segment(kv, 0, length) for kv, length in segments])
        x_TD = torch.tensor(values)[:, None].repeat(1, WIDTH)
        with self.view.sending(Linear(group, x_TD)):
            self.send(x_TD)

    def send(self, x_TD: torch.Tensor, c_TD: Any = None, field: Field = WIDE) -> None:
        c_TD = np.zeros(x_TD.shape, field.dtype) if c_TD is None else c_TD
        c_TB = np.empty((len(x_TD), field.residue_bytes * x_TD.shape[1]), np.uint8)
        residue_bytes.pack(c_TD, field, c_TB)
        self.view.masked(x_TD, torch.from_numpy(c_TB), field)

    def rows(self, tenant: str, request: str) -> list[int]:
        """The first value of each row, relative to the largest one that is shown."""
        sample = self.view.sample(tenant, request)
        return [] if sample is None else sample.plain_RC[:, 0].tolist()


@pytest.fixture
def watched() -> Watched:
    return Watched()


def test_each_request_gets_its_own_rows_of_a_batch(watched: Watched) -> None:
    watched.view.began(4, "a", "one")
    watched.view.began(5, "b", "two")
    watched.step(kv_4=4, kv_9=5)  # the keys and values of an earlier sequence were reused
    watched.call([(4, 2), (9, 1), (6, 1)], [1.0, 1.0, -1.0, 9.0])
    assert watched.rows("a", "one") == [170, 170]
    assert watched.rows("b", "two") == [86]


@pytest.mark.parametrize(
    ("segments", "group"),
    [
        ([(4, 1)], OUTPUT),  # not as many rows as were attended to
        ([(4, 2)], LinearGroup(LAYER, "down", 4, WIDTH)),
        ([(4, 2)], LinearGroup(LAYER + 1, "o", 4, WIDTH)),
        ([(7, 2)], OUTPUT),  # a sequence of nobody
    ],
)
def test_rows_whose_owner_is_not_certain_are_left_out(
    watched: Watched, segments: list[tuple[int, int]], group: LinearGroup
) -> None:
    watched.view.began(4, "a", "one")
    watched.step(kv_4=4)
    watched.call(segments, [1.0, 1.0], group)
    assert watched.rows("a", "one") == []


def test_rows_that_go_out_after_an_answer_are_left_out(watched: Watched) -> None:
    """By then, rows of others may have gone out too."""
    watched.view.began(4, "a", "one")
    watched.step(kv_4=4)
    watched.view.attended(LAYER, [Segment(4, 0, 2)])
    x_TD = torch.ones(2, WIDTH)
    with watched.view.sending(Linear(OUTPUT, x_TD)):
        watched.send(x_TD[:1])
    watched.send(x_TD[1:])
    assert len(watched.rows("a", "one")) == 1


def test_owners_count_for_one_call_only(watched: Watched) -> None:
    watched.view.began(4, "a", "one")
    watched.step(kv_4=4)
    watched.call([(4, 1)], [1.0])
    with watched.view.sending(Linear(OUTPUT, torch.ones(1, WIDTH))):
        watched.send(torch.ones(1, WIDTH))
    assert len(watched.rows("a", "one")) == 1


def test_another_tenant_gets_nothing_even_with_the_same_id(watched: Watched) -> None:
    watched.view.began(4, "a", "one")
    watched.view.began(5, "b", "one")
    watched.step(kv_4=4, kv_5=5)
    watched.call([(4, 1), (5, 1)], [1.0, -1.0])
    assert watched.rows("a", "one") == [170]
    assert watched.rows("b", "one") == [86]
    assert watched.rows("c", "one") == watched.rows("", "one") == []


def test_a_sample_is_forgotten_a_minute_after_its_last_row(watched: Watched) -> None:
    watched.view.began(4, "a", "one")
    watched.step(kv_4=4)
    watched.now = KEPT_S - 1
    watched.call([(4, 1)], [1.0])
    watched.now += KEPT_S - 1
    assert watched.rows("a", "one") == [170]
    watched.now += 1
    assert watched.rows("a", "one") == []
    watched.now = 0
    assert watched.rows("a", "one") == []  # not hidden, but gone


def test_few_requests_and_few_rows_are_kept(watched: Watched) -> None:
    for number in range(MOST_REQUESTS + 1):
        watched.view.began(number, "a", str(number))
    watched.step(**{f"kv_{number}": number for number in range(MOST_REQUESTS + 1)})
    watched.call([(number, 1) for number in range(MOST_REQUESTS + 1)], [1.0] * (MOST_REQUESTS + 1))
    assert watched.rows("a", "0") == []
    assert watched.rows("a", "1") == [170]
    watched.call([(5, ROWS + 3)], [1.0] * (ROWS + 3))
    assert len(watched.rows("a", "5")) == ROWS


def test_a_new_request_with_the_same_id_replaces_the_old_one(watched: Watched) -> None:
    watched.view.began(4, "a", "one")
    watched.step(kv_4=4)
    watched.call([(4, 1)], [1.0])
    watched.view.began(5, "a", "one")
    watched.call([(4, 1)], [1.0])
    assert watched.rows("a", "one") == []


@pytest.mark.parametrize("field", FIELDS.values(), ids=lambda field: field.name)
def test_residues_become_their_upper_byte(watched: Watched, field: Field) -> None:
    residues = [0, 1, field.p // 3, field.p // 2, field.p - 2, field.p - 1]
    watched.view.began(4, "a", "one")
    watched.step(kv_4=4)
    watched.view.attended(LAYER, [Segment(4, 0, 1)])
    x_TD = torch.ones(1, len(residues))
    with watched.view.sending(Linear(OUTPUT, x_TD)):
        watched.send(x_TD, np.array([residues], field.dtype), field)
    sample = watched.view.sample("a", "one")
    assert sample is not None
    assert sample.masked_RC[0].tolist() == [256 * each // field.p for each in residues]


PROMPTS = [[1, 5, 9, 5, 5, 60], list(range(2, 98))]
ANSWER = 5


SHARES = {"privacy": "shares", "worker": ["inproc", "inproc"], "insecure_same_host": True}


@pytest.mark.parametrize("options", [{"field": "compact"}, {"field": "lattice"}, SHARES])
def test_requests_that_run_together_show_what_transformers_computes(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """Of each request alone, although both are in one batch; and what went out looks random."""
    reference = write_llama(tmp_path)
    view = WorkerView()
    llm = AsyncLLM(
        str(tmp_path), worker_view=view, **{"privacy": "pad", "worker": "inproc", **options},
        threads=1, pad_memory=2**20,
    )  # fmt: skip

    async def answers() -> list[list[int]]:
        async with llm:
            params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
            streams = [
                llm.add(prompt, params, request_id=str(number), tenant=f"tenant {number}")
                for number, prompt in enumerate(PROMPTS)
            ]
            completions = [(await stream.completions())[0] for stream in streams]
        return [list(each.token_ids) for each in completions]

    found = asyncio.run(asyncio.wait_for(answers(), 60))
    shown = []
    for number, (prompt, answer) in enumerate(zip(PROMPTS, found, strict=True)):
        sample = view.sample(f"tenant {number}", str(number))
        assert sample is not None
        assert view.sample(f"tenant {1 - number}", str(number)) is None
        expected_RC = _inputs_of_output_projection(reference, prompt + answer[:-1])
        _is_about(sample, expected_RC[-ROWS:, :COLUMNS])
        shown.append(sample.masked_RC.reshape(-1))
    _looks_uniform(np.concatenate(shown))


def _inputs_of_output_projection(model: LlamaForCausalLM, ids: Sequence[int]) -> np.ndarray:
    kept: list[torch.Tensor] = []
    layer = model.model.layers[(model.config.num_hidden_layers - 1) // 2].self_attn.o_proj
    hook = layer.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0][0]))
    with torch.inference_mode():
        model(torch.tensor([ids]))
    hook.remove()
    found: np.ndarray = kept[0].numpy()
    return found


def _is_about(sample: Sample, expected_RC: np.ndarray) -> None:
    assert sample.plain_RC.shape == sample.masked_RC.shape == expected_RC.shape
    unit = 3 * np.sqrt(np.mean(expected_RC.astype(np.float64) ** 2))
    shown_RC = (sample.plain_RC.astype(float) - 128) / 127
    error_RC = np.abs(shown_RC - np.clip(expected_RC / unit, -1, 1))
    assert error_RC.mean() < 0.02  # the integers of the private modes round


def _looks_uniform(values: np.ndarray) -> None:
    """By chi-square over 16 classes: above 60 once in 10^6 tries for uniform values."""
    counts = np.bincount(values >> 4, minlength=16)
    mean = len(values) / 16
    assert mean > 100
    assert ((counts - mean) ** 2 / mean).sum() < 60
