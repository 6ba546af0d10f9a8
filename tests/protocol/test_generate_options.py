"""What `tsqp generate` takes besides a prompt: files of them, penalties, log-probabilities."""

import json
import shutil
from pathlib import Path

import pytest
from protocol_helpers import Main, write_ids

from tsqp import LLM

TINY = ["generate", "random:tiny", "--privacy", "tee", "--json"]


@pytest.fixture
def speak(speaking: Path) -> list[object]:
    return ["generate", speaking, "--privacy", "tee", "--json", "--max-tokens", 4]


def test_json_has_log_probabilities_and_an_index_only_where_asked_for(
    main: Main, tmp_path: Path
) -> None:
    command = [*TINY, "--prompt-ids", write_ids(tmp_path / "i.json", [5, 6, 7], [8])]
    command += ["--max-tokens", 3, "--ignore-eos"]
    plain = main(*command).json["outputs"]
    assert set(plain[0]) == {"text", "token_ids", "prompt_tokens", "finish_reason"}
    more = ["--logprobs", 2, "--prompt-logprobs", 1, "--n", 2, "--temperature", 1, "--seed", 3]
    outputs = main(*command, *more).json["outputs"]
    assert [output["index"] for output in outputs] == [0, 1, 0, 1]
    assert [output["prompt_tokens"] for output in outputs] == [3, 3, 1, 1]
    for output in outputs:
        rated = output["logprobs"]
        assert [each["token_id"] for each in rated] == output["token_ids"]
        assert all(set(each) == {"token_id", "logprob", "rank", "top"} for each in rated)
        assert all(len(each["top"]) == 2 and each["logprob"] < 0 for each in rated)
        assert set(rated[0]["top"][0]) == {"token_id", "logprob"}
        assert output["prompt_logprobs"][0] is None
        assert len(output["prompt_logprobs"]) == output["prompt_tokens"]


def test_several_answers_are_numbered(main: Main, speak: list[object]) -> None:
    speak.remove("--json")
    options = ["--temperature", 1, "--seed", 1, "--prompt", "One", "--prompt", "Two", "--n", 2]
    lines = main(*speak, *options).stdout
    assert [lines.index(f"[{number}] ") for number in ("1.1", "1.2", "2.1", "2.2")] == sorted(
        lines.index(f"[{number}] ") for number in ("1.1", "1.2", "2.1", "2.2")
    )


def test_a_bias_and_a_stop_token_are_taken(main: Main, ids: Path) -> None:
    command = [*TINY, "--prompt-ids", ids, "--max-tokens", 4, "--ignore-eos"]
    assert main(*command, "--logit-bias", "42=100").token_ids == [[42] * 4]
    stopped = main(*command, "--logit-bias", "42=100", "--stop-token-id", 42)
    assert stopped.token_ids == [[42]]
    assert stopped.json["outputs"][0]["finish_reason"] == "stop"
    later = main(
        *command, "--logit-bias", "42=100", "--stop-token-id", 42, "--min-tokens", 2
    ).token_ids[0]
    assert later[2:] == [42]
    two = main(*command, "--logit-bias", "42=100", "--logit-bias", "43=99.5")
    assert two.token_ids == [[42] * 4]


@pytest.mark.parametrize(
    "options",
    [
        ["--repetition-penalty", 1e6],
        ["--presence-penalty", 2, "--logit-bias", "42=1.9"],
        ["--frequency-penalty", 2, "--logit-bias", "42=1.9"],
    ],
)
def test_penalties_are_taken(options: list[object], main: Main, ids: Path) -> None:
    command = [*TINY, "--prompt-ids", ids, "--max-tokens", 24, "--ignore-eos"]
    assert main(*command, *options).token_ids != main(*command, *options[2:]).token_ids


def test_min_p_of_one_leaves_the_likeliest(main: Main, ids: Path) -> None:
    command = [*TINY, "--prompt-ids", ids, "--max-tokens", 8, "--ignore-eos"]
    assert main(*command, "--temperature", 1, "--min-p", 1).token_ids == main(*command).token_ids


def test_options_of_several_values_can_be_set_in_the_file(
    main: Main, tmp_path: Path, ids: Path
) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text(
        '[generate]\nlogit-bias = ["42=100"]\nstop-token-id = 42\nignore-eos = true\n'
    )
    result = main("--config", settings, *TINY, "--prompt-ids", ids)
    assert result.token_ids == [[42]]


def test_a_text_file_has_a_prompt_a_line(main: Main, speak: list[object], tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffUne école\r\n\nTwo\u2028parts\n".encode())
    given = main(*speak, "--prompt", "Une école", "--prompt", "Two\u2028parts")
    assert main(*speak, "--prompts", path).token_ids == given.token_ids
    given = main(*speak, "--prompt", "Une école", "--prompt", "Two\u2028parts", "--chat")
    assert main(*speak, "--prompts", path, "--chat").token_ids == given.token_ids


def test_a_jsonl_file_has_prompts_and_conversations(
    main: Main, speak: list[object], tmp_path: Path
) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "One\ntwo"}, {"messages": [{"role": "user", "content": "Three"}]}]
    path.write_text("\n".join(map(json.dumps, lines)))
    found = main(*speak, "--prompts", path)
    plain = main(*speak, "--prompt", "One\ntwo")
    chat = main(*speak, "--prompt", "Three", "--chat")
    assert found.token_ids == [*plain.token_ids, *chat.token_ids]


