"""What a user asked for, checked once: which modes exist and what goes together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tsqp.algebra.params import FIELDS, Field
from tsqp.checkpoint.model_digest import check_digest
from tsqp.errors import UsageError
from tsqp.runtime.links import Link, check_links
from tsqp.tee.values import as_integer, as_number

PRIVACY_MODES = ("pad", "shares", "open", "tee")
ATTENTION_SIDES = ("tee", "gpu")
FUSIONS = ("none", "layer")


@dataclass(frozen=True, slots=True)
class Options:
    """How a model is to be run.

    Attributes:
        privacy: one of PRIVACY_MODES.
        links: to the workers; none for `tee`.
        gpu_attention: the worker of `open` keeps keys and values, and computes Q·Kᵀ and P·V.
        fuse_layers: the worker of `open` runs whole layers.
        field: of the private modes and of fixed point.
        fixed_point: compute in `tee` what the private modes compute.
        pad_memory: bytes for pads, or None for a share of what is free.
        threads: for computing, or None for torch's choice.
        device: of a local worker.
        prefill_chunk: most prompt tokens in one step.
        timeout: seconds that a worker may take for one call.
        shm: share memory with workers on this machine.
        insecure_same_host: let the workers of `shares` be on one host.
        lanes: parts of a batch that take turns.
        expect_model: the digest that the model must have, or None for any.
    """

    privacy: str
    links: tuple[Link, ...]
    gpu_attention: bool
    fuse_layers: bool
    field: Field
    fixed_point: bool
    pad_memory: int | None
    threads: int | None
    device: str
    prefill_chunk: int
    timeout: float
    shm: bool
    insecure_same_host: bool
    lanes: int
    expect_model: str | None

    @property
    def masked(self) -> bool:
        """Whether linear layers are computed on integers."""
        return self.fixed_point or self.privacy in ("pad", "shares")

    @property
    def no_shm_reason(self) -> str:
        """Why no memory is shared with the workers; empty where it may be."""
        if not self.shm:
            return "--no-shm was given"
        if self.privacy == "shares" and not self.insecure_same_host:
            return "shares travel on encrypted links"
        return ""


def check_options(
    *,
    privacy: str,
    worker: str | Sequence[str] | None,
    worker_key: str | Sequence[str] | None,
    attention: str | None,
    fuse: str,
    field: str,
    fixed_point: bool,
    pad_memory: int | None,
    threads: int | None,
    device: str,
    prefill_chunk: int,
    timeout: float,
    shm: bool,
    insecure: bool,
    insecure_same_host: bool,
    lanes: int,
    expect_model: str | None = None,
) -> Options:
    """The options, or UsageError with the one that is wrong."""
    if privacy not in PRIVACY_MODES:
        raise UsageError(f"There is no such privacy mode; choose {_or(PRIVACY_MODES)}.")
    _check_split(privacy, attention, fuse)
    if field not in FIELDS:
        raise UsageError(f"There is no such field; choose {_or(tuple(FIELDS))}.")
    if fixed_point and privacy != "tee":
        raise UsageError("--fixed-point goes with --privacy tee; the private modes always use it.")
    prefill_chunk = _integer("prefill_chunk", prefill_chunk, least=1)
    lanes = _integer("lanes", lanes, least=1)
    if threads is not None:
        threads = _integer("threads", threads, least=1)
    if pad_memory is not None:
        pad_memory = _integer("pad_memory", pad_memory, least=0, what="a number of bytes")
    seconds = as_number(timeout)
    if seconds is None or not 0 < seconds < math.inf:
        raise UsageError(f"timeout is {_number(timeout)}; it must be a number of seconds above 0.")
    links = check_links(
        privacy,
        _several(worker),
        _several(worker_key),
        insecure=insecure,
        insecure_same_host=insecure_same_host,
    )
    if device != "auto" and not any(link.endpoint.scheme == "local" for link in links):
        raise UsageError(
            "--device is where a worker that --worker local starts computes; give it to "
            "`tsqp worker` instead."
        )
    return Options(
        privacy=privacy,
        links=links,
        gpu_attention=attention == "gpu",
        fuse_layers=fuse == "layer",
        field=FIELDS[field],
        fixed_point=fixed_point,
        pad_memory=pad_memory,
        threads=threads,
        device=device,
        prefill_chunk=prefill_chunk,
        timeout=seconds,
        shm=shm,
        insecure_same_host=insecure_same_host,
        lanes=lanes,
        expect_model=None if expect_model is None else check_digest(expect_model),
    )


def _check_split(privacy: str, attention: str | None, fuse: str) -> None:
    if attention is not None and attention not in ATTENTION_SIDES:
        raise UsageError(f"There is no such attention mode; choose {_or(ATTENTION_SIDES)}.")
    if fuse not in FUSIONS:
        raise UsageError(f"There is no such fusion; choose {_or(FUSIONS)}.")
    if fuse == "layer" and attention == "tee":
        raise UsageError(
            "--fuse layer runs attention on the worker too, and --attention tee keeps it here; "
            "leave one of them out."
        )
    wanted = "--fuse layer" if fuse == "layer" else "--attention gpu"
    if privacy == "open" or (fuse == "none" and attention != "gpu"):
        return
    if privacy == "tee":
        raise UsageError(f"{wanted} needs a worker, and --privacy tee has none; leave it out.")
    why = (
        "whole layers need plain activations, which this mode hides from the worker"
        if fuse == "layer"
        else "a product of two secrets cannot be masked by pads, which are made for known weights"
    )
    raise UsageError(f"{wanted} goes with --privacy open alone, not with {privacy}: {why}.")


def _integer(name: str, value: object, least: int, what: str = "an integer") -> int:
    number = as_integer(value)
    if number is None or number < least:
        raise UsageError(f"{name} is {_number(value)}; it must be {what}, {least} or more.")
    return number


def _number(value: object) -> str:
    """A wrong number as a message repeats it; of anything else, only what it is."""
    return repr(value) if isinstance(value, int | float) else f"of type {type(value).__name__}"


def _several(given: str | Sequence[str] | None) -> Sequence[str]:
    return [given] if isinstance(given, str) else given or []


def _or(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
