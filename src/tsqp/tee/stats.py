"""Where the time of the TEE goes, by kind of operation."""

from time import perf_counter

KINDS = (
    "embedding",
    "layer",
    "linear",
    "attention",
    "softmax",
    "norm",
    "rope",
    "activation",
    "sampling",
)
# What the wire calls the kinds of operations that a worker may do.
OPERATIONS = {
    "embedding": ("embed",),
    "linear": ("linear", "product", "seed_product"),
    "attention": ("attention_scores", "weighted_values"),
    "layer": ("layer",),
}


class Timer:
    """Adds up the seconds spent inside its `with` blocks. Does not nest within itself."""

    __slots__ = ("_began", "calls", "seconds")

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls = 0
        self._began = 0.0

    def __enter__(self) -> None:
        self._began = perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += perf_counter() - self._began
        self.calls += 1


class Stats:
    """Seconds and calls by kind, and the timings of whole steps, since the last `reset`.

    The offload answers "embedding", "layer" (a whole layer), "linear" and "attention"; their times
    include waiting. The other kinds are computed in the TEE. "softmax" is counted separately only
    if it runs apart from the products of attention.

    Attributes:
        prefill_s: wall time of steps that contain prompt tokens.
        decode_s: wall time of all other steps.
        wait_s: the part of both in which every microbatch waited for a worker.
        prefill_cpu_s, decode_cpu_s: processor time of this process, all threads, in the steps of
            each kind. Pads made when needed count; pads made ahead do not, see `PadStats`.
        prefill_tokens: number of prompt tokens computed.
        reused_tokens: number of prompt tokens whose keys and values were reused from an earlier
            answer.
        decode_tokens: number of generated tokens computed in the steps of `decode_s`.
        preemptions: how often a sequence made way for another one because memory was short.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._timers = {kind: Timer() for kind in KINDS}
        self.prefill_s = 0.0
        self.decode_s = 0.0
        self.wait_s = 0.0
        self.prefill_cpu_s = 0.0
        self.decode_cpu_s = 0.0
        self.prefill_tokens = 0
        self.reused_tokens = 0
        self.decode_tokens = 0
        self.preemptions = 0

    def time(self, kind: str) -> Timer:
        """A timer for one of KINDS: `with stats.time("norm"): ...`."""
        return self._timers[kind]

    @property
    def tee_s(self) -> float:
        """Seconds of the steps in which the TEE was working, not waiting."""
        return self.prefill_s + self.decode_s - self.wait_s

    @property
    def tee_cpu_s(self) -> float:
        """Processor time of the steps."""
        return self.prefill_cpu_s + self.decode_cpu_s

    def timings(self) -> dict[str, float]:
        """The figures that `generate --json` prints, in seconds."""
        return {
            "prefill_s": self.prefill_s,
            "decode_s": self.decode_s,
            "tee_s": self.tee_s,
            "wait_s": self.wait_s,
            "tee_cpu_s": self.tee_cpu_s,
        }

    def as_dict(self) -> dict[str, object]:
        """All figures, ready for JSON, with only those kinds that ran."""
        return {
            **self.timings(),
            "prefill_tokens": self.prefill_tokens,
            "reused_tokens": self.reused_tokens,
            "decode_tokens": self.decode_tokens,
            "operations": {
                kind: {"seconds": timer.seconds, "calls": timer.calls}
                for kind, timer in self._timers.items()
                if timer.calls
            },
        }
