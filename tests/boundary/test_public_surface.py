"""What `import tsqp` offers: changing it is a decision, not an accident."""

import inspect
import re

import pytest

import tsqp


def test_the_public_names_are_frozen() -> None:
    assert tsqp.__all__ == [
        "LLM",
        "AnswerStream",
        "AsyncLLM",
        "Completion",
        "Conversation",
        "Counters",
        "Options",
        "PadStats",
        "Place",
        "Placement",
        "RequestObserver",
        "RequestStats",
        "SamplingParams",
        "Scores",
        "Stats",
        "StreamOutput",
        "StructuredOutputsParams",
        "TSQPError",
        "TokenLogprobs",
        "Usage",
        "WorkerStatus",
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
        "options",
        "tokenizer",
        "on_load",
        "privacy",
        "worker",
        "worker_key",
        "workers_file",
        "attention",
        "fuse",
        "field",
        "fixed_point",
        "pad_memory",
        "kv_memory",
        "dtype",
        "threads",
        "device",
        "prefill_chunk",
        "timeout",
        "shm",
        "shm_name",
        "insecure",
        "insecure_same_host",
        "microbatches",
        "expect_model",
        "model_key_file",
        "model_key",
        "hints",
        "rpc_log",
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


def test_the_arguments_of_async_llm_are_those_of_llm_and_a_few() -> None:
    own = [
        "model",
        "options",
        "tokenizer",
        "on_load",
        "max_model_len",
        "max_num_seqs",
        "max_num_queued_reqs",
        "share_queue",
        "reconnect_s",
        "observer",
        "worker_view",
    ]
    of_llm = list(inspect.signature(tsqp.LLM).parameters)
    assert list(inspect.signature(tsqp.AsyncLLM).parameters) == own + of_llm[4:]
    public = {name for name in dir(tsqp.AsyncLLM) if not name.startswith("_")}
    assert public == {
        "abort",
        "add",
        "admit",
        "chat_template",
        "close",
        "detokenize",
        "drain",
        "field",
        "has_tokenizer",
        "integrity_failures",
        "is_healthy",
        "kv_usage",
        "max_model_len",
        "model_digest",
        "num_running",
        "num_waiting",
        "pads",
        "placement",
        "reconnects",
        "rpc",
        "special_ids",
        "stats",
        "status",
        "text_bytes",
        "token_bytes",
        "tokenize",
        "tokenize_chat",
        "transport",
        "transport_reason",
        "workers",
    }
    assert list(inspect.signature(tsqp.AsyncLLM.add).parameters) == [
        "self",
        "prompt",
        "params",
        "request_id",
        "tenant",
        "cache_salt",
        "place",
    ]


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
        "structured_outputs",
        "skip_special_tokens",
    ]
    assert list(inspect.signature(tsqp.StructuredOutputsParams).parameters) == [
        "json",
        "regex",
        "choice",
        "grammar",
        "json_object",
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


def test_options_may_be_one_object_and_are_checked_when_it_is_made() -> None:
    with pytest.raises(tsqp.errors.UsageError, match="There is no such privacy mode"):
        tsqp.Options(privacy="none")
    with pytest.raises(tsqp.errors.UsageError, match="as one object, or as keywords"):
        tsqp.LLM("random:tiny", tsqp.Options(privacy="tee"), threads=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'thread'"):
        tsqp.LLM("random:tiny", privacy="tee", thread=1)


@pytest.mark.parametrize("kind", [tsqp.LLM, tsqp.AsyncLLM, tsqp.AnswerStream])
def test_every_type_that_public_calls_return_is_public(kind: type) -> None:
    for name, member in inspect.getmembers(kind):
        call = member.fget if isinstance(member, property) else member
        if name.startswith("_") or not callable(call):
            continue
        for word in re.findall(r"[A-Z]\w+", str(inspect.signature(call).return_annotation)):
            assert word in {*tsqp.__all__, "None", "NoneType"}, (name, word)
