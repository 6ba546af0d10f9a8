"""`tsqp bench`: prefill and decode of transformers, `tee` and `open`, in turn, round by round.

Machines drift; a ratio is therefore taken within each round and the median of the ratios quoted.
"""

import datetime
import os
import platform
import secrets
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import tsqp
from tsqp import LLM, SamplingParams
from tsqp.bench.baseline import Transformers
from tsqp.bench.ceilings import Ceilings, measure_ceilings
from tsqp.errors import UsageError
from tsqp.model.checkpoint import open_checkpoint
from tsqp.model.config import parts
from tsqp.model.weights import linear_bytes, parse_dtype

Run = Callable[[], tuple[float, float]]
RATIOS = (("tee", "transformers"), ("open", "tee"), ("open", "transformers"))


@dataclass(frozen=True, slots=True)
class Figure:
    """Median, least and most of one quantity over the rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: list[float]) -> "Figure":
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Result:
    """All figures of one run of the benchmark; seconds, bytes, and ratios without unit."""

    model: str
    dtype: str
    prompt_tokens: int
    new_tokens: int
    rounds: int
    threads: int
    prefill_s: dict[str, Figure]
    decode_s_per_token: dict[str, Figure]
    prefill_ratio: dict[str, Figure]
    decode_ratio: dict[str, Figure]
    open_rpc: dict[str, float]
    ceilings: Ceilings
    prefill_floor_s: float
    decode_floor_s: float
    machine: dict[str, str]

    def as_json(self) -> dict[str, object]:
        """Ready for JSON."""
        return asdict(self)


def compare(
    model: str,
    *,
    dtype: str,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    threads: int,
) -> Result:
    """Measure.

    Args:
        model: as for `LLM`.
        prompt_tokens: length of the prompt, of random tokens, in one chunk.
        new_tokens: generated tokens, of which the first belongs to the prefill.
        rounds: after one round that is not counted.
        threads: for each of transformers, the TEE side and the worker.
    """
    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(model)
    config = checkpoint.config
    torch_dtype = parse_dtype(dtype, config)
    if prompt_tokens + new_tokens > config.max_positions:
        raise UsageError(
            f"{prompt_tokens} prompt and {new_tokens} new tokens are more than the context of "
            f"{config.max_positions} tokens; ask for fewer."
        )
    prompt_ids = [secrets.randbelow(config.vocab_size) for _ in range(prompt_tokens)]
    baseline = Transformers(checkpoint, torch_dtype)
    name = str(torch_dtype).removeprefix("torch.")
    with (
        LLM(model, privacy="tee", dtype=name, prefill_chunk=prompt_tokens) as tee,
        LLM(
            model,
            privacy="open",
            worker="local",
            dtype=name,
            prefill_chunk=prompt_tokens,
            threads=threads,
        ) as split,
    ):
        runs: dict[str, Run] = {
            "transformers": lambda: baseline.run(prompt_ids, new_tokens),
            "tee": lambda: _run(tee, prompt_ids, new_tokens),
            "open": lambda: _run(split, prompt_ids, new_tokens),
        }
        measured = _rounds(runs, rounds)
        rpc = split.rpc
    forwards = (rounds + 1) * new_tokens
    ceilings = measure_ceilings(torch_dtype)
    weights = linear_bytes(config, torch_dtype)
    # The output projection is applied to the last position of a prompt alone.
    head = sum(p.out_features * p.in_features for p in parts(config, -1, "lm_head"))
    per_token = 2 * (weights / torch_dtype.itemsize - head)
    prefill = {mode: [pair[0] for pair in pairs] for mode, pairs in measured.items()}
    decode = {mode: [pair[1] for pair in pairs] for mode, pairs in measured.items()}
    return Result(
        model=Path(model).name,  # no path of this machine
        dtype=name,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
        threads=threads,
        prefill_s={mode: Figure.of(values) for mode, values in prefill.items()},
        decode_s_per_token={mode: Figure.of(values) for mode, values in decode.items()},
        prefill_ratio=_ratios(prefill),
        decode_ratio=_ratios(decode),
        open_rpc={
            "calls_per_forward": sum(rpc.calls.values()) / forwards,
            "socket_bytes_per_call": rpc.socket_bytes / sum(rpc.calls.values()),
            "tensor_bytes_per_round": (rpc.sent_bytes + rpc.received_bytes) / (rounds + 1),
        },
        ceilings=ceilings,
        prefill_floor_s=(per_token * prompt_tokens + 2 * head) / ceilings.matmul_flops,
        decode_floor_s=weights / ceilings.read_bytes_per_s,
        machine=_machine(),
    )


def _run(llm: LLM, prompt_ids: list[int], new_tokens: int) -> tuple[float, float]:
    llm.stats.reset()
    llm.generate([prompt_ids], SamplingParams(0, max_tokens=new_tokens, ignore_eos=True))
    return llm.stats.prefill_s, llm.stats.decode_s / (new_tokens - 1)


def _rounds(runs: dict[str, Run], rounds: int) -> dict[str, list[tuple[float, float]]]:
    measured: dict[str, list[tuple[float, float]]] = {mode: [] for mode in runs}
    for number in range(rounds + 1):
        for mode, run in runs.items():
            figures = run()
            if number > 0:
                measured[mode].append(figures)
    return measured


def _ratios(values: dict[str, list[float]]) -> dict[str, Figure]:
    return {
        f"{a}/{b}": Figure.of([x / y for x, y in zip(values[a], values[b], strict=True)])
        for a, b in RATIOS
    }


def _machine() -> dict[str, str]:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores",
        "simd": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tsqp": tsqp.__version__,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def _commit() -> str:
    """The commit of the checkout that this package lies in, marked where files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return "unknown"
    return found.stdout.strip()
