"""What the command line prints, and where; with a real model in real processes."""

import json
import re
import signal
from itertools import pairwise
from pathlib import Path

import pytest
from protocol_helpers import (
    SHARED,
    START_S,
    Commands,
    Main,
    Result,
    Running,
    eventually,
    write_ids,
)

from tsqp.cli.console import say

QUESTION = "What is the capital of France? Answer in one sentence."
ANSWER = "The capital of France is Paris."
OTHER_QUESTION, OTHER_ANSWER = "What is 12 times 12?", "12 times 12 is equal to 120."
TINY = ["generate", "random:tiny", "--privacy", "tee"]


def asking(endpoint: str, *questions: str) -> list[str]:
    command = ["generate", "demo", "--privacy", "open", "--worker", endpoint, "--chat"]
    return command + [part for question in questions for part in ("--prompt", question)]


@pytest.fixture(scope="module")
def answer(demo_ipc: str, shared_commands: Commands) -> Result:
    """One question to the real model, through a worker process."""
    result = shared_commands.run(*asking(demo_ipc, QUESTION), "--json")
    assert result.status == 0, result.stderr
    return result


def test_the_real_model_knows_the_capital_of_france(answer: Result) -> None:
    [output] = answer.json["outputs"]
    assert output["text"] == ANSWER
    assert output["finish_reason"] == "stop"
    assert output["prompt_tokens"] == 42
    assert len(output["token_ids"]) == 8


def test_json_is_the_only_line_of_standard_output(answer: Result) -> None:
    assert answer.stdout.count("\n") == 1
    assert answer.stdout.endswith("}\n")


def test_json_has_every_field(answer: Result) -> None:
    result = answer.json
    assert set(result) == {
        "outputs", "privacy", "transport", "transport_reason", "timings", "operations", "pads",
        "placement", "rpc", "model_digest",
    }  # fmt: skip
    assert result["privacy"] == "open"
    assert result["transport"] == SHARED
    assert re.fullmatch(r"\d+ bytes of sealed memory", result["transport_reason"])
    assert set(result["outputs"][0]) == {"text", "token_ids", "prompt_tokens", "finish_reason"}
    timings = result["timings"]
    assert set(timings) == {"prefill_s", "decode_s", "tee_s", "wait_s", "tee_cpu_s"}
    assert all(isinstance(value, float) and value > 0 for value in timings.values())
    assert timings["tee_s"] + timings["wait_s"] == pytest.approx(
        timings["prefill_s"] + timings["decode_s"]
    )
    assert result["operations"]["attention"]["calls"] == 8 * 30
    assert all(each["seconds"] > 0 for each in result["operations"].values())


def test_json_counts_what_crossed(answer: Result) -> None:
    rpc = answer.json["rpc"]
    rows = 42 + 7  # the prompt, and every new token but the last
    assert rpc["calls"] == 8 * (1 + 30 * 4 + 1)  # embedding, four groups a layer, output
    assert rpc["calls"] == sum(rpc["calls_by_kind"].values())
    # After the last attention, the rows of the prompt that choose no token are left out.
    qkv, others = 576, 2 * 576 + 1536
    numbers = [30 * rows * qkv, 29 * rows * others, 8 * others, 8 * 576]
    assert rpc["sent_bytes"] == 8 * rows + 4 * sum(numbers)
    qkv, others = 576 + 2 * 192, 2 * 576 + 2 * 1536
    numbers = [rows * 576, 30 * rows * qkv, 29 * rows * others, 8 * others, 8 * 49152]
    assert rpc["received_bytes"] == 4 * sum(numbers)
    assert set(rpc["worker_s"]) == set(rpc["calls_by_kind"])


def test_over_shared_memory_little_goes_through_the_socket(answer: Result) -> None:
    rpc = answer.json["rpc"]
    assert 0 < rpc["socket_bytes"] < 1000 * rpc["calls"]
    assert rpc["socket_bytes"] < rpc["sent_bytes"] / 10


