"""What each endpoint answers, and that a stream says the same as a whole answer."""

import pytest
from serve_client import Server
from serve_models import CONTEXT

import tsqp

GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}


def test_models_version_and_status_tell_of_the_server(server: Server) -> None:
    models = server.ask("/v1/models").json
    assert [each["id"] for each in models["data"]] == ["tiny", "alias"]
    assert models["data"][0]["max_model_len"] == CONTEXT
    assert server.ask("/version").json == {"version": tsqp.__version__}
    status = server.ask("/v1/tsqp/status").json
    assert (status["status"], status["privacy"], status["transport"]) == ("ready", "tee", "none")
    assert status["model_digest"].startswith("sha256:")


def test_tokens_and_texts_go_there_and_back(server: Server) -> None:
    found = server.ask("/tokenize", {"prompt": "Zoë", "return_token_strs": True}).json
    assert found["count"] == len(found["tokens"]) == 4
    assert server.ask("/detokenize", {"tokens": found["tokens"]}).json == {"prompt": "Zoë"}
    chat = server.ask("/tokenize", {"messages": [{"role": "user", "content": "a"}]}).json
    text = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert chat["tokens"] == server.ask("/tokenize", {"prompt": text}).json["tokens"]
    assert server.ask("/tokenize", {}).status == 400


