"""Answers under a random JSON schema always parse and validate, whatever the model would say."""

import json
from pathlib import Path

import jsonschema
import pytest
from tee_helpers import write_llama

from random_schemas import random_schema
from text_helpers import byte_level
from tsqp import LLM, SamplingParams, StructuredOutputsParams
from tsqp.runtime.generate import generate
from tsqp.tee.engine.engine import Engine
from tsqp.tee.sampling import Completion

BATCH = 20  # schemas at a time
MOST = 1500  # tokens


def params_of(seed: int, engine: Engine) -> SamplingParams:
    """Half of the answers are greedy, which random weights make strange."""
    tokenizer = engine._intake._tokenizer
    assert tokenizer is not None
    texts = [tokenizer.bytes_of(token_id) or b"x" for token_id in range(engine._config.vocab_size)]
    spaces = [token_id for token_id, text in enumerate(texts) if text.isspace()]
    return SamplingParams(
        temperature=1.0 if seed % 2 else 0.0,
        seed=seed,
        max_tokens=MOST,
        # A greedy model would repeat a digit for ever, and fill each gap with whitespace.
        frequency_penalty=2.0,
        logit_bias=dict.fromkeys(spaces, -20.0),
        structured_outputs=StructuredOutputsParams(json=random_schema(seed)),
    )


def check(seed: int, answer: Completion) -> None:
    schema = random_schema(seed)
    assert answer.finish_reason == "stop", seed
    value = json.loads(answer.text)
    formats = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.Draft202012Validator(schema, format_checker=formats).validate(value)


def test_the_schemas_differ_and_are_valid() -> None:
    schemas = [random_schema(seed) for seed in range(200)]
    for schema in schemas:
        jsonschema.Draft202012Validator.check_schema(schema)
    assert len({json.dumps(schema) for schema in schemas}) > 150
    assert sum("object" in json.dumps(schema) for schema in schemas) > 60


@pytest.mark.parametrize("seed", range(8))
def test_answers_validate(seed: int, guided: Engine) -> None:
    [answer] = generate(guided, [[5, 9, seed]], params_of(seed, guided))
    check(seed, answer)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_answers_to_200_schemas_validate_in_pad(tmp_path: Path) -> None:
    backend = byte_level()
    write_llama(
        tmp_path,
        vocab_size=backend.get_vocab_size() + 5,
        eos_token_id=2,
        max_position_embeddings=2048,
        num_hidden_layers=1,
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    with LLM(str(tmp_path), privacy="pad", worker="local", threads=1) as llm:
        engine = llm._engine
        for first in range(0, 200, BATCH):
            seeds = {}
            for seed in range(first, first + BATCH):
                seeds[engine.add([5, 9, seed], params_of(seed, engine))] = seed
            while engine.has_unfinished:
                for output in engine.step():
                    assert output.error is None
                    if output.completion is not None:
                        check(seeds.pop(output.sequence), output.completion)
            assert not seeds
        assert llm.transport != "none"
