"""Every family gives the logits of transformers, in one pass and through the KV cache."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import (
    FAMILIES,
    MODELS,
    logits_in_chunks,
    random_ids,
    reference_logits,
    write_model,
)

from pairwise import turns
from tsqp import LLM, SamplingParams
from tsqp.algebra.params import FIELDS
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.tee.decoder import Decoder
from tsqp.tee.offload.local import LocalOffload

TOKENS = 60
CHUNKS = {
    "at once": [TOKENS],
    "in chunks": [23, 23, 14],
    "prefill and decode": [37] + [1] * (TOKENS - 37),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Path, Any]]]:
    """Models by name, written when they are first asked for."""

    class Written(dict[str, tuple[Path, Any]]):
        def __missing__(self, name: str) -> tuple[Path, Any]:
            folder = tmp_path_factory.mktemp("model")
            self[name] = (folder, write_model(folder, name))
            return self[name]

    yield Written()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.3
    torch.testing.assert_close(found.float(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_tee_gives_the_logits_of_transformers(
    name: str, written: dict[str, tuple[Path, Any]]
) -> None:
    folder, model = written[name]
    checkpoint = open_checkpoint(str(folder))
    decoder = Decoder(checkpoint, torch.float32)
    offload = LocalOffload(checkpoint, torch.float32)
    ids = random_ids(TOKENS)
    expected = reference_logits(model, ids)
    for chunks in CHUNKS.values():
        close(logits_in_chunks(decoder, offload, ids, chunks), expected)
    checkpoint.close()


SPLITS = {
    "attention tee": {"attention": "tee"},
    "attention gpu": {"attention": "gpu"},
    "fuse layer": {"fuse": "layer"},
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", FAMILIES)
def test_open_gives_the_logits_of_transformers(
    name: str, split: str, written: dict[str, tuple[Path, Any]]
) -> None:
    folder, model = written[name]
    ids = random_ids(TOKENS)
    expected = reference_logits(model, ids)
    options = {"privacy": "open", "worker": "inproc", "dtype": "float32", **SPLITS[split]}
    with LLM(str(folder), **options) as llm:
        assert llm._offload is not None
        for chunks in CHUNKS.values():
            close(
                logits_in_chunks(llm._engine._runner._decoder, llm._offload, ids, chunks), expected
            )


@pytest.mark.parametrize(("name", "field"), turns(FAMILIES, list(FIELDS)))
def test_pad_gives_the_answers_and_the_logits_of_fixed_point(
    name: str, field: str, written: dict[str, tuple[Path, Any]]
) -> None:
    folder, _ = written[name]
    prompts = [random_ids(40), random_ids(3, seed=2)]
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    options = {"field": field, "dtype": "float32", "prefill_chunk": 32}
    found = []
    for mode in (
        {"privacy": "tee", "fixed_point": True},
        {"privacy": "pad", "worker": "inproc", "pad_memory": 0},
    ):
        with LLM(str(folder), **options, **mode) as llm:
            answers = [answer.token_ids for answer in llm.generate(prompts, greedy)]
            assert llm._offload is not None
            ids = [*prompts[0], *answers[0]]
            chunks = [32, 8, *[1] * len(answers[0])]
            found.append(
                (answers, logits_in_chunks(llm._engine._runner._decoder, llm._offload, ids, chunks))
            )
    (expected, expected_logits), (padded, padded_logits) = found
    assert padded == expected
    assert torch.equal(padded_logits, expected_logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_fixed_point_gives_the_logits_of_transformers_with_rounded_weights(
    name: str, written: dict[str, tuple[Path, Any]]
) -> None:
    folder, model = written[name]
    ids = random_ids(TOKENS)
    expected = reference_logits(with_rounded_weights(model), ids)
    with LLM(str(folder), privacy="tee", fixed_point=True, dtype="float32") as llm:
        assert llm._offload is not None
        for chunks in CHUNKS.values():
            found = logits_in_chunks(llm._engine._runner._decoder, llm._offload, ids, chunks)
            # Activations are rounded too.
            torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def with_rounded_weights(model: Any) -> Any:
    """The model with 127 steps to each side in every row of a linear layer; tied ones untied."""
    rounded = copy.deepcopy(model)
    embedding = rounded.get_input_embeddings()
    embedding.weight = torch.nn.Parameter(embedding.weight.clone())
    with torch.no_grad():
        for module in rounded.modules():
            if isinstance(module, torch.nn.Linear):
                step_F1 = module.weight.abs().amax(1, keepdim=True) / 127
                module.weight.copy_((module.weight / step_F1).round() * step_F1)
    return rounded


@pytest.mark.parametrize("name", FAMILIES)
def test_half_width_is_as_exact_as_transformers(
    name: str, written: dict[str, tuple[Path, Any]]
) -> None:
    folder, model = written[name]
    ids = random_ids(TOKENS)
    expected = reference_logits(model, ids)
    half = type(model).from_pretrained(folder, dtype=torch.bfloat16).eval()
    theirs = reference_logits(half, ids).float() - expected
    checkpoint = open_checkpoint(str(folder))
    decoder = Decoder(checkpoint, torch.bfloat16)
    offload = LocalOffload(checkpoint, torch.bfloat16)
    ours = logits_in_chunks(decoder, offload, ids, [TOKENS]) - expected
    assert ours.square().mean() <= 1.5**2 * theirs.square().mean()
    checkpoint.close()


def test_models_differ_where_their_windows_do(written: dict[str, tuple[Path, Any]]) -> None:
    """The prompts of these tests are long enough to see a window."""
    ids = random_ids(TOKENS)
    folder, _ = written["mistral"]
    wide = open_checkpoint(str(folder))
    logits = []
    for changed in (wide.config, _without_windows(wide.config)):
        wide.config = changed
        decoder, offload = Decoder(wide, torch.float32), LocalOffload(wide, torch.float32)
        logits.append(logits_in_chunks(decoder, offload, ids, [TOKENS]))
    assert (logits[0] - logits[1]).abs().max() > 0.1
    wide.close()


def _without_windows(config: Any) -> Any:
    from dataclasses import replace

    layers = tuple(replace(layer, window=None) for layer in config.layers)
    return replace(config, layers=layers)
