"""The forward pass agrees with transformers on every option of the family."""

from pathlib import Path

import pytest
import torch
from tee_helpers import all_logits, write_llama
from torch import Tensor
from transformers import LlamaForCausalLM

from references import reference_model
from tsqp.checkpoint.checkpoint import Checkpoint, open_checkpoint
from tsqp.errors import WorkerError
from tsqp.model.config import output_projection
from tsqp.model.linear_group import LinearGroup
from tsqp.nn.attention import Segment
from tsqp.tee.decoder import Batch, Decoder
from tsqp.tee.engine.interleave import run_interleaved
from tsqp.tee.offload.local import LocalOffload, Ready
from tsqp.tee.offload.offload import Linear, Pending, Request
from tsqp.tee.stats import Stats

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
OPTIONS: dict[str, dict[str, object]] = {
    "grouped queries, tied": {},
    "untied": {"tie_word_embeddings": False},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "wide heads": {"head_dim": 20},
    "narrow heads": {"head_dim": 4},
    "one kv head": {"num_key_value_heads": 1},
    "as many kv heads": {"num_key_value_heads": 6},
    "llama3 rope": {"rope_parameters": LLAMA3},
    "large eps": {"rms_norm_eps": 0.1},
}
TOKENS = 300  # more than one attention block


def reference_logits(model: LlamaForCausalLM, token_ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0].float()


def random_ids(count: int, vocabulary: int) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, vocabulary, (count,), generator=generator).tolist()


@pytest.mark.parametrize("option", OPTIONS)
def test_logits_are_those_of_transformers(option: str, tmp_path: Path) -> None:
    model = write_llama(tmp_path, **OPTIONS[option])
    checkpoint = open_checkpoint(str(tmp_path))
    decoder = Decoder(checkpoint, torch.float32)
    offload = LocalOffload(checkpoint, torch.float32)
    ids = random_ids(TOKENS, checkpoint.config.vocab_size)
    expected = reference_logits(model, ids)
    assert expected.std() > 0.3
    for chunk in (TOKENS, 128, 37):
        torch.testing.assert_close(
            all_logits(decoder, offload, ids, chunk), expected, atol=1e-4, rtol=0
        )
    torch.testing.assert_close(
        all_logits(decoder, offload, ids[:40], 1), expected[:40], atol=1e-4, rtol=0
    )
    checkpoint.close()


def test_only_the_wanted_rows_are_returned(
    tiny: tuple[Checkpoint, LlamaForCausalLM],
) -> None:
    checkpoint, model = tiny
    ids = random_ids(20, 101)
    offload = LocalOffload(checkpoint, torch.float32)
    offload.kv.alloc(3, 20)
    rows = torch.tensor([4, 19])
    batch = Batch(torch.tensor(ids), torch.arange(20), [Segment(3, 0, 20)], rows)
    stats = Stats()
    lane = Decoder(checkpoint, torch.float32).forward(batch, stats)
    [logits] = run_interleaved(offload, [lane], stats)
    torch.testing.assert_close(logits, reference_logits(model, ids)[rows], atol=1e-4, rtol=0)


def test_a_batch_without_wanted_rows_asks_for_no_lm_head(
    tiny: tuple[Checkpoint, LlamaForCausalLM],
) -> None:
    checkpoint, _ = tiny
    offload = Recording(checkpoint)
    offload.kv.alloc(0, 4)
    nothing = torch.empty(0, dtype=torch.int64)
    batch = Batch(torch.tensor([1, 2, 3]), torch.arange(3), [Segment(0, 0, 3)], nothing)
    stats = Stats()
    [logits] = run_interleaved(
        offload, [Decoder(checkpoint, torch.float32).forward(batch, stats)], stats
    )
    assert logits.shape == (0, 101)
    assert len(offload.linear) > 0
    assert output_projection(checkpoint.config) not in offload.linear


class Recording(LocalOffload):
    """Remembers which linear groups were asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint, torch.float32)
        self.linear: list[LinearGroup] = []

    def start(self, request: Request) -> Ready:
        if isinstance(request, Linear):
            self.linear.append(request.group)
        return super().start(request)


class Reused(LocalOffload):
    """Answers in memory that the next request overwrites, as shared memory would."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint, torch.float32)
        self._last = torch.empty(0)

    def start(self, request: Request) -> Ready:
        with super().start(request) as answer:
            copy = answer.clone()
        self._last.fill_(torch.nan)
        self._last = copy
        return Ready(copy)


def test_an_answer_is_not_used_after_the_next_request(
    tiny: tuple[Checkpoint, LlamaForCausalLM],
) -> None:
    checkpoint, model = tiny
    ids = random_ids(33, 101)
    logits = all_logits(Decoder(checkpoint, torch.float32), Reused(checkpoint), ids, 11)
    torch.testing.assert_close(logits, reference_logits(model, ids), atol=1e-4, rtol=0)


class Broken(LocalOffload):
    """Spoils one number of the output projection."""

    value = torch.nan

    def start(self, request: Request) -> Ready:
        pending: Pending = super().start(request)
        with pending as answer:
            if isinstance(request, Linear) and request.group.layer is None:
                answer[0, 5] = self.value
        return Ready(answer)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_are_refused(
    value: float, tiny: tuple[Checkpoint, LlamaForCausalLM]
) -> None:
    checkpoint, _ = tiny
    offload = Broken(checkpoint, torch.float32)
    offload.value = value
    with pytest.raises(WorkerError, match="lm_head output of this step is not finite"):
        all_logits(Decoder(checkpoint, torch.float32), offload, [1, 2, 3], 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_width_errors_are_at_most_one_and_a_half_of_transformers(
    dtype: torch.dtype, tiny: tuple[Checkpoint, LlamaForCausalLM]
) -> None:
    checkpoint, _ = tiny
    ids = random_ids(200, 101)
    exact = reference_logits(reference_model(checkpoint, torch.float32), ids)
    theirs = reference_logits(reference_model(checkpoint, dtype), ids)
    ours = all_logits(Decoder(checkpoint, dtype), LocalOffload(checkpoint, dtype), ids, 64)
    assert rms(theirs - exact) > 1e-4
    assert rms(ours - exact) <= 1.5 * rms(theirs - exact)


@pytest.mark.slow
def test_bfloat16_on_the_real_model_is_as_exact_as_transformers(smollm: Checkpoint) -> None:
    ids = random_ids(64, 49_000)
    dtype = torch.bfloat16
    exact = reference_logits(reference_model(smollm, torch.float32), ids)
    theirs = reference_logits(reference_model(smollm, dtype), ids)
    ours = all_logits(Decoder(smollm, dtype), LocalOffload(smollm, dtype), ids, 64)
    assert rms(ours - exact) <= 1.5 * rms(theirs - exact)


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