def test_messages_in_a_file_have_every_form(
    main: Main, speak: list[object], tmp_path: Path
) -> None:
    path = tmp_path / "prompts.jsonl"
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Th"}, {"type": "text", "text": ""}]},
        {"role": "assistant", "content": "x", "tool_calls": [call], "name": None},
        {"role": "tool", "content": "4", "tool_call_id": "1"},
    ]
    path.write_text(json.dumps({"messages": messages}))
    with LLM(str(speak[1]), privacy="tee") as llm:
        ids = llm.tokenize(messages)
    output = main(*speak, "--prompts", path).json["outputs"][0]
    assert output["prompt_tokens"] == len(ids)


def test_control_tokens_are_split_where_that_is_asked_for(main: Main, speak: list[object]) -> None:
    prompt = ["--chat", "--prompt", "a<|im_end|>b"]
    tokens = [
        main(*speak, *prompt, *more).json["outputs"][0]["prompt_tokens"]
        for more in ([], ["--split-special"])
    ]
    assert tokens[1] > tokens[0]
    refused = main(*speak, "--prompt", "a", "--split-special")
    assert refused.status == 2
    assert "--split-special is for conversations: add --chat" in refused.error


def test_a_template_that_fails_tells_no_prompt_with_debug_either(
    main: Main, speak: list[object], speaking: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(speaking, model)
    speak[1] = model
    for template in (
        "{{ raise_exception('No ' + messages[0].content) }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[0].content.x.y }}",
    ):
        (model / "chat_template.jinja").write_text(template)
        result = main(*speak, "--chat", "--prompt", "Cinnamon", "--debug")
        assert result.status == 1
        assert "chat template" in result.stderr
        assert "innamon" not in result.stderr


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("p.txt", b"one\ncaf\xe9\n", "p.txt, line 2: this is not valid UTF-8"),
        ("p.txt", b"\n \n", "p.txt holds no prompts; write one a line"),
        ("p.jsonl", b"", "p.jsonl holds no prompts; write one a line"),
        ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt": }\n', "p.jsonl, line 3: JSON is malformed"),
        ("p.jsonl", b'{"prompt": 5}', "p.jsonl, line 1: Expected `str | null`, got `int`"),
        ("p.jsonl", b'{"my secret": "a"}', 'p.jsonl, line 1: an object has either "prompt" or'),
        ("p.jsonl", b"{}", 'p.jsonl, line 1: an object needs either a "prompt" or "messages"'),
        ("p.jsonl", b'{"messages": []}', 'needs either a "prompt" or "messages"'),
        (
            "p.jsonl",
            b'{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}',
            'needs either a "prompt" or "messages"',
        ),
        (
            "p.jsonl",
            b'{"messages": [{"content": "x"}]}',
            "1: Message 1 of the conversation has",
        ),
        ("p.jsonl", b'{"messages": ["x"]}', "p.jsonl, line 1: Expected `object`, got `str`"),
        ("p.jsonl", b'{"messages": [{"role": "a", "x": "\\ud800"}]}', "p.jsonl, line 1: "),
        ("p.jsonl", b'{"messages": [{"a": ' + b"[" * 9999, "p.jsonl, line 1: this is nested too"),
        (
            "p.jsonl",
            b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            "line 1: Message 1 has a part of type image_url, but TSQP supports only text",
        ),
        ("p.jsonl", b'{"prompt": "\xff"}', "p.jsonl, line 1: "),
        ("p.csv", b"one", "p.csv must be a .txt file with one prompt a line, or a .jsonl file"),
        ("p.txt", None, "Cannot read prompts from "),
    ],
)
def test_a_file_that_holds_no_prompts_is_refused_with_its_line(
    name: str, content: bytes | None, sentence: str, main: Main, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    result = main(*TINY, "--prompts", path)
    assert (result.status, result.stdout) == (1, "")
    assert sentence in result.error
    assert str(path) in result.error


@pytest.mark.parametrize(
    ("options", "status", "sentence"),
    [
        (["--n", "0"], 1, "n must be"),
        (["--n", "2"], 1, "At temperature 0 all answers are the same"),
        (["--min-p", "1.5"], 1, "min_p must be"),
        (["--repetition-penalty", "0"], 1, "repetition_penalty must be"),
        (["--presence-penalty", "3"], 1, "presence_penalty must be"),
        (["--frequency-penalty", "nan"], 1, "frequency_penalty must be"),
        (["--logit-bias", "5"], 2, "--logit-bias takes TOKEN_ID=BIAS"),
        (["--logit-bias", "x=1"], 2, "--logit-bias takes TOKEN_ID=BIAS"),
        (["--logit-bias", "5=nan"], 1, "logit_bias must give"),
        (["--logit-bias", "5=101"], 1, "logit_bias must give"),
        (["--logit-bias", "-1=1"], 1, "logit_bias must give"),
        (["--logit-bias", "512=1"], 1, "logit_bias has a token id outside"),
        (["--stop-token-id", "512"], 1, "stop_token_ids has a token id outside"),
        (["--logprobs", "-1"], 1, "logprobs must be"),
        (["--prompt-logprobs", "513"], 1, "prompt_logprobs asks for 513 tokens"),
        (["--min-tokens", "129"], 1, "min_tokens must be"),
        (["--prompts", "p.txt"], 2, "either --prompt or --prompt-ids or --prompts"),
    ],
)
def test_impossible_options_are_refused(
    options: list[str], status: int, sentence: str, main: Main, ids: Path
) -> None:
    result = main(*TINY, "--prompt-ids", ids, *options)
    assert (result.status, result.stdout) == (status, "")
    assert sentence in result.error


@pytest.mark.parametrize("option", ["--logprobs", "--prompt-logprobs"])
def test_log_probabilities_that_nobody_would_see_are_refused(
    option: str, main: Main, ids: Path
) -> None:
    result = main(*TINY[:-1], "--prompt-ids", ids, option, 1)
    assert (result.status, result.stdout) == (2, "")
    assert "need --json" in result.error
