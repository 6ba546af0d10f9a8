"""Dynamic rotary scaling follows what is known of a sequence, however its tokens are cut."""

from typing import Any

import pytest
import torch
from family_models import random_ids, reference_logits, write_model

from tsqp import LLM, SamplingParams
from tsqp.nn.ops import ATTENTION_BLOCK
from tsqp.runtime.generate import generate

ORIGINAL = 128
PROMPT = random_ids(300)
LONG_CHUNK = 290
assert ATTENTION_BLOCK < LONG_CHUNK < len(PROMPT)  # two lanes share the first chunk
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0, prompt_logprobs=0)

Model = tuple[str, Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("dynamic")
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    options: dict[str, Any] = {"num_hidden_layers": 2, "max_position_embeddings": ORIGINAL}
    return str(folder), write_model(folder, "llama", rope_parameters=rope, **options)


WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunks": {"prefill_chunk": 70},
    "microbatches": {"prefill_chunk": LONG_CHUNK, "microbatches": 2},
    "attention on the worker": {
        "privacy": "open",
        "worker": "inproc",
        "attention": "gpu",
        "prefill_chunk": 70,
    },
    "fused layers": {
        "privacy": "open",
        "worker": "inproc",
        "fuse": "layer",
        "prefill_chunk": 70,
    },
}


def opened(model: Model, **options: Any) -> LLM:
    return LLM(model[0], **({"privacy": "tee", "dtype": "float32"} | options))


@pytest.mark.parametrize("way", WAYS)
def test_a_prompt_and_its_answer_are_rated_as_by_transformers(way: str, model: Model) -> None:
    with opened(model, **WAYS[way]) as llm:
        [answer] = llm.generate([PROMPT], GREEDY)
    assert answer.prompt_logprobs is not None and answer.logprobs is not None
    found = [each.logprob for each in (*answer.prompt_logprobs, *answer.logprobs) if each]
    expected = rated_by_transformers(model[1], PROMPT, list(answer.token_ids))
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-3, rtol=0)


def rated_by_transformers(theirs: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Log-probabilities of all tokens but the first; the answer's in steps of their own."""
    begin_anew(theirs)
    out = theirs(torch.tensor([prompt]), use_cache=True)
    logits = [out.logits[0]]
    for token in answer[:-1]:
        out = theirs(torch.tensor([[token]]), past_key_values=out.past_key_values)
        logits.append(out.logits[0])
    rows = torch.cat(logits).detach().log_softmax(1)
    return rows.gather(1, torch.tensor([*prompt[1:], *answer])[:, None])[:, 0]


def begin_anew(theirs: Any) -> None:
    """transformers rotates for the longest sequence yet, until it sees a short one."""
    theirs(torch.tensor([[0]]))


@pytest.mark.parametrize("way", ["chunks", "fused layers"])
def test_a_text_is_scored_as_by_transformers(way: str, model: Model) -> None:
    with opened(model, **WAYS[way]) as llm:
        found = llm.score(PROMPT).logprobs_T
    begin_anew(model[1])
    rows = reference_logits(model[1], PROMPT)[:-1].double().log_softmax(1)
    expected = rows.gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_pad_in_two_lanes_gives_the_numbers_of_fixed_point(model: Model) -> None:
    found = []
    for options in (
        {"fixed_point": True},
        {"privacy": "pad", "worker": "inproc", "pad_memory": 0, "microbatches": 2},
    ):
        with opened(model, prefill_chunk=LONG_CHUNK, **options) as llm:
            found.append(llm.generate([PROMPT], GREEDY))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("first", "second", "reused"),
    [(80, 100, 80), (80, ORIGINAL, 80), (80, ORIGINAL + 1, 0), (ORIGINAL + 1, 100, 0)],
)
def test_no_keys_are_kept_that_another_length_rotates_otherwise(
    first: int, second: int, reused: int, model: Model
) -> None:
    one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    with opened(model) as llm:
        conversation = llm.conversation()
        for length in (first, second):
            generate(llm._engine, [PROMPT[:length]], one, conversation=conversation)
        assert llm.stats.reused_tokens == reused
