"""How long a mode takes to start, and what memory it takes, each in a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

from tsqp.bench.modes import Setting
from tsqp.checkpoint import demo_model
from tsqp.errors import TSQPError

PREPARED = ("pad", "pad-inline", "shares")  # modes that keep integer weights in a cache


@dataclass(frozen=True, slots=True)
class Start:
    """One start of one mode, and one run after it.

    Attributes:
        cache: of integer weights: "none" (not used), "cold" or "prepared".
        process_s: from starting the process until it can answer; stock of pads not included.
        load_s: of it, loading the model and meeting the worker.
        stock_s: to fill the stock of pads.
        tee_bytes: most memory of the trusted side, at any time.
        workers_bytes: the same of each worker.
    """

    mode: str
    cache: str
    process_s: float
    load_s: float
    stock_s: float
    tee_bytes: int
    workers_bytes: tuple[int, ...]


def measure_starts(modes: list[str], setting: Setting) -> Iterator[Start]:
    """Start every mode in turn; those that keep a cache first without, then with it."""
    # By its path: the cache that these processes get does not have the demo model.
    model = str(demo_model.locate()) if setting.model == "demo" else setting.model
    own = {**asdict(setting), "model": model}
    for mode in modes:
        keeps_cache = mode in PREPARED and not model.startswith("random:")
        with tempfile.TemporaryDirectory(prefix="tsqp-bench-") as cache:
            for state in ("cold", "prepared") if keeps_cache else ("none",):
                yield _start(mode, state, own, cache)


def _start(mode: str, state: str, setting: dict[str, object], cache: str) -> Start:
    began = perf_counter()
    command = [sys.executable, "-P", "-m", "tsqp.bench.start_once", mode, json.dumps(setting)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TSQP_CACHE": cache},
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process_s = perf_counter() - began
        found, words = process.communicate()
    if process.returncode != 0:
        said = words.strip().splitlines() or ["it said nothing"]
        raise TSQPError(f"Starting {mode} in a separate process failed: {said[-1]}")
    return Start(mode=mode, cache=state, process_s=process_s, **json.loads(found))


def peak_bytes(process: int | str = "self") -> int:
    """The most memory that a process has had, as Linux counts it (VmHWM)."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return 0
