"""Every mode and every transport gives the tokens of transformers, in float32, on a real model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import torch
from protocol_helpers import SHARED, Commands, socket_endpoint
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from pairwise import pairs
from references import reference_model
from tsqp import LLM, SamplingParams
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.nn.attention import Segment
from tsqp.tee.decoder import Batch
from tsqp.tee.engine.interleave import run_interleaved
from tsqp.tee.stats import Stats
from tsqp.tee.text.tokenizer import Tokenizer

Answers = list[tuple[int, ...]]
Reference = Callable[[Sequence[int], int], Answers]

TOKENS, SOME_TOKENS = 64, 10
CLEAR_GAP = 1e-3  # between the two largest logits; below, rounding may decide
LICENSE = (Path(__file__).parents[2] / "LICENSE").read_text()
PLAIN = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "1, 2, 3, 4, 5,",
    LICENSE[5000:9800],
]
CHAT = [
    "What is the capital of France? Answer in one sentence.",
    "Why is the sky blue?",
    "What is 12 times 12?",
    "Summarise this text in one sentence.\n" + LICENSE[1000:5600],
]
LONG_PLAIN, SHORT_CHAT = 3, 5
SHORT = [number for number in range(8) if number not in (3, 7)]
EVERY = list(range(8))
FEW_TOKENS = 8
SMALL_PROMPTS = [[5, 6, 7], list(range(1, 51)), [9], [n % 101 for n in range(400, 100, -1)]]
TRANSPORTS = {
    ("tee", True): "none",
    ("inproc", True): "inproc",
    ("ipc", True): SHARED,
    ("ipc", False): "inline",
    ("tcp", True): SHARED,
    ("tcp", False): "inline",
}


@pytest.fixture(scope="session")
def prompts(demo_path: Path) -> list[list[int]]:
    """Half of them plain and half of them chats; the last of each half has over 900 tokens."""
    tokenizer = Tokenizer("demo")
    chats = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in CHAT]
    ids = [tokenizer.encode(text) for text in PLAIN] + chats
    assert [len(prompt) > 900 for prompt in ids] == ([False] * 3 + [True]) * 2
    return ids


@pytest.fixture(scope="session")
def transformers_model(demo_path: Path) -> Iterator[LlamaForCausalLM]:
    """transformers' model of the demo, in float32.

    Its weights are read by us, which `test_gguf` compares with what transformers reads.
    """
    with closing(open_checkpoint("demo")) as checkpoint:
        yield reference_model(checkpoint, torch.float32)


@pytest.fixture(scope="session")
def reference(transformers_model: LlamaForCausalLM, prompts: list[list[int]]) -> Reference:
    """The greedy tokens of transformers after prompts by number, in which no choice is close."""

    @cache
    def some(numbers: tuple[int, ...], tokens: int) -> Answers:
        return greedy(transformers_model, [prompts[number] for number in numbers], tokens)

    def answers(numbers: Sequence[int], tokens: int) -> Answers:
        chosen: dict[int, tuple[int, ...]] = {}
        for is_long in (False, True):  # apart, as all are padded to the longest
            alike = tuple(n for n in EVERY if (len(prompts[n]) > 900) == is_long)
            if any(number in alike for number in numbers):
                chosen |= dict(zip(alike, some(alike, tokens), strict=True))
        return [chosen[number] for number in numbers]

    return answers


def greedy(model: LlamaForCausalLM, prompts: Sequence[Sequence[int]], tokens: int) -> Answers:
    """The likeliest tokens after each prompt; none may have a close rival."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])[:, None]
    mask = (torch.arange(longest) >= longest - lengths).long()  # padding is on the left
    columns = []
    cache = None
    with torch.inference_mode():
        for _ in range(tokens):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            out = model(
                ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = out.past_key_values
            best = out.logits[:, -1].topk(2)
            assert float((best.values[:, 0] - best.values[:, 1]).min()) > CLEAR_GAP
            ids = best.indices[:, :1]
            columns.append(ids)
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
    return [tuple(row.tolist()) for row in torch.cat(columns, 1)]


def together(llm: LLM, prompts: Sequence[Sequence[int]], tokens: int) -> Answers:
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    return [answer.token_ids for answer in llm.generate(prompts, params)]


@pytest.mark.parametrize(
    ("numbers", "tokens"),
    [(SHORT, SOME_TOKENS), pytest.param(EVERY, TOKENS, marks=pytest.mark.slow)],
    ids=["short", "every"],
)
def test_tee_gives_the_tokens_of_transformers(
    numbers: list[int], tokens: int, prompts: list[list[int]], reference: Reference
) -> None:
    some = [prompts[number] for number in numbers]
    with LLM("demo", privacy="tee", dtype="float32", prefill_chunk=2048) as llm:
        assert llm.transport == "none"
        assert together(llm, some, tokens) == reference(numbers, tokens)


@pytest.mark.slow
def test_tee_in_chunks_and_one_by_one_gives_the_tokens_of_transformers(
    prompts: list[list[int]], reference: Reference
) -> None:
    with LLM("demo", privacy="tee", dtype="float32", prefill_chunk=100) as llm:
        for number in (LONG_PLAIN, SHORT_CHAT):
            assert together(llm, [prompts[number]], TOKENS) == reference([number], TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "shm", "prefill_chunk", "lanes", "alone"),
    [
        ("inproc", True, 100, 2, []),
        ("ipc", True, 2048, 1, []),
        ("ipc", True, 100, 1, [LONG_PLAIN]),
        ("ipc", False, 2048, 2, []),
        ("tcp", True, 2048, 1, []),
        ("tcp", False, 512, 1, [SHORT_CHAT]),
    ],
)
def test_open_gives_the_tokens_of_transformers(
    where: str,
    shm: bool,
    prefill_chunk: int,
    lanes: int,
    alone: list[int],
    prompts: list[list[int]],
    reference: Reference,
    request: pytest.FixtureRequest,
) -> None:
    worker = where if where == "inproc" else request.getfixturevalue(f"demo_{where}")
    with LLM(
        "demo",
        privacy="open",
        worker=worker,
        dtype="float32",
        shm=shm,
        prefill_chunk=prefill_chunk,
        microbatches=lanes,
    ) as llm:
        assert llm.transport == TRANSPORTS[where, shm]
        assert together(llm, prompts, TOKENS) == reference(EVERY, TOKENS)
        for number in alone:
            assert together(llm, [prompts[number]], TOKENS) == reference([number], TOKENS)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Answers]:
    """A small random model without a tokenizer, and what transformers answers to SMALL_PROMPTS."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return folder, greedy(model, SMALL_PROMPTS, FEW_TOKENS)


@pytest.fixture(scope="session")
def small_workers(small: tuple[Path, Answers], shared_commands: Commands) -> dict[str, str]:
    """Endpoints by kind."""
    folder, _ = small
    listen = {"ipc": f"ipc://{shared_commands.folder}/small.sock", "tcp": "tcp://127.0.0.1:0"}
    workers = {kind: shared_commands.worker(folder, listen[kind]) for kind in listen}
    return {kind: socket_endpoint(worker.stderr) for kind, worker in workers.items()}


@pytest.mark.parametrize(
    ("transport", "prefill_chunk", "lanes"), pairs(list(TRANSPORTS), [16, 1000], [1, 2])
)
def test_every_combination_gives_the_tokens_of_transformers(
    transport: tuple[str, bool],
    prefill_chunk: int,
    lanes: int,
    small: tuple[Path, Answers],
    small_workers: dict[str, str],
) -> None:
    folder, expected = small
    where, shm = transport
    with LLM(
        str(folder),
        privacy="tee" if where == "tee" else "open",
        worker=None if where == "tee" else small_workers.get(where, where),
        shm=shm,
        microbatches=lanes,
        prefill_chunk=prefill_chunk,
    ) as llm:
        assert llm.transport == TRANSPORTS[where, shm]
        assert together(llm, SMALL_PROMPTS, FEW_TOKENS) == expected
        for number in (1, 3):
            assert together(llm, [SMALL_PROMPTS[number]], FEW_TOKENS) == [expected[number]]


@pytest.mark.slow
def test_open_in_bfloat16_is_as_exact_as_transformers(
    transformers_model: LlamaForCausalLM, prompts: list[list[int]]
) -> None:
    ids = prompts[LONG_PLAIN][:200] + prompts[SHORT_CHAT]
    exact = reference_logits(transformers_model, ids)
    theirs = reference_logits(deepcopy(transformers_model).to(torch.bfloat16), ids)
    with LLM("demo", privacy="open", worker="local", dtype="bfloat16") as llm:
        assert llm.transport == SHARED
        ours = logits(llm, ids)
    assert rms(theirs - exact) > 0.01
    assert rms(ours - exact) <= 1.5 * rms(theirs - exact)


def reference_logits(model: LlamaForCausalLM, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].float()


def logits(llm: LLM, ids: list[int]) -> Tensor:
    """The logits of every position, [T, V], which only tests ask for."""
    engine, length = llm._engine, len(ids)
    rows = torch.arange(length)
    batch = Batch(torch.tensor(ids), rows, [Segment(0, 0, length)], rows)
    stats = Stats()
    engine._session.offload.kv.alloc(0, length)
    with torch.inference_mode():
        [logits_TV] = run_interleaved(
            engine._session.offload, [engine._runner._decoder.forward(batch, stats)], stats
        )
    engine._session.offload.kv.free(0)
    return logits_TV.float()


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
