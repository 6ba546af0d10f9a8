"""`scripts/gpu-check`: a step that goes wrong costs the others nothing, and all is in one file."""

import json
from pathlib import Path

import pytest
import torch

from tsqp.bench import gpu_check
from tsqp.bench.gpu_check import BUDGET_S, HINTS_PROGRAM, Step, main, run_step, steps
from tsqp.bench.gpu_parts import PARTS

LONG_S = 60.0


def step(program: str, *, limit_s: float = LONG_S, is_json: bool = True) -> Step:
    return Step("a step", ("-c", program), limit_s, is_json)


def test_the_last_line_of_a_step_is_its_result() -> None:
    outcome = run_step(step("print('words'); print('{\"a\": 1}')"), LONG_S)
    assert (outcome.state, outcome.result) == ("done", {"a": 1})


def test_a_step_that_fails_keeps_what_it_found_and_what_it_said() -> None:
    program = "import sys; print('{\"a\": 1}'); print('why', file=sys.stderr); sys.exit(1)"
    outcome = run_step(step(program), LONG_S)
    assert outcome.state == "failed"
    assert outcome.result == {"result": {"a": 1}, "said": "why\n"}


def test_tests_that_fail_are_told_by_their_last_words() -> None:
    outcome = run_step(step("print('2 failed'); raise SystemExit(1)", is_json=False), LONG_S)
    assert (outcome.state, outcome.result) == ("failed", "2 failed")


def test_a_step_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "LEAST_S", 0.0)
    program = "import sys, time; print('here', file=sys.stderr, flush=True); time.sleep(60)"
    outcome = run_step(step(program, limit_s=1.0), LONG_S)
    assert (outcome.state, outcome.result) == ("timed out", "here\n")


def test_a_step_for_which_no_time_is_left_is_skipped() -> None:
    assert run_step(step("raise SystemExit(1)"), 1.0).state == "skipped"


@pytest.mark.slow  # it loads torch anew, on both sides
def test_the_start_with_hints_of_the_worker_is_timed() -> None:
    found = run_step(Step("hints", ("-c", HINTS_PROGRAM, "random:tiny", "cpu"), LONG_S), LONG_S)
    assert found.state == "done", found.result
    assert isinstance(found.result, dict)
    assert found.result["load_s"] > 0 < found.result["answer_s"]


def test_a_rehearsal_leaves_one_file_whatever_ends_badly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = [step("print('{}')"), step("raise SystemExit(1)"), step("print('{\"b\": 2}')")]
    monkeypatch.setattr(gpu_check, "steps", lambda device, gpu_name: some)
    out = tmp_path / "result.json"
    with pytest.raises(SystemExit) as end:
        main(["--device", "cpu", "--out", str(out)])
    assert end.value.code == 1
    found = json.loads(out.read_text())
    assert [each["state"] for each in found["steps"]] == ["done", "failed", "done"]
    assert found["steps"][2]["result"] == {"b": 2}
    assert found["command"] == "scripts/gpu-check --device cpu"
    assert found["beside_predictions"] == []


def test_parts_and_goals_are_told_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {"graph_registered_us": 20, "launched_registered_us": 10, "graph_us": 40}
    good = {"part": "graphs", "works": True, "error": None, "figures": figures}
    bad = {"part": "overlap", "works": False, "error": "it is wrong", "figures": {}}
    some = [
        Step("part graphs", ("-c", f"print({json.dumps(good)!r})"), LONG_S),
        Step("part overlap", ("-c", f"print({json.dumps(bad)!r}); exit(1)"), LONG_S),
        Step("part launches", ("-c", "exit(3)"), LONG_S),
    ]
    monkeypatch.setattr(gpu_check, "steps", lambda device, gpu_name: some)
    out = tmp_path / "result.json"
    with pytest.raises(SystemExit):
        main(["--device", "cpu", "--out", str(out)])
    found = json.loads(out.read_text())
    words = ["part graphs: works", "part overlap: it is wrong", "part launches: failed"]
    assert found["parts"] == words
    met = {each["name"]: each["is_met"] for each in found["goals"]}
    assert met["a call of one row, as a graph, from registered memory"] is True
    assert met["a graph ÷ launches"] is False
    assert met["two sessions overlapped ÷ in turn"] is None
    said = capsys.readouterr().err
    assert "part overlap: it is wrong\n" in said
    assert "a graph ÷ launches: 2 (goal: at most 1), NOT met\n" in said


def test_figures_of_a_gpu_lie_beside_the_predictions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = {
        "prefill_s": {"tee": {"median": 9}, "pad": {"median": 2}},
        "decode_s_per_token": {"tee": {"median": 9}, "pad": {"median": 0.2}},
    }
    simulated = {"open": {}, "wide": {"prefill_s": 1, "decode_s": 0.1}}
    predicted = {"prediction": {"simulated": simulated}}
    results = {gpu_check.MEASURED: measured, gpu_check.PREDICTED: predicted}
    some = [
        Step(name, ("-c", f"print({json.dumps(result)!r})"), LONG_S)
        for name, result in results.items()
    ]
    monkeypatch.setattr(gpu_check, "steps", lambda device, gpu_name: some)
    main(["--device", "cpu", "--out", str(tmp_path / "result.json")])
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["beside_predictions"] == [
        {
            "mode": "pad",
            "prefill_s": 2,
            "predicted_prefill_s": 1,
            "decode_s": 0.2,
            "predicted_decode_s": 0.1,
        }
    ]


@pytest.mark.parametrize(
    ("name", "simulated"),
    [
        ("NVIDIA H200", "h200-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
    ],
)
def test_predictions_are_for_a_gpu_like_the_one_that_is_there(name: str, simulated: str) -> None:
    [step] = [each for each in steps("cuda", name) if each.name == gpu_check.PREDICTED]
    assert simulated in step.command


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_step_has_a_limit_and_the_tests_of_devices_come_first(device: str) -> None:
    found = steps(device)
    assert found[0].command[-1].endswith("tests/gpu")
    assert Path(found[0].command[-1]).is_dir()
    names = {each.name for each in found}
    assert gpu_check.PREDICTED in names
    assert {f"part {part}" for part in PARTS} < names
    assert {"tests", "doctor", "transport", "hints of the worker", "smollm2-135m lattice"} < names
    assert all(0 < each.limit_s < BUDGET_S < 8 * 60 for each in found)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--device", "cpu", "--out", "OUT"], "exists; name a new file"),
        (["--device", "cuda", "--out", "NEW"], "torch sees no CUDA device here; rehearse with"),
        (["--device", "cpu"], "required: --out"),
        (["--device", "tpu", "--out", "NEW"], "invalid choice: 'tpu'"),
    ],
)
def test_a_wrong_request_is_one_sentence(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "OUT").write_text("precious")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert sentence in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["OUT"]
    assert (tmp_path / "OUT").read_text() == "precious"
