"""The program of `scripts/gpu-check`: runs device tests and benchmarks, and writes one JSON file.

Each step is a separate process with a time limit, so a step that hangs or fails does not affect the
others. Each part of the CUDA worker is such a step, too: see `gpu_parts`. The whole run ends within
BUDGET_S.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from tsqp.bench.beside_predictions import Beside, closest_gpu, lay_beside
from tsqp.bench.gpu_goals import Verdict, goals, judge
from tsqp.bench.gpu_parts import PARTS
from tsqp.bench.host import describe_machine

BUDGET_S = 460.0
LEAST_S = 5.0  # a step with less time left is skipped
TESTS = Path(__file__).parents[3] / "tests" / "gpu"
GEOMETRY = "random:llama-3.2-1b"  # whose figures are predicted, and measured on a GPU
MEASURED, PREDICTED = "llama-3.2-1b bfloat16", "predictions"
MODES = "transformers,tee,open,open-gpu-attention,open-fused,pad,shares"


# Loads a model whose lattice hints the worker makes: model and device are arguments.
HINTS_PROGRAM = """
import json, sys, time
from tsqp import LLM, SamplingParams

began = time.perf_counter()
options = {"worker": "local", "device": sys.argv[2], "dtype": "float32", "pad_memory": 0}
with LLM(sys.argv[1], field="lattice", hints="worker", timeout=60, **options) as llm:
    load_s = time.perf_counter() - began
    llm.generate([[1] * 16], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    print(json.dumps({"load_s": load_s, "answer_s": time.perf_counter() - began - load_s}))
"""


@dataclass(frozen=True, slots=True)
class Step:
    """A command, given as arguments for Python, and its time limit.

    Attributes:
        is_json: whether the last line of output is a JSON result.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    is_json: bool = True


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a step ended.

    Attributes:
        state: "done", "failed", "timed out", or "skipped" if too little time was left.
        result: the printed JSON, or the last lines of output.
    """

    name: str
    state: str
    seconds: float
    result: object


def steps(device: str, gpu_name: str = "") -> list[Step]:
    """All steps, the most informative first.

    Args:
        gpu_name: name of the GPU; a similar one is simulated for the predictions.
    """
    tsqp = ("-m", "tsqp")
    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", str(TESTS))
    bench = (*tsqp, "bench", "--device", device)
    small = ("--prompt-tokens", "1024", "--new-tokens", "17", "--rounds", "3")
    large = ("--prompt-tokens", "1024", "--new-tokens", "9", "--rounds", "2")
    if device == "cpu":  # a trial run of this script
        small = ("--prompt-tokens", "64", "--new-tokens", "3", "--rounds", "1")
    # A trial run predicts a small model, as most of its time is for others.
    geometry, layers = ("random:smollm2-135m", "1,2") if device == "cpu" else (GEOMETRY, "4,8")
    lengths = small if device == "cpu" else large
    chosen = ("--modes", "open,wide", "--layers", layers, "--gpu", closest_gpu(gpu_name))
    predict = (*tsqp, "bench", "trusted-side", geometry, "--dtype", "bfloat16", *chosen, *lengths)
    found = [
        Step("tests", tests, 150, is_json=False),
        Step("doctor", (*tsqp, "doctor", "--json"), 60),
        *(
            Step(f"part {part}", ("-m", "tsqp.bench.gpu_parts", part, "--device", device), 60)
            for part in PARTS
        ),
        Step(
            "smollm2-135m float32",
            (*bench, "random:smollm2-135m", "--dtype", "float32", "--modes", MODES, *small),
            150,
        ),
    ]
    if device != "cpu":
        modes = "tee,open,pad"
        arguments = (GEOMETRY, "--dtype", "bfloat16", "--modes", modes, *large)
        found.append(Step(MEASURED, (*bench, *arguments), 240))
    found.append(Step(PREDICTED, predict, 120))
    lattice = ("--dtype", "float32", "--field", "lattice", "--modes", "tee,pad")
    found += [
        Step("hints of the worker", ("-c", HINTS_PROGRAM, "random:smollm2-135m", device), 120),
        Step("smollm2-135m lattice", (*bench, "random:smollm2-135m", *lattice, *small), 150),
    ]
    return [*found, Step("transport", (*tsqp, "bench", "transport", "--calls", "500"), 60)]


def run_step(step: Step, left_s: float) -> Outcome:
    """Run one step until it ends or reaches its time limit."""
    limit_s = min(step.limit_s, left_s)
    if limit_s < LEAST_S:
        return Outcome(step.name, "skipped", 0.0, "no time was left")
    began = perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-P", *step.command], capture_output=True, text=True, timeout=limit_s
        )
    except subprocess.TimeoutExpired as exc:
        said = exc.stderr or b""
        words = said.decode(errors="replace") if isinstance(said, bytes) else said
        return Outcome(step.name, "timed out", limit_s, words[-2000:])
    seconds = perf_counter() - began
    output = done.stdout.strip()
    if step.is_json and output:
        try:
            result: object = json.loads(output.splitlines()[-1])
        except json.JSONDecodeError:
            result = output[-2000:]
    else:
        result = (output + done.stderr)[-2000:]
    if done.returncode != 0 and step.is_json:
        result = {"result": result, "said": done.stderr[-2000:]}
    return Outcome(step.name, "failed" if done.returncode else "done", seconds, result)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all steps; exits with status 1 if any step was not done."""
    parser = argparse.ArgumentParser(prog="scripts/gpu-check", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, required=True, help="a new JSON file")
    options = parser.parse_args(arguments)
    if options.out.exists():
        parser.error(f"{options.out} exists; name a new file, or remove it")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; rehearse with --device cpu")
    began = perf_counter()
    outcomes = []
    gpu_name = torch.cuda.get_device_name() if options.device == "cuda" else ""
    for step in steps(options.device, gpu_name):
        print(f"{step.name} …", file=sys.stderr, flush=True)
        outcome = run_step(step, BUDGET_S - (perf_counter() - began))
        outcomes.append(outcome)
        print(f"{step.name}: {outcome.state}, {outcome.seconds:.0f} s", file=sys.stderr, flush=True)
        _write(options.out, options.device, gpu_name, outcomes)  # a crash loses no results
    for line in (*_parts(outcomes), *_beside(outcomes), *_goals(outcomes)):
        print(line, file=sys.stderr)
    if any(outcome.state != "done" for outcome in outcomes):
        sys.exit(1)


def _results(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What the steps found that were done."""
    return {
        each.name: each.result
        for each in outcomes
        if each.state == "done" and isinstance(each.result, dict)
    }


def _parts(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """A line for each part of the CUDA worker: whether it works."""
    for each in outcomes:
        if each.name.startswith("part "):
            result: Any = each.result
            if isinstance(result, dict):
                result = result.get("result", result)  # of a step that failed
            error = result.get("error") if isinstance(result, dict) else each.state
            yield f"{each.name}: {'works' if error is None else error}"


def _goals(outcomes: Sequence[Outcome]) -> list[Verdict]:
    return list(judge(goals(MEASURED), _results(outcomes)))


def _beside(outcomes: Sequence[Outcome]) -> list[Beside]:
    """Measured figures beside predictions, if both steps were done."""
    results = _results(outcomes)
    if MEASURED not in results or PREDICTED not in results:
        return []
    return list(lay_beside(results[MEASURED], results[PREDICTED]))


def _write(out: Path, device: str, gpu_name: str, outcomes: Sequence[Outcome]) -> None:
    result = {
        "command": f"scripts/gpu-check --device {device}",
        "gpu": gpu_name or None,
        "machine": describe_machine(),
        "steps": [asdict(outcome) for outcome in outcomes],
        "parts": list(_parts(outcomes)),
        "goals": [asdict(each) for each in _goals(outcomes)],
        "beside_predictions": [asdict(each) for each in _beside(outcomes)],
    }
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
