"""What `import tsqp` offers: changing it is a decision, not an accident."""

import inspect

import pytest

import tsqp


def test_the_public_names_are_frozen() -> None:
    assert tsqp.__all__ == [
        "LLM",
        "Completion",
        "Conversation",
        "SamplingParams",
        "TSQPError",
        "__version__",
        "harden_process",
    ]
    for name in tsqp.__all__:
        assert getattr(tsqp, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'tsqp' has no attribute 'Model'"):
        _ = tsqp.Model


def test_the_arguments_of_llm_are_frozen() -> None:
    assert list(inspect.signature(tsqp.LLM).parameters) == [
        "model",
        "privacy",
        "worker",
        "worker_key",
        "attention",
        "fuse",
        "field",
        "fixed_point",
        "pad_memory",
        "dtype",
        "threads",
        "device",
        "prefill_chunk",
        "timeout",
        "shm",
        "insecure",
        "insecure_same_host",
        "lanes",
        "expect_model",
        "tokenizer",
        "rpc_log",
        "on_load",
    ]
    public = {name for name in dir(tsqp.LLM) if not name.startswith("_")}
    assert public == {
        "chat",
        "close",
        "conversation",
        "fill_pads",
        "generate",
        "model_digest",
        "pads",
        "placement",
        "rpc",
        "score",
        "stats",
        "tokenize",
        "transport",
        "transport_reason",
    }


def test_the_fields_of_parameters_and_completions_are_frozen() -> None:
    assert list(inspect.signature(tsqp.SamplingParams).parameters) == [
        "temperature",
        "top_p",
        "top_k",
        "max_tokens",
        "stop",
        "seed",
        "ignore_eos",
        "n",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "logprobs",
        "prompt_logprobs",
        "stop_token_ids",
        "min_tokens",
    ]
    assert list(inspect.signature(tsqp.Completion).parameters) == [
        "text",
        "token_ids",
        "prompt_tokens",
        "finish_reason",
        "index",
        "logprobs",
        "prompt_logprobs",
    ]