def test_no_prompt_answer_or_token_id_is_logged(answer: Result, demo_worker: Running) -> None:
    ids = answer.token_ids[0]
    for log in (answer.stderr, demo_worker.stderr):
        assert len(log) > 100
        assert "France" not in log
        assert "Paris" not in log
        for first, second in pairwise(ids):
            assert f"{first}, {second}" not in log
            assert f"{first} {second}" not in log


def test_open_says_that_the_worker_reads_everything(answer: Result) -> None:
    assert "privacy open: the worker reads every prompt and every answer" in answer.stderr


def test_the_statistics_name_the_side_of_each_operation(answer: Result) -> None:
    sides = dict(line.split()[:2] for line in answer.stderr.splitlines() if len(line.split()) == 4)
    expected = {"embedding": "worker", "linear": "worker", "attention": "TEE", "norm": "TEE"}
    assert expected.items() <= sides.items()


@pytest.mark.slow
def test_two_clients_of_one_worker_get_their_own_answers(commands: Commands, demo_ipc: str) -> None:
    running = [
        commands.start(*asking(demo_ipc, OTHER_QUESTION), "--json"),
        commands.start(*asking(demo_ipc, QUESTION, OTHER_QUESTION)),
    ]
    one, two = [each.ends(START_S) for each in running]
    assert one.json["outputs"][0]["text"] == OTHER_ANSWER
    assert two.stdout == f"[1] {ANSWER}\n[2] {OTHER_ANSWER}\n"


@pytest.mark.slow
def test_a_stop_string_ends_the_answer_before_it(main: Main, demo_ipc: str) -> None:
    result = main(*asking(demo_ipc, QUESTION), "--json", "--stop", "never", "--stop", "Par")
    [output] = result.json["outputs"]
    assert output["text"] == "The capital of France is "
    assert output["finish_reason"] == "stop"


@pytest.mark.slow
def test_tee_goes_on_with_a_plain_prompt_without_a_worker(
    commands: Commands, demo_path: Path
) -> None:
    command = ["generate", "demo", "--privacy", "tee", "--prompt", "1, 2, 3, 4, 5,", "--json"]
    result = commands.run(*command, "--max-tokens", 6).json
    [output] = result["outputs"]
    assert output["text"] == " 6, 7,"
    assert output["finish_reason"] == "length"
    assert len(output["token_ids"]) == 6
    assert (result["privacy"], result["transport"]) == ("tee", "none")
    assert result["rpc"]["calls"] == 0


@pytest.mark.slow
def test_without_ignore_eos_an_answer_ends_earlier(
    main: Main, demo_ipc: str, answer: Result
) -> None:
    short = answer.token_ids[0]
    long = main(*asking(demo_ipc, QUESTION), "--json", "--max-tokens", 12, "--ignore-eos")
    assert len(short) == 8
    assert len(long.token_ids[0]) == 12
    assert long.token_ids[0][:8] == short
    assert long.json["outputs"][0]["finish_reason"] == "length"


def test_an_answer_streams_to_standard_output(
    commands: Commands, main: Main, speaking: Path
) -> None:
    command = ["generate", speaking, "--privacy", "tee", "--prompt", "Once", "--ignore-eos"]
    running = commands.start(*command, "--max-tokens", 200).answers()
    assert running.is_alive
    streamed = running.ends(START_S)
    assert streamed.status == 0
    at_once = main(*command, "--max-tokens", 200, "--json")
    assert streamed.stdout == at_once.json["outputs"][0]["text"] + "\n"


def test_a_prompt_may_come_from_standard_input(
    commands: Commands, main: Main, speaking: Path
) -> None:
    text = "Une phrase accentuée\nen deux lignes"
    path = commands.folder / "prompt.txt"
    path.write_text(text, encoding="utf-8")
    command = ["generate", speaking, "--privacy", "tee", "--json", "--max-tokens", "8", "--prompt"]
    piped = commands.run(*command, "-", stdin=path)
    given = main(*command, text)
    assert piped.token_ids == given.token_ids
    assert piped.json["outputs"][0]["prompt_tokens"] > 8


