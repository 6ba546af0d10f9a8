"""`tsqp report` on logs and benchmarks, whole."""

from pathlib import Path

import pytest
from protocol_helpers import Main, write_ids

BENCHMARKS = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.json"))
GROUPS = {
    "worker compute", "link", "serialisation", "TEE pads", "TEE masking",
    "TEE own work",
}  # fmt: skip


@pytest.fixture
def log(main: Main, tmp_path: Path) -> Path:
    """Of a run through a worker in this process."""
    path = tmp_path / "run.jsonl"
    ids = write_ids(tmp_path / "ids.json", range(1, 41))
    command = ["generate", "random:tiny", "--worker", "inproc", "--ignore-eos", "--max-tokens", 8]
    assert main(*command, "--prompt-ids", ids, "--rpc-log", path).status == 0
    return path


def test_a_log_is_reported_with_its_bottlenecks(log: Path, main: Main) -> None:
    result = main("report", log)
    assert (result.status, result.stderr) == (0, "")
    for words in ("Calls by method", "product", "Where the time went", "(TEE masking)"):
        assert words in result.stdout
    for phase in ("prefill", "decode"):
        assert f"Bottleneck of {phase}: " in result.stdout
    assert "without all of it" in result.stdout


def test_json_is_one_object_with_every_figure(log: Path, main: Main) -> None:
    result = main("report", log, "--against", log, "--json")
    assert result.status == 0
    assert "Where the time went" in result.stderr
    assert result.stdout.count("\n") == 1
    [report] = result.json["reports"]
    assert [method["name"] for method in report["methods"]] == ["product"]
    assert report["methods"][0]["calls"] == 8 * 9
    for phase, bottleneck in zip(report["phases"], report["bottlenecks"], strict=True):
        assert set(phase["groups_s"]) == GROUPS
        assert sum(phase["groups_s"].values()) == pytest.approx(phase["wall_s"])
        assert bottleneck["name"] in GROUPS
        assert bottleneck["seconds"] == max(phase["groups_s"].values())
    assert set(report["ratios"].values()) == {1.0}


def test_a_page_is_written_once(log: Path, main: Main, tmp_path: Path) -> None:
    page = tmp_path / "run.html"
    assert main("report", log, "--html", page).status == 0
    text = page.read_text()
    assert text.startswith("<!DOCTYPE html>")
    assert str(tmp_path) not in text
    result = main("report", log, "--html", page)
    assert result.status == 2
    assert "exists; name a new file" in result.error
    assert page.read_text() == text


def test_benchmarks_are_reported_and_compared(main: Main) -> None:
    assert BENCHMARKS
    result = main("report", *BENCHMARKS, "--json")
    assert result.status == 0
    assert len(result.json["reports"]) == len(BENCHMARKS)
    result = main("report", BENCHMARKS[-1], "--against", BENCHMARKS[-1])
    assert result.status == 0
    assert "above 1 is slower" in result.stdout


def test_a_log_and_a_benchmark_are_not_compared(log: Path, main: Main) -> None:
    result = main("report", log, "--against", BENCHMARKS[0])
    assert result.status == 2
    assert "are not of the same kind" in result.error


def test_a_page_of_benchmarks_alone_is_refused(main: Main, tmp_path: Path) -> None:
    result = main("report", BENCHMARKS[0], "--html", tmp_path / "page.html")
    assert result.status == 2
    assert "--html and --trace need a call log" in result.error
    assert not (tmp_path / "page.html").exists()


def test_a_file_that_is_no_log_is_named(main: Main, ids: Path) -> None:
    result = main("report", ids)
    assert result.status == 1
    assert result.error.startswith(f"{ids} is neither a call log")
