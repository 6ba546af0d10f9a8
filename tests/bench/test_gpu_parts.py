"""Parts of the CUDA worker by themselves, their launches, and the goals; without a GPU."""

import json

import pytest
import torch

from tsqp.bench import gpu_parts
from tsqp.bench.gpu_goals import Goal, goals, judge
from tsqp.bench.gpu_parts import PARTS, Failed, main, measure
from tsqp.bench.launches import all_launches, count_launches

CPU = torch.device("cpu")
ON_A_CPU = {"library-int8", "library-bfloat16", "launches"}


@pytest.mark.parametrize("part", sorted(PARTS.keys() - ON_A_CPU))
def test_a_part_that_needs_a_gpu_says_so(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([part, "--device", "cpu"])
    assert end.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"part": part, "works": None, "error": "needs a CUDA device", "figures": {}}


def test_a_part_that_works_gives_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts, "SIDE_ON_CPU", 16)
    found = measure("library-bfloat16", CPU)
    assert (found["part"], found["works"], found["error"]) == ("library-bfloat16", True, None)
    assert found["figures"].keys() >= {"wide_1_us", "lattice_16_us"}
    assert min(found["figures"].values()) > 0


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (Failed("its products are wrong"), "its products are wrong"),
        (KeyError("x"), "KeyError: 'x'"),
    ],
)
def test_a_part_that_fails_says_why(
    error: Exception,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(device: torch.device) -> dict[str, float]:
        raise error

    monkeypatch.setitem(PARTS, "graphs", fail)
    with pytest.raises(SystemExit) as end:
        main(["graphs", "--device", "cpu"])
    assert end.value.code == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["works"], found["error"]) == (False, words)


def test_a_wrong_product_is_not_timed() -> None:
    with pytest.raises(Failed, match="wrong"):
        gpu_parts._product_figures(lambda c_TB, weight_FD, field, z_TB: None, CPU)


def test_operators_that_compute_are_counted_and_views_are_not() -> None:
    x = torch.ones(4, 4)
    names = count_launches(lambda: (x.t().reshape(2, 8)[:, :3] + x.view(2, 8)[:, :3]).mul_(2))
    assert sorted(names) == ["add", "clone", "mul_"]  # a transposed tensor is copied to be reshaped


def test_sequences_add_launches_to_a_layer() -> None:
    found = all_launches()
    assert found["triton_product"] == 1 < found["library_wide"]
    assert 15 < found["layer_1_sequences"] < 60
    # Two copies into the cache, and attention, for each further sequence.
    assert found["layer_16_sequences"] >= found["layer_1_sequences"] + 15 * 3


def test_goals_are_met_or_not_or_not_measured() -> None:
    step = {"figures": {"a": 2.0, "b": 4.0}}
    some = [
        Goal("small", ("s", "figures", "a"), 3, "µs"),
        Goal("ratio", ("s", "figures", "b"), 1, "", ("s", "figures", "a")),
        Goal("rate", ("s", "figures", "b"), 1, "", ("s", "figures", "a"), is_least=True),
        Goal("missing", ("t", "figures", "a"), 1, ""),
        Goal("missing ratio", ("s", "figures", "b"), 1, "", ("t", "figures", "a")),
    ]
    found = list(judge(some, {"s": step}))
    assert [each.is_met for each in found] == [True, False, True, None, None]
    assert [str(each) for each in found[:2]] == [
        "small: 2 (goal: at most 3 µs), met",
        "ratio: 2 (goal: at most 1), NOT met",
    ]
    assert str(found[3]) == "missing: not measured (goal: at most 1)"


def test_every_goal_is_about_a_part_or_the_measured_model() -> None:
    for goal in goals("a model"):
        for step, *_ in filter(None, (goal.figure, goal.over)):
            assert step == "a model" or step.removeprefix("part ") in PARTS
