"""`tsqp worker`: loads a model, listens, serves, and cleans up."""

import logging
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch

from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.checkpoint.footprint import worker_bytes
from tsqp.checkpoint.model_key import ModelKey, read_model_key
from tsqp.checkpoint.prepared import SUFFIX
from tsqp.checkpoint.progress import Progress, Rate, part_of, silent
from tsqp.checkpoint.quantize import integer_bytes
from tsqp.checkpoint.weights import parse_dtype
from tsqp.errors import UsageError
from tsqp.gpu.backends import backend_on, parse_device
from tsqp.gpu.backends.backend import Backend
from tsqp.gpu.ready import READY
from tsqp.gpu.record import Recorder
from tsqp.gpu.worker import Worker
from tsqp.gpu.worker_weights import (
    IntegerModel,
    Weights,
    load_integers,
    load_shard,
    load_weights,
    read_prepared,
)
from tsqp.model.config import linear_groups
from tsqp.model.shard import WHOLE, Shard, check_divisible, parse_shard
from tsqp.wire.endpoint import Endpoint, parse_endpoint
from tsqp.wire.fixed_segment import parse_place
from tsqp.wire.keys import read_secret_key
from tsqp.wire.quotas import DEFAULT_QUOTAS, Quotas
from tsqp.wire.server import Server
from tsqp.wire.zmq import public_key_of

log = logging.getLogger("tsqp")

SERVE = ("all", "private", "open")


def serve(
    model: str,
    listen: str,
    *,
    device: str = "auto",
    serve: str = "all",
    dtype: str = "auto",
    shard: str | None = None,
    threads: int | None = None,
    quotas: Quotas = DEFAULT_QUOTAS,
    shm_name: str | None = None,
    keyfile: Path | None = None,
    model_key_file: Path | None = None,
    insecure: bool = False,
    record: Path | None = None,
    supervised: bool = False,
    progress: Progress = silent,
) -> None:
    """Load a model's linear weights and serve them until SIGINT or SIGTERM.

    Args:
        model: a Hugging Face directory, a .gguf file, "random:NAME[:SEED]", "demo", or a file
            that `tsqp prepare` wrote, which serves private modes only.
        listen: ipc:///PATH or tcp://HOST:PORT.
        device: "cpu", "cuda", "cuda:NUMBER", or "auto": CUDA if torch sees a device.
        serve: "private" holds integer weights, "open" floating-point ones, "all" both.
        dtype: dtype of the floating-point weights.
        shard: "NUMBER/COUNT", the part of every group of linear layers to load; None for all.
        quotas: limits for clients.
        shm_name: where memory is shared with clients that map it at a fixed place only.
        keyfile: the file with the secret key made by `tsqp keygen`. With it, the worker accepts
            only encrypted links.
        model_key_file: the file with the key of an encrypted model.
        insecure: listen on an address that other machines can reach, without encryption.
        record: a new or empty folder for everything that arrives; see `tsqp.gpu.record`.
        supervised: print "ready ADDRESS" on standard output, and stop at the end of standard input.
        progress: called while weights are loaded, with the bytes done and their total.

    Raises:
        UsageError: a listening address that is not allowed, no such device or shard, or no key in
            a file.
        ModelError: the checkpoint cannot be used.
        WorkerUnavailable: the endpoint cannot be served.
        IntegrityError: the device multiplies wrongly.
        RecordingError: the recording cannot be written, now or later.
    """
    endpoint = parse_endpoint(listen)
    place = None if shm_name is None else parse_place(shm_name)
    _check_listening(endpoint, insecure or keyfile is not None)
    secret_key = None if keyfile is None else read_secret_key(keyfile)
    model_key = None if model_key_file is None else read_model_key(model_key_file)
    where = parse_device(device)
    recorder = None if record is None else Recorder(record)
    if threads is not None:
        torch.set_num_threads(threads)
    stop = threading.Event()
    _stop_on_signals(stop)
    if supervised:
        threading.Thread(target=stop_at_end_of_input, args=(stop,), daemon=True).start()
    loading = Rate(_until(stop, progress))
    shares = 1 if quotas.max_sessions == 1 else 2
    part = WHOLE if shard is None else parse_shard(shard)
    load = _prepare_to_load(
        model, model_key, serve, dtype, part, backend_on(where), loading, shares
    )
    # Listening comes before loading, which may be long: an address in use shows at once.
    server = Server(endpoint, secret_key=secret_key, quotas=quotas, shm_place=place, log=log.info)
    try:
        if secret_key is not None:
            log.info("accepting only encrypted links; public key: %s", public_key_of(secret_key))
        log.info("loading %s …", model)
        worker = load()
        worker.check_device()
        log.info("%s", loading.describe(worker.layers))
        log.info("serving %s on %s at %s: %s", model, where, server.address, worker)
        if supervised:
            print(READY, server.address, flush=True)
        if recorder is not None:
            log.info("recording everything that arrives in %s", record)
        server.serve(worker, stop.is_set, None if recorder is None else recorder.of(worker))
    except _Stopped:
        pass
    finally:
        server.close()


