"""Call logs written by hand, whose times are known."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from tsqp.tee.call_lines import CallLine, Geometry, Header, Line, PhaseSummary, Summary
from tsqp.tee.stats import KINDS

START = 1_700_000_000.0
NO_PHASE = PhaseSummary(0, 0, 0.0, 0.0, 0, {}, {})


def header(**changes: Any) -> Header:
    fields: dict[str, Any] = {
        "format": 1,
        "tsqp": "0.1.0",
        "privacy": "pad",
        "field": "wide",
        "dtype": "float32",
        "model": "random:tiny",
        "geometry": Geometry(2, 64, 128, 512),
        "transport": "poll",
        "threads": 2,
        "microbatches": 1,
        "prefill_chunk": 512,
        "start": START,
        "machine": {"cpu": "a processor, 2 cores"},
    }
    return Header(**(fields | changes))


def call(**changes: Any) -> CallLine:
    """A call of 100 µs: 10 of masking, 10 of sending, 60 of waiting with 40 of computing in it."""
    fields: dict[str, Any] = {
        "time": START,
        "step": 1,
        "phase": "decode",
        "method": "product",
        "layer": 0,
        "group": "qkv",
        "endpoint": 0,
        "transport": "poll",
        "rows": 1,
        "sent_bytes": 256,
        "received_bytes": 512,
        "pads_us": 5.0,
        "mask_us": 5.0,
        "serialise_us": 4.0,
        "send_us": 6.0,
        "away_us": 0.0,
        "wait_us": 60.0,
        "compute_us": 40.0,
        "overlap_us": 0.0,
        "receive_us": 5.0,
        "unmask_us": 15.0,
    }
    return CallLine(**(fields | changes))


def decoding(
    calls: int, wall_s: float, stages_s: dict[str, float], kinds_s: dict[str, float]
) -> Summary:
    """The last line of a run that only decoded, one token a step."""
    kinds = dict.fromkeys(KINDS, 0.0) | kinds_s
    phase = PhaseSummary(2, 2, wall_s, wall_s, calls, kinds, stages_s)  # type: ignore[arg-type]
    return Summary(NO_PHASE, phase, calls, 0)


def run(**seconds: float) -> Summary:
    """Two tokens in a second, with these parts of the calls, and half of the rest attention."""
    waits = sum(seconds.get(name, 0.0) for name in ("compute", "link"))
    stages = {name: value for name, value in seconds.items() if name != "link"} | {"wait": waits}
    calls_s = sum(value for name, value in stages.items() if name != "compute")
    left_s = 1.0 - calls_s
    return decoding(4, 1.0, stages, {"linear": calls_s, "attention": left_s / 2})


def write(path: Path, lines: Sequence[Line], end: bytes = b"") -> Path:
    path.write_bytes(msgspec.json.Encoder().encode_lines(lines) + end)
    return path
