"""The limit for keys and values, in every mode in which the TEE keeps them."""

from typing import Any

import pytest

from tsqp import LLM, SamplingParams
from tsqp.errors import OutOfMemory, PromptTooLong, UsageError
from tsqp.nn.kv_cache import KV_BLOCK

MODEL = "random:tiny"
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
PROMPTS = [[n % 90 for n in range(start, start + 100)] for start in (1, 20)]
MODES: dict[str, dict[str, Any]] = {
    "tee": {"privacy": "tee"},
    "open": {"privacy": "open", "worker": "inproc"},
    "pad": {"privacy": "pad", "worker": "inproc", "pad_memory": 0},
    "shares": {
        "privacy": "shares", "worker": ["inproc", "inproc"], "insecure_same_host": True,
    },
}  # fmt: skip


def block_bytes(llm: LLM) -> int:
    config = llm.config
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4 * KV_BLOCK


@pytest.mark.parametrize(
    "mode", [m if m != "shares" else pytest.param(m, marks=pytest.mark.slow) for m in MODES]
)
def test_answers_make_way_for_each_other_and_stay_the_same(mode: str) -> None:
    options = {"dtype": "float32", **MODES[mode]}
    with LLM(MODEL, **options) as llm:
        expected = [answer.token_ids for answer in llm.generate(PROMPTS, GREEDY)]
        assert llm.stats.preemptions == 0
        block = block_bytes(llm)
    with LLM(MODEL, kv_memory=3 * block, **options) as llm:
        assert [answer.token_ids for answer in llm.generate(PROMPTS, GREEDY)] == expected
        assert llm.stats.preemptions > 0
        with pytest.raises(PromptTooLong, match="the memory for keys and values holds 384 tokens"):
            llm.generate([[1] * 384], GREEDY)


def test_a_limit_that_cannot_be_used_is_refused() -> None:
    with pytest.raises(UsageError, match="--kv-memory is 5 bytes, but 128 tokens of this model"):
        LLM(MODEL, privacy="tee", kv_memory=5)
    with pytest.raises(OutOfMemory, match="The KV cache would take"):
        LLM(MODEL, privacy="tee", kv_memory=2**60)
    with pytest.raises(UsageError, match="kv_memory is True; it must be a number of bytes"):
        LLM(MODEL, privacy="tee", kv_memory=True)
    for split in ({"attention": "gpu"}, {"fuse": "layer"}):
        with pytest.raises(UsageError, match="the worker keeps them"):
            LLM(MODEL, privacy="open", worker="inproc", kv_memory=2**20, **split)