def _prepare_to_load(
    model: str,
    key: ModelKey | None,
    serve: str,
    dtype: str,
    shard: Shard,
    backend: Backend,
    progress: Progress,
    kv_shares: int,
) -> Callable[[], Worker]:
    """Check the arguments; returns a function that loads the weights."""
    if serve not in SERVE:
        raise UsageError(f"--serve does not take this; choose {', '.join(SERVE)}.")
    if model.endswith(SUFFIX):
        if serve == "open":
            raise UsageError(f"{model} holds only integer weights; leave --serve open out.")
        if key is not None:
            raise UsageError(f"{model} is not encrypted; leave --model-key-file out.")
        path = Path(model).expanduser()
        return lambda: Worker(None, read_prepared(path, backend, progress, shard))
    checkpoint = open_checkpoint(model, key=key)
    config = checkpoint.config
    check_divisible(linear_groups(config), shard.count)
    loaded_dtype = parse_dtype(dtype, config)

    def load() -> Worker:
        integers: IntegerModel | None = None
        weights: Weights | None = None
        required = worker_bytes(config, loaded_dtype, serve, shard)
        # For both, before either is loaded.
        backend.check_room(required, f"The weights of {checkpoint.name}")
        before = 0 if serve == "open" else integer_bytes(config, shard)
        if serve != "open":
            integers = load_integers(checkpoint, backend, part_of(progress, 0, required), shard)
        if serve != "private":
            then = part_of(progress, before, required)
            if shard.is_whole:
                weights = load_weights(checkpoint, loaded_dtype, backend, then)
            else:
                weights = load_shard(checkpoint, loaded_dtype, backend, shard, then)
        checkpoint.close()
        return Worker(weights, integers, kv_shares=kv_shares)

    return load


def _check_listening(endpoint: Endpoint, anywhere: bool) -> None:
    if endpoint.scheme not in ("ipc", "tcp"):
        raise UsageError(f"A worker listens on ipc:///PATH or tcp://HOST:PORT, not on {endpoint}.")
    if not endpoint.is_loopback and not anywhere:
        raise UsageError(
            f"Other machines can reach {endpoint}, and the link is not encrypted; pass --keyfile "
            "with a key of `tsqp keygen`, or listen on 127.0.0.1 or ipc, or pass --insecure."
        )


class _Stopped(Exception):
    """Raised by a signal during loading, to end it."""


def _until(stop: threading.Event, progress: Progress) -> Progress:
    def report(done: int, total: int) -> None:
        if stop.is_set():
            raise _Stopped
        progress(done, total)

    return report


def stop_at_end_of_input(stop: threading.Event) -> None:
    """Stop at the end of standard input, which ends with the parent process in any case."""
    sys.stdin.read()
    stop.set()


def _stop_on_signals(stop: threading.Event) -> None:
    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
