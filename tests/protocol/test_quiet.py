"""With --quiet a command prints its results, warnings and errors, and nothing else."""

import io
import sys
from pathlib import Path

import pytest
from protocol_helpers import Main

from tsqp.bench.output import new_table, print_result

SHORT = ["--privacy", "tee", "--max-tokens", "3", "--seed", "1"]


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_an_answer_comes_without_notes(main: Main, speaking: Path, options: list[str]) -> None:
    command = ["generate", speaking, *SHORT, "--prompt", "x", *options]
    loud, quiet = main(*command), main(*command, "--quiet")
    assert "prefill" in loud.stderr
    assert quiet.stderr == ""
    if options:
        assert quiet.token_ids == loud.token_ids
    else:
        assert quiet.stdout == loud.stdout != ""


def test_a_chat_says_only_what_was_asked_for(
    main: Main, speaking: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = b"one\n/reset\n/system x\n/undo\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    result = main("chat", speaking, *SHORT, "--quiet")
    assert result.status == 0
    assert result.stderr == "There is nothing to undo.\n"


def test_a_file_is_prepared_and_a_digest_computed_without_a_word(
    main: Main, tmp_path: Path
) -> None:
    result = main("prepare", "random:tiny", tmp_path / "x.tsqp.safetensors", "--quiet")
    assert (result.status, result.stdout + result.stderr) == (0, "")
    result = main("digest", "random:tiny", "--quiet")
    assert result.stderr == "" and result.stdout.count("\n") == 1


def test_warnings_and_errors_are_still_there(
    main: Main, tiny_worker: str, ids: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = ["generate", "random:tiny", "--prompt-ids", ids, "--max-tokens", "2"]
    result = main(*command, "--privacy", "open", "--worker", tiny_worker, "--quiet")
    assert result.status == 0
    assert [record.getMessage() for record in caplog.records] == [
        "privacy open: the worker reads every prompt and every answer"
    ]
    assert "There is no such privacy mode" in main(*command, "--privacy", "none", "--quiet").error


def test_quiet_is_a_setting_too(main: Main, speaking: Path) -> None:
    command = ["generate", speaking, *SHORT, "--prompt", "x"]
    assert main(*command, env={"TSQP_QUIET": "1"}).stderr == ""
    assert main(*command).stderr != ""


def test_a_benchmark_prints_its_json_only(
    main: Main, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    table = new_table("times", "x")
    table.add_row("1")
    for options, is_there in (([], True), (["--quiet"], False)):
        main("digest", "random:tiny", *options)  # sets what the option sets
        capsys.readouterr()
        print_result({"x": 1}, [table], ["a note"], None)
        said = capsys.readouterr()
        assert said.out.startswith("{")
        assert ("times" in said.err, "a note" in said.err) == (is_there, is_there)
