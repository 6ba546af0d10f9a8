"""The goals for a worker on a GPU, and whether the figures of `scripts/gpu-check` meet them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# A figure is the name of a step, and the keys that lead to it in the step's result.
Figure = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure, or its ratio to another one, that is to be at most or at least `bound`.

    Attributes:
        over: the figure to divide by, for a ratio.
    """

    name: str
    figure: Figure
    bound: float
    unit: str
    over: Figure | None = None
    is_least: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a goal is met; None if it was not measured."""

    name: str
    goal: str
    found: float | None
    is_met: bool | None

    def __str__(self) -> str:
        found = "not measured" if self.found is None else f"{self.found:.3g}"
        word = {None: "", True: ", met", False: ", NOT met"}[self.is_met]
        return f"{self.name}: {found} (goal: {self.goal}){word}"


def goals(measured: str) -> list[Goal]:
    """All goals.

    Args:
        measured: name of the step that measures a model of 1.2 billion weights.
    """

    def part(name: str, figure: str) -> Figure:
        return f"part {name}", "figures", figure

    call = part("graphs", "graph_registered_us")
    found = [
        Goal("a call of one row, as a graph, from registered memory", call, 50, "µs"),
        Goal("a graph ÷ launches", call, 1, "", part("graphs", "launched_registered_us")),
        Goal("registered ÷ plain memory", call, 1, "", part("graphs", "graph_us")),
        Goal(
            "two sessions overlapped ÷ in turn",
            part("overlap", "overlapped_us"),
            0.9,
            "",
            part("overlap", "in_turn_us"),
        ),
    ]
    for way in ("to", "from"):
        fast, plain = (
            part("registration", f"{kind}_{way}_gb_s") for kind in ("registered", "plain")
        )
        name = f"rate of copies {way} the device, registered ÷ plain memory"
        found.append(Goal(name, fast, 1, "", plain, is_least=True))
    for rows in (1, 512):
        triton, library = (
            part(f"{kind}-int8", f"wide_{rows}_us") for kind in ("triton", "library")
        )
        found.append(Goal(f"Triton's product ÷ the library's, {rows} rows", triton, 1, "", library))
    prefill = measured, "prefill_s", "pad", "median"
    return [*found, Goal("prefill of 1,024 tokens of Llama-3.2-1B in pad", prefill, 2, "s")]


def judge(found: list[Goal], results: Mapping[str, Any]) -> Iterator[Verdict]:
    """Compare goals with the results of steps, by name."""
    for goal in found:
        value = _look_up(results, goal.figure)
        if goal.over is not None:
            over = _look_up(results, goal.over)
            value = value / over if value is not None and over else None
        is_met = None
        if value is not None:
            is_met = value >= goal.bound if goal.is_least else value <= goal.bound
        word = "at least" if goal.is_least else "at most"
        yield Verdict(goal.name, f"{word} {goal.bound:g} {goal.unit}".strip(), value, is_met)


def _look_up(results: Mapping[str, Any], figure: Figure) -> float | None:
    at: Any = results
    for key in figure:
        at = at.get(key) if isinstance(at, Mapping) else None
    return float(at) if isinstance(at, int | float) else None
