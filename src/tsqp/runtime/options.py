"""The options of a run, declared once for Python, for every command, and later for a server.

A field of `Options` with an `Option` in its annotation is also a command-line option
(`tsqp.cli.with_options`), an environment variable and a setting. Its help text is also its
documentation in Python.
"""

import dataclasses
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tsqp.errors import UsageError
from tsqp.tee.values import as_integer, as_number

if TYPE_CHECKING:
    from tsqp.algebra.params import Field
    from tsqp.checkpoint.model_key import ModelKey
    from tsqp.runtime.links import Link

PRIVACY_MODES = ("pad", "shares", "open", "tee")
ATTENTION_SIDES = ("tee", "gpu")
FUSIONS = ("none", "layer")
WORKER_HINTS = "worker"  # value of `hints`: the worker makes them


@dataclass(frozen=True, slots=True)
class Option:
    """How a field of `Options` appears on the command line.

    Attributes:
        help: one or two sentences, for `--help` and for readers of the Python code.
        type: the type on the command line.
        env: environment variables. The first one that is set is used.
        flag: the name of a switch that turns the field off. Without it, the option has the field's
            name and sets the field.
        unit: the unit of a number on the command line, and how many of Python's units it holds.
        least: the smallest allowed number.
        metavar: the placeholder for the value in `--help`.
    """

    help: str
    type: Any
    env: tuple[str, ...] = ()
    flag: str = ""
    unit: tuple[str, int] = ("", 1)
    least: float | None = None
    metavar: str | None = None


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a model is run. Every field is a keyword of `LLM`.

    Raises:
        UsageError: a value is unknown, or values contradict each other.

    Attributes:
        model_key: the key of an encrypted model that is in memory, instead of `model_key_file`.
        links: the links to the workers, made from `worker` and `worker_key`. Empty for `tee`.
    """

    privacy: Annotated[
        str,
        Option(
            "pad: a worker sees only values that look random, and wrong answers are detected. "
            "shares: several workers at once. Each sees only random values, but all of them "
            "together could read everything. open: a worker, which can read everything. tee: no "
            "worker.",
            str,
            env=("TSQP_PRIVACY",),
        ),
    ] = "pad"
    worker: Annotated[
        str | Sequence[str] | None,
        Option(
            "Endpoint of the worker: ipc:///PATH, tcp://HOST:PORT, or local, which starts a worker "
            "on this machine. Repeat the option for several workers. With pad and open, one of "
            "them is used at a time, and another takes over if it fails. With shares, and if each "
            "holds a shard of the model, all of them are used.",
            list[str] | None,
            env=("TSQP_WORKER", "LLAMA_IPC_PATH"),
        ),
    ] = None
    worker_key: Annotated[
        str | Sequence[str] | None,
        Option(
            "Public key of the worker, or the file that holds it. Encrypts the link. For several "
            "workers, repeat the option in the order of --worker.",
            list[str] | None,
            env=("TSQP_WORKER_KEY",),
        ),
    ] = None
    workers_file: Annotated[
        str | Path | None,
        Option(
            "File with the workers, one a line: NAME ENDPOINT [KEY], instead of --worker. With "
            "pad, it is read again when it changes, and workers are added and removed.",
            Path | None,
            env=("TSQP_WORKERS_FILE",),
        ),
    ] = None
    attention: Annotated[
        str | None,
        Option(
            "With --privacy open: where Q·Kᵀ and P·V are computed, tee (the default) or gpu. With "
            "gpu, the worker keeps the keys and values, and the softmax stays in the TEE.",
            str | None,
            env=("TSQP_ATTENTION",),
        ),
    ] = None
    fuse: Annotated[
        str,
        Option(
            "With --privacy open: none, or layer. With layer, the worker runs whole layers, with "
            "one call for each.",
            str,
            env=("TSQP_FUSE",),
        ),
    ] = "none"
    field: Annotated[
        str,
        Option(
            "Residues of the private modes: wide (4 bytes), compact (3 bytes), or lattice (6 "
            "bytes; not for shares): cheaper for the TEE in wide layers; its security assumes "
            "RLWE. auto measures whether wide or lattice costs less with --privacy pad, and is "
            "wide with the others (not in `tsqp bench`).",
            str,
            env=("TSQP_FIELD",),
        ),
    ] = "wide"
    fixed_point: Annotated[
        bool,
        Option("With --privacy tee: compute with integers, exactly as the private modes do.", bool),
    ] = False
    pad_memory: Annotated[
        int | None,
        Option(
            "Memory for pads that are made ahead of time, in GiB (in Python, in bytes). 0 makes no "
            "pads ahead. The default is a quarter of the free memory: at most 2 GiB, and with "
            "lattice masks at most what 4096 tokens take.",
            float | None,
            env=("TSQP_PAD_MEMORY",),
            unit=("GiB", 2**30),
            least=0,
        ),
    ] = None
    kv_memory: Annotated[
        int | None,
        Option(
            "Maximum memory for keys and values on the trusted side, in GiB (in Python, in bytes). "
            "The default is half of the memory that is free after the weights are loaded.",
            float | None,
            env=("TSQP_KV_MEMORY",),
            unit=("GiB", 2**30),
            least=0,
        ),
    ] = None
    dtype: Annotated[
        str,
        Option(
            "Floating-point type: float32, float16, bfloat16, or auto, which uses the checkpoint's "
            "own.",
            str,
            env=("TSQP_DTYPE", "LLAMA_DTYPE"),
        ),
    ] = "auto"
    threads: Annotated[
        int | None,
        Option(
            "Number of compute threads, in this process and in a local worker.",
            int | None,
            env=("TSQP_THREADS",),
            least=1,
        ),
    ] = None
    device: Annotated[
        str,
        Option(
            "Device of the worker: cpu, cuda, cuda:NUMBER, or auto, which uses CUDA if it is "
            "available.",
            str,
            env=("TSQP_DEVICE", "LLAMA_GPU_DEVICE"),
        ),
    ] = "auto"
    prefill_chunk: Annotated[
        int,
        Option(
            "Maximum number of prompt tokens in one step.",
            int,
            env=("TSQP_PREFILL_CHUNK",),
            least=1,
        ),
    ] = 512
    timeout: Annotated[
        float,
        Option(
            "Maximum time of one call to a worker, in seconds.",
            float,
            env=("TSQP_TIMEOUT",),
            least=0.1,
        ),
    ] = 8.0
    shm: Annotated[
        bool,
        Option("Send tensors through the socket instead of shared memory.", bool, flag="no_shm"),
    ] = True
    shm_name: Annotated[
        str | None,
        Option(
            "Share memory at this place only: a name in /dev/shm that begins with tsqp, or the "
            "path of a file or device (ivshmem). Give it to both sides.",
            str | None,
            metavar="NAME|PATH",
        ),
    ] = None
    insecure: Annotated[bool, Option("Allow an unencrypted link to another machine.", bool)] = False
    insecure_same_host: Annotated[
        bool,
        Option(
            "For testing only: allow the workers of shares to run on one host, where they could "
            "add up the shares that they receive.",
            bool,
        ),
    ] = False
    microbatches: int = 1
    expect_model: Annotated[
        str | None,
        Option(
            "Accept only the model with this digest. `tsqp digest` prints the digest of a model.",
            str | None,
            env=("TSQP_EXPECT_MODEL",),
            metavar="DIGEST",
        ),
    ] = None
    model_key_file: Annotated[
        str | Path | None,
        Option(
            "File with the key of an encrypted model. `tsqp encrypt` encrypts models.",
            Path | None,
            env=("TSQP_MODEL_KEY_FILE",),
        ),
    ] = None
    model_key: "ModelKey | None" = dataclasses.field(default=None, repr=False)
    hints: Annotated[
        str | Path | None,
        Option(
            "Where the hints of field lattice come from: a file that `tsqp prepare --hints` wrote, "
            "or `worker`, which lets the worker make them. Both are checked. By default, the TEE "
            "makes them, or reads them from the cache.",
            str | None,
            metavar="FILE|worker",
        ),
    ] = None
    rpc_log: Annotated[
        str | Path | None,
        Option("Write the timing of every call to this new file, for `tsqp report`.", Path | None),
    ] = None
    links: "tuple[Link, ...]" = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        # torch takes a second to import; `tsqp --help` should not.
        from tsqp.algebra.params import FIELDS, LATTICE
        from tsqp.checkpoint.model_digest import check_digest
        from tsqp.runtime.links import check_links, check_shm_name

        if self.privacy not in PRIVACY_MODES:
            raise UsageError(f"There is no such privacy mode; choose {_or(PRIVACY_MODES)}.")
        _check_split(self.privacy, self.attention, self.fuse)
        if self.field not in ("auto", *FIELDS):
            raise UsageError(f"There is no such field; choose {_or(('auto', *FIELDS))}.")
        if self.field == LATTICE.name and self.privacy == "shares":
            raise UsageError(
                "--field lattice is for --privacy pad or --fixed-point; shares need no masks, so "
                "choose wide or compact."
            )
        may_be_lattice = self.lattice or (self.privacy == "pad" and self.field == "auto")
        if self.hints is not None and not may_be_lattice:
            raise UsageError(
                "--hints is for --privacy pad with --field lattice or auto only; leave it out."
            )
        if self.fixed_point and self.privacy != "tee":
            raise UsageError(
                "--fixed-point is for --privacy tee only; the private modes always use it."
            )
        self._set(
            prefill_chunk=_integer("prefill_chunk", self.prefill_chunk, least=1),
            microbatches=_integer("microbatches", self.microbatches, least=1),
        )
        if self.threads is not None:
            self._set(threads=_integer("threads", self.threads, least=1))
        for name, memory in (("pad_memory", self.pad_memory), ("kv_memory", self.kv_memory)):
            if memory is not None:
                self._set(**{name: _integer(name, memory, least=0, what="a number of bytes")})
        seconds = as_number(self.timeout)
        if seconds is None or not 0 < seconds < math.inf:
            raise UsageError(
                f"timeout is {_number(self.timeout)}; it must be a number of seconds above 0."
            )
        self._set(timeout=seconds)
        workers, keys = self._workers()
        links = check_links(
            self.privacy,
            workers,
            keys,
            insecure=self.insecure,
            insecure_same_host=self.insecure_same_host,
            shm_place=check_shm_name(self.shm_name, self.privacy, self.shm),
        )
        self._set(links=links)
        if self.kv_memory is not None and (self.gpu_attention or self.fuse_layers):
            raise UsageError(
                "--kv-memory is for keys and values on the trusted side, but with --attention gpu "
                "and --fuse layer the worker keeps them; leave it out."
            )
        if self.device != "auto" and not any(link.endpoint.scheme == "local" for link in links):
            raise UsageError(
                "--device is for a worker that --worker local starts; give it to `tsqp worker` "
                "instead."
            )
        if self.model_key is not None and self.model_key_file is not None:
            raise UsageError("Give the key of the model in memory or as a file, but not both.")
        if self.model_key is not None and any(e.endpoint.scheme == "local" for e in links):
            raise UsageError(
                "A worker that --worker local starts reads the model's key from a file: use "
                "--model-key-file, or another worker."
            )
        if self.expect_model is not None:
            self._set(expect_model=check_digest(self.expect_model))

    def _workers(self) -> tuple[Sequence[str], Sequence[str | None]]:
        """Endpoints and keys of the workers, as given or from the file."""
        from tsqp.runtime.workers_file import read_workers_file

        given, keys = _several(self.worker), _several(self.worker_key)
        if self.workers_file is None:
            return given, keys
        if given or keys:
            raise UsageError(
                "--workers-file names the workers and their keys; leave --worker and --worker-key "
                "out."
            )
        if self.privacy == "tee":
            raise UsageError("--privacy tee has no workers; leave --workers-file out.")
        if self.hints == WORKER_HINTS or self.shm_name is not None:
            raise UsageError(
                "--hints worker and --shm-name are for one worker that stays; leave them or "
                "--workers-file out."
            )
        entries = read_workers_file(Path(self.workers_file))
        return [each.endpoint for each in entries], [each.key for each in entries]

    @property
    def residues(self) -> "Field":
        """The parameters of `field`; those of wide while `auto` has not been decided."""
        from tsqp.algebra.params import FIELDS, WIDE

        return WIDE if self.field == "auto" else FIELDS[self.field]  # type: ignore[index]  # checked

    @property
    def lattice(self) -> bool:
        """Whether rows are masked by lattice masks."""
        return self.privacy == "pad" and self.field == "lattice"

    @property
    def gpu_attention(self) -> bool:
        """Whether the worker of `open` keeps keys and values, and computes Q·Kᵀ and P·V."""
        return self.attention == "gpu"

    @property
    def fuse_layers(self) -> bool:
        """Whether the worker of `open` runs whole layers."""
        return self.fuse == "layer"

    @property
    def masked(self) -> bool:
        """Whether linear layers are computed on integers."""
        return self.fixed_point or self.privacy in ("pad", "shares")

    @property
    def no_shm_reason(self) -> str:
        """Why no memory is shared with the workers; empty if it is."""
        if not self.shm:
            return "--no-shm was given"
        if self.privacy == "shares" and not self.insecure_same_host:
            return "shares travel on encrypted links"
        return ""

    def _set(self, **values: object) -> None:
        """Replace given values by checked ones; used only while the object is being made."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