def test_a_seed_makes_an_answer_repeatable(main: Main, tiny_worker: str, ids: Path) -> None:
    options = ["--prompt-ids", ids, "--json", "--temperature", 1, "--max-tokens", 16]
    first = main(*TINY, *options, "--seed", 1).token_ids
    assert main(*TINY, *options, "--seed", 1).token_ids == first
    assert main(*TINY, *options, "--seed", 2).token_ids != first
    assert main(*TINY, *options).token_ids != first
    in_open = ["generate", "random:tiny", "--privacy", "open", "--worker", tiny_worker]
    assert main(*in_open, *options, "--seed", 1).token_ids == first


def test_ids_may_be_one_list_or_several(main: Main, tmp_path: Path) -> None:
    command = [*TINY, "--json", "--ignore-eos", "--max-tokens", "8", "--prompt-ids"]
    one = tmp_path / "one.json"
    one.write_text(json.dumps([5, 6, 7]))
    several = write_ids(tmp_path / "several.json", [9, 10], [5, 6, 7])
    alone, both = main(*command, one), main(*command, several)
    assert [len(ids) for ids in both.token_ids] == [8, 8]
    assert both.token_ids[1] == alone.token_ids[0]


def test_debug_shows_the_traceback_and_still_ends_with_the_error(main: Main) -> None:
    result = main(*TINY, "--prompt", "hello", "--debug")
    assert result.status == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_an_error_that_nobody_foresaw_is_one_line_without_what_it_holds(
    main: Main, ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = "the prompt"  # by the error; a traceback has the lines of its source

    def fail(*_: object) -> None:
        raise ZeroDivisionError(held)

    monkeypatch.setattr("tsqp.runtime.loaded_model.open_checkpoint", fail)
    result = main(*TINY, "--prompt-ids", ids)
    assert result.status == 1
    assert result.stderr == (
        "error: Unexpected ZeroDivisionError; run again with --debug, and report it.\n"
    )
    result = main(*TINY, "--prompt-ids", ids, "--debug")
    assert result.status == 1
    assert "ZeroDivisionError: (message withheld" in result.stderr
    assert held not in result.stderr


@pytest.mark.parametrize(
    "command",
    [
        *([], ["generate"], ["chat"], ["worker"], ["demo"], ["audit"], ["bench"]),
        *(["bench-kernels"], ["report"]),
    ],
)
def test_help_names_the_command_and_its_options(command: list[str], main: Main) -> None:
    result = main(*command, "--help")
    assert result.status == 0
    assert re.search(" ".join(["Usage: .*tsqp", *command, r"\[OPTIONS]"]), result.stdout)
    assert "--help" in result.stdout
    assert "--supervised" not in result.stdout


def test_the_demo_answers_shows_what_the_gpu_saw_and_leaves_nothing_behind(
    commands: Commands, demo_path: Path, tmp_path: Path
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    result = commands.start("demo", env={"TMPDIR": str(temporary)}).ends(180)
    assert result.status == 0
    assert result.stdout == f"{ANSWER}\n"
    assert f"transport {SHARED}: " in result.stderr
    # One or two tokens of 42 are found in noise, too, now and then.
    assert re.search(r"nearest embedding +[0-3] of 42 tokens +42 of 42 tokens", result.stderr)
    assert re.search(r"more than chance +0 of 7 +6 of 6", result.stderr)
    assert QUESTION in result.stderr.split("as read by the worker in open:")[1]
    assert not list(temporary.iterdir())


def test_a_demo_that_is_ended_keeps_no_recording(
    commands: Commands, demo_path: Path, tmp_path: Path
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    running = commands.start("demo", env={"TMPDIR": str(temporary)})
    running.says("starting two workers")
    [folder] = temporary.glob("tsqp-demo-*")
    assert eventually(lambda: any(folder.rglob("*.jsonl")))
    assert folder.stat().st_mode & 0o077 == 0
    running.send(signal.SIGTERM)
    running.ends()
    assert not list(temporary.iterdir())


def test_a_line_for_people_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    say("[/red] What is [bold]this?")
    assert capsys.readouterr().err == "[/red] What is [bold]this?\n"