def test_a_chat_is_the_completion_of_its_template(server: Server) -> None:
    text = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    chat = server.chat(**GREEDY, cache_salt="of this test").json
    assert chat["object"] == "chat.completion"
    assert chat["model"] == "tiny"
    [choice] = chat["choices"]
    [other] = server.complete(text, **GREEDY).json["choices"]
    assert choice["message"] == {"role": "assistant", "content": other["text"], "refusal": None}
    assert choice["finish_reason"] == "length"
    tokens = server.ask("/tokenize", {"prompt": text}).json["count"]
    assert chat["usage"] == {
        "prompt_tokens": tokens,
        "completion_tokens": 6,
        "total_tokens": tokens + 6,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_content_may_be_parts_and_the_template_has_values_of_the_request(server: Server) -> None:
    def tokens(**fields: object) -> list[int]:
        found: list[int] = server.ask("/tokenize", fields).json["tokens"]
        return found

    parts = [{"type": "text", "text": "Hello"}]
    plain = tokens(messages=[{"role": "user", "content": "Hello"}])
    assert tokens(messages=[{"role": "user", "content": parts}]) == plain
    shouted = tokens(
        messages=[{"role": "user", "content": "Hello"}], chat_template_kwargs={"shout": True}
    )
    assert len(shouted) == len(plain) + len("YES ")
    continued = tokens(
        messages=[{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "It is"}],
        continue_final_message=True,
    )
    assert continued == plain + tokens(prompt="It is")


@pytest.mark.parametrize("path", ["chat", "completions"])
def test_a_stream_adds_up_to_the_answer(server: Server, path: str) -> None:
    wanted = {"seed": 3, "n": 2, "max_tokens": 9, "logprobs": True, "ignore_eos": True}
    if path == "chat":
        ask = lambda **more: server.chat(**wanted, top_logprobs=2, **more)  # noqa: E731
    else:
        ask = lambda **more: server.complete(["ab", "c"], **{**wanted, "logprobs": 2}, **more)  # noqa: E731
    whole = ask().json
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = ask(stream=True, stream_options=options).events
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole["usage"]
    assert all("usage" in event for event in events)
    for choice in whole["choices"]:
        mine = [e for event in events for e in event["choices"] if e["index"] == choice["index"]]
        reasons = [each["finish_reason"] for each in mine]
        assert reasons == [None] * (len(mine) - 1) + ["length"]
        if path == "chat":
            assert mine[0]["delta"] == {"role": "assistant", "content": ""}
            text = "".join(each["delta"].get("content", "") for each in mine)
            assert text == choice["message"]["content"]
            rated = [t for each in mine if each["logprobs"] for t in each["logprobs"]["content"]]
            assert rated == choice["logprobs"]["content"]
            assert len(rated) == 9
        else:
            assert "".join(each["text"] for each in mine) == choice["text"]
            for name in ("tokens", "token_logprobs", "text_offset"):
                joined = [t for each in mine if each["logprobs"] for t in each["logprobs"][name]]
                assert joined == choice["logprobs"][name]
    ids = {event["id"] for event in events}
    assert len(ids) == 1


def test_without_usage_asked_for_a_stream_has_none(server: Server) -> None:
    events = server.chat(stream=True).events
    assert not [event for event in events if "usage" in event]


def test_an_echo_has_the_probabilities_of_the_prompt_as_lm_eval_reads_them(server: Server) -> None:
    ids = server.ask("/tokenize", {"prompt": "Hello"}).json["tokens"]
    asked = {"echo": True, "logprobs": 1, "temperature": 0, "max_tokens": 1}
    [choice] = server.complete(ids, **asked).json["choices"]
    logprobs = choice["logprobs"]
    assert choice["text"].startswith("Hello")
    assert len(logprobs["tokens"]) == len(ids) + 1
    assert "".join(logprobs["tokens"][: len(ids)]) == "Hello"
    assert logprobs["token_logprobs"][0] is None
    assert all(each < 0 for each in logprobs["token_logprobs"][1:])
    assert all(len(each) in (1, 2) for each in logprobs["top_logprobs"][1:])  # best and chosen
    [none] = server.complete(ids, **{**asked, "max_tokens": 0}).json["choices"]
    assert none["text"] == "Hello"
    assert none["logprobs"]["token_logprobs"] == logprobs["token_logprobs"][:-1]


def test_every_prompt_of_a_batch_has_its_n_answers_in_order(server: Server) -> None:
    prompts = [[1, 2, 3], [4, 5]]
    batch = server.complete(prompts, n=2, seed=5, max_tokens=3).json
    assert [each["index"] for each in batch["choices"]] == [0, 1, 2, 3]
    apart = [server.complete(each, n=2, seed=5, max_tokens=3).json["choices"] for each in prompts]
    assert [c["text"] for c in batch["choices"]] == [c["text"] for cs in apart for c in cs]
    assert batch["usage"]["prompt_tokens"] == 5


def test_sampling_fields_reach_the_sampler(server: Server) -> None:
    [forced] = server.complete("a", logit_bias={"5": 100}, temperature=0).json["choices"]
    five = server.ask("/detokenize", {"tokens": [5]}).json["prompt"]
    assert forced["text"] == 4 * five
    [stopped] = server.complete(
        "a", logit_bias={"5": 100}, stop_token_ids=[5], temperature=0, return_token_ids=True
    ).json["choices"]
    assert (stopped["finish_reason"], stopped["token_ids"]) == ("stop", [5])
    [cut] = server.complete("a", logit_bias={"5": 100}, stop=2 * five, temperature=0).json[
        "choices"
    ]
    assert (cut["finish_reason"], cut["text"]) == ("stop", "")
    same = [server.chat(seed=4, top_k=9, min_p=0.01, top_p=0.9).json["choices"] for _ in range(2)]
    assert same[0] == same[1]
    longest = server.chat(max_completion_tokens=2, ignore_eos=True).json
    assert longest["usage"]["completion_tokens"] == 2


def test_fields_that_nobody_knows_are_ignored_and_null_means_left_out(server: Server) -> None:
    assert server.chat(store=True, metadata={"a": 1}, temperature=None, stop=None).status == 200
    assert server.chat(tools=[], response_format={"type": "text"}).status == 200


def test_a_request_id_is_echoed_or_made(server: Server) -> None:
    assert server.ask("/version", headers={"X-Request-Id": "mine-7"}).headers["x-request-id"] == (
        "mine-7"
    )
    made = server.ask("/version", headers={"X-Request-Id": "no spaces"}).headers["x-request-id"]
    assert len(made) == 32
    assert "id=mine-7" in server.log()


def test_metrics_have_the_names_of_vllm(server: Server) -> None:
    before = server.metrics()
    server.complete([1, 2, 3], max_tokens=5, ignore_eos=True)
    after = server.metrics()
    for name, more in {
        "tsqp_prompt_tokens_total": 3,
        "tsqp_generation_tokens_total": 5,
        'tsqp_request_success_total{finished_reason="length"}': 1,
        "tsqp_time_to_first_token_seconds_count": 1,
        "tsqp_inter_token_latency_seconds_count": 4,
        "tsqp_e2e_request_latency_seconds_count": 1,
        "tsqp_request_queue_time_seconds_count": 1,
        "tsqp_request_prefill_time_seconds_count": 1,
        "tsqp_request_decode_time_seconds_count": 1,
        "tsqp_prefix_cache_queries_total": 3,
        "tsqp_prefix_cache_hits_total": 0,
    }.items():
        assert after[name] - before[name] == more, name
    assert after["tsqp_num_requests_running"] == after["tsqp_num_requests_waiting"] == 0
    assert after["tsqp_integrity_failed"] == 0


def test_tokens_that_are_parts_of_a_character_are_named_by_their_bytes(server: Server) -> None:
    fields = {"echo": True, "logprobs": 5, "max_tokens": 1}
    [choice] = server.complete("€", **fields).json["choices"]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"][:3] == ["bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]
    assert {len(best) for best in logprobs["top_logprobs"][1:]} <= {5, 6}  # with the chosen one


def test_offsets_count_the_characters_of_the_text_and_the_chosen_token_is_among_the_best(
    server: Server,
) -> None:
    text = "é漢字😀 hi"
    fields = {"echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 2, "seed": 5}
    [choice] = server.complete(text, **fields).json["choices"]
    logprobs = choice["logprobs"]
    lengths = [len(character.encode()) for character in text]
    ends = [sum(lengths[: n + 1]) for n in range(len(lengths))]
    expected = [sum(end <= at for end in ends) for at in range(len(text.encode()))]
    assert logprobs["text_offset"][: len(expected)] == expected
    assert logprobs["text_offset"][-1] == len(text)
    for token, best in zip(logprobs["tokens"][1:], logprobs["top_logprobs"][1:], strict=True):
        assert token in best


def test_the_smallest_top_p_leaves_the_likeliest_token(server: Server) -> None:
    greedy = server.complete([1, 2, 3], temperature=0).json["choices"][0]["text"]
    fields = {"top_p": 5e-324, "top_k": 10, "temperature": 2}
    assert server.complete([1, 2, 3], **fields).json["choices"][0]["text"] == greedy
