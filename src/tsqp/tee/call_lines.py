"""The lines of a call log: a header, one line per call, and a summary. Each line is a JSON object.

The lines hold only numbers of rows and bytes, times, and names from fixed lists. They hold no
tensors, token ids, texts of prompts or answers, or addresses. Fields are bounded, because a log
that is read may contain anything.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from tsqp.wire.messages import MAX_LAYERS, Name

FORMAT = 1

Phase = Literal["prefill", "decode", "other"]
Stage = Literal["pads", "mask", "serialise", "send", "wait", "compute", "receive", "unmask"]
Method = Literal[
    "embed",
    "linear",
    "product",
    "seed_product",
    "allocate",
    "truncate",
    "free",
    "attention_scores",
    "weighted_values",
    "layer",
]  # the tags of tsqp.wire.messages.Operation
Micros = Annotated[float, Meta(ge=0, le=1e14)]
Seconds = Annotated[float, Meta(ge=0, le=1e8)]
UnixTime = Annotated[float, Meta(ge=0, le=1e11)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Text = Annotated[str, Meta(max_length=200)]
Word = Annotated[str, Meta(pattern=r"^[0-9A-Za-z_.:+, -]{0,100}\Z")]


class Line(Struct, frozen=True, forbid_unknown_fields=True, tag_field="line"):
    """Base of all lines."""


class Geometry(Struct, frozen=True, forbid_unknown_fields=True):
    """The shape of the model."""

    layers: Count
    hidden: Count
    intermediate: Count
    vocabulary: Count


class Header(Line, frozen=True, tag="header"):
    """What ran.

    Attributes:
        format: the format of the log, FORMAT.
        model: "demo", "random:NAME", or the beginning of the weights' digest; never a path.
        transport: the transports of the workers, without duplicates.
        machine: as benchmarks describe it, without the commit.
        threads: torch's threads in the TEE.
        start: when the log began, in unix seconds.
    """

    format: Count
    tsqp: Word
    privacy: Word
    field: Word
    dtype: Word
    model: Word
    geometry: Geometry
    transport: Word
    threads: Count
    microbatches: Count
    prefill_chunk: Count
    start: UnixTime
    machine: Annotated[dict[Word, Text], Meta(max_length=16)]


class CallLine(Line, frozen=True, tag="call"):
    """One call that was answered.

    The stages of a call follow one another: pads, mask, serialise, send, away, wait, receive,
    unmask. Stages of different calls do not overlap, because one thread runs all of them.

    Attributes:
        time: when the call began, in unix seconds.
        step, phase: the engine's step to which the call belongs, and the phase of that step.
        method: the operation. layer and group are null if the operation has none.
        endpoint: number of the worker, from 0.
        pads_us: taking pads, and making those that are not ready.
        mask_us: reserving memory, quantising and masking; in `open`, copying.
        away_us: other work of the TEE before it waits for the answer.
        wait_us: waiting for the answer. `compute_us` is the part in which the worker says that it
            computed this call, limited to wait_us. The rest is the link, and calls of other
            sessions, which the worker does not report.
        overlap_us: the time in which the worker says that it computed while the TEE was away,
            limited to away_us.
        receive_us: taking the answer from the socket.
        unmask_us: unmasking and checking; in `open`, adding the bias.
    """

    time: UnixTime
    step: Count
    phase: Phase
    method: Method
    layer: Annotated[int, Meta(ge=-1, lt=MAX_LAYERS)] | None
    group: Name | None
    endpoint: Annotated[int, Meta(ge=0, lt=1024)]
    transport: Literal["poll", "shm", "inline", "inproc"]
    rows: Count
    sent_bytes: Count
    received_bytes: Count
    pads_us: Micros
    mask_us: Micros
    serialise_us: Micros
    send_us: Micros
    away_us: Micros
    wait_us: Micros
    compute_us: Micros
    overlap_us: Micros
    receive_us: Micros
    unmask_us: Micros


class PhaseSummary(Struct, frozen=True, forbid_unknown_fields=True):
    """All steps of a phase.

    Attributes:
        wall_s: wall time of the steps.
        cpu_s: processor time of the TEE in these steps.
        tokens: number of tokens computed.
        kinds_s: seconds by kind of operation, as in `generate --json`. For operations on workers,
            everything from the request to the answer counts.
        stages_s: sums over the calls; "compute" is a part of "wait".
    """

    steps: Count
    tokens: Count
    wall_s: Seconds
    cpu_s: Seconds
    calls: Count
    kinds_s: Annotated[dict[Name, Seconds], Meta(max_length=16)]
    stages_s: dict[Stage, Seconds]


class Summary(Line, frozen=True, tag="summary"):
    """The whole run.

    Attributes:
        dropped: lines that could not be written.
    """

    prefill: PhaseSummary
    decode: PhaseSummary
    calls: Count
    dropped: Count