def command_options() -> dict[str, tuple[Option, Any]]:
    """The fields that commands offer, with their defaults, in order."""
    found = {}
    for each in dataclasses.fields(Options):
        for extra in getattr(each.type, "__metadata__", ()):
            if isinstance(extra, Option):
                found[each.name] = (extra, each.default)
    return found


def show_options(kind: type) -> None:
    """Let `help` and editors show the fields as keywords of a class that takes them."""
    parameters = inspect.signature(Options).parameters.values()
    fields = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
    own = inspect.signature(kind.__init__)  # type: ignore[misc]  # of a class, not an instance
    named = [each for each in own.parameters.values() if each.kind != each.VAR_KEYWORD][1:]
    kind.__signature__ = own.replace(parameters=[*named, *fields])  # type: ignore[attr-defined]


def _check_split(privacy: str, attention: str | None, fuse: str) -> None:
    if attention is not None and attention not in ATTENTION_SIDES:
        raise UsageError(f"There is no such attention mode; choose {_or(ATTENTION_SIDES)}.")
    if fuse not in FUSIONS:
        raise UsageError(f"There is no such fusion; choose {_or(FUSIONS)}.")
    if fuse == "layer" and attention == "tee":
        raise UsageError(
            "--fuse layer runs attention on the worker too, but --attention tee keeps it in the "
            "TEE; leave one of them out."
        )
    wanted = "--fuse layer" if fuse == "layer" else "--attention gpu"
    if privacy == "open" or (fuse == "none" and attention != "gpu"):
        return
    if privacy == "tee":
        raise UsageError(f"{wanted} needs a worker, but --privacy tee has none; leave it out.")
    why = (
        "whole layers need plain activations, which this mode hides from the worker"
        if fuse == "layer"
        else "pads are made for known weights, so they cannot mask a product of two secrets"
    )
    raise UsageError(f"{wanted} works only with --privacy open, not with {privacy}: {why}.")


def _integer(name: str, value: object, least: int, what: str = "an integer") -> int:
    number = as_integer(value)
    if number is None or number < least:
        raise UsageError(f"{name} is {_number(value)}; it must be {what}, {least} or more.")
    return number


def _number(value: object) -> str:
    """A wrong number as shown in a message; of any other value, only its type."""
    return repr(value) if isinstance(value, int | float) else f"of type {type(value).__name__}"


def _several(given: str | Sequence[str] | None) -> Sequence[str]:
    return [given] if isinstance(given, str) else given or []


def _or(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
