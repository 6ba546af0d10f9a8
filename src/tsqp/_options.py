"""What a user asked for, checked once: which modes exist and what goes together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tsqp.algebra.params import FIELDS, Field
from tsqp.errors import UsageError
from tsqp.wire.endpoint import Endpoint, parse_endpoint

PRIVACY_MODES = ("pad", "open", "tee")


@dataclass(frozen=True, slots=True)
class Options:
    """How a model is to be run.

    Attributes:
        endpoints: of the workers; none for `tee`.
        field: of the private modes and of fixed point.
        fixed_point: compute in `tee` what the private modes compute.
        pad_memory: bytes for pads, or None for a share of what is free.
        threads: for computing, or None for torch's choice.
        prefill_chunk: most prompt tokens in one step.
        timeout: seconds that a worker may take for one call.
        shm: share memory with workers on this machine.
        lanes: parts of a batch that take turns.
    """

    privacy: str
    endpoints: tuple[Endpoint, ...]
    field: Field
    fixed_point: bool
    pad_memory: int | None
    threads: int | None
    prefill_chunk: int
    timeout: float
    shm: bool
    lanes: int

    @property
    def masked(self) -> bool:
        """Whether linear layers are computed on integers."""
        return self.fixed_point or self.privacy == "pad"


def check_options(
    *,
    privacy: str,
    worker: str | Sequence[str] | None,
    attention: str,
    field: str,
    fixed_point: bool,
    pad_memory: int | None,
    threads: int | None,
    prefill_chunk: int,
    timeout: float,
    shm: bool,
    insecure: bool,
    lanes: int,
) -> Options:
    """The options, or UsageError with the one that is wrong."""
    if privacy not in PRIVACY_MODES:
        raise UsageError(f"There is no privacy mode {privacy!r}; choose {_or(PRIVACY_MODES)}.")
    if attention != "tee":
        raise UsageError(f"There is no attention mode {attention!r}; choose tee.")
    if field not in FIELDS:
        raise UsageError(f"There is no field {field!r}; choose {_or(tuple(FIELDS))}.")
    if fixed_point and privacy != "tee":
        raise UsageError("--fixed-point goes with --privacy tee; the private modes always use it.")
    for name, number in (
        ("prefill_chunk", prefill_chunk),
        ("lanes", lanes),
        ("threads", 1 if threads is None else threads),
    ):
        if number < 1:
            raise UsageError(f"{name} is {number}; it must be 1 or more.")
    if pad_memory is not None and pad_memory < 0:
        raise UsageError(f"pad_memory is {pad_memory}; it must be 0 or more bytes.")
    if not 0 < timeout < math.inf:
        raise UsageError(f"timeout is {timeout}; it must be a number of seconds above 0.")
    workers = [worker] if isinstance(worker, str) else list(worker or [])
    return Options(
        privacy=privacy,
        endpoints=_endpoints(privacy, workers, insecure),
        field=FIELDS[field],
        fixed_point=fixed_point,
        pad_memory=pad_memory,
        threads=threads,
        prefill_chunk=prefill_chunk,
        timeout=timeout,
        shm=shm,
        lanes=lanes,
    )


def _endpoints(privacy: str, workers: list[str], insecure: bool) -> tuple[Endpoint, ...]:
    if privacy == "tee":
        if workers:
            raise UsageError("--privacy tee takes no --worker; leave it out, or choose pad.")
        return ()
    if len(workers) != 1:
        raise UsageError(
            f"--privacy {privacy} needs one --worker, not {len(workers)}; "
            "name the endpoint of a running `tsqp worker`, or `local`."
        )
    endpoint = parse_endpoint(workers[0])
    if privacy == "open" and not endpoint.is_loopback and not insecure:
        raise UsageError(
            f"The link to {endpoint} is not encrypted, and whoever it passes can read and change "
            "what crosses; use a worker on this machine, or pass --insecure."
        )
    return (endpoint,)


def _or(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
