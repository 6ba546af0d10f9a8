"""Start-up time and peak memory of each mode, measured in a new process for each."""

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
    """One start of one mode, followed by one run.

    Attributes:
        cache: state of the cache of integer weights: "none" (not used), "cold" or "prepared".
        process_s: from the start of the process until it can answer, without filling the stock.
        load_s: part of process_s: loading the model and connecting to the worker.
        stock_s: filling the stock of pads.
        tee_bytes: peak memory of the TEE.
        workers_bytes: peak memory of each worker.
    """

    mode: str
    cache: str
    process_s: float
    load_s: float
    stock_s: float
    tee_bytes: int
    workers_bytes: tuple[int, ...]


def measure_starts(modes: list[str], setting: Setting) -> Iterator[Start]:
    """Start every mode; modes with a cache of integer weights start without it, then with it."""
    # Pass the path of the demo model, as it is not in the cache that these processes get.
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
    """Peak memory of a process, as Linux counts it (VmHWM)."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return 0
