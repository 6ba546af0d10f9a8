"""A model that is loaded in this process, with its sessions: what `LLM` and `AsyncLLM` share."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from tsqp import __version__
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.checkpoint.gguf_file import GGUFCheckpoint
from tsqp.checkpoint.model_key import read_model_key
from tsqp.checkpoint.progress import Progress, silent
from tsqp.checkpoint.weights import parse_dtype
from tsqp.checkpoint.weights_digest import WeightsDigest
from tsqp.errors import TSQPError
from tsqp.nn.layers import Layers
from tsqp.runtime.build import Builder
from tsqp.runtime.failover import Alternative, Failover
from tsqp.runtime.links import Link
from tsqp.runtime.options import Options
from tsqp.runtime.replicas import Replicas
from tsqp.runtime.run_header import run_header
from tsqp.runtime.shard_layout import count_shards
from tsqp.runtime.worker_link import WorkerProcess
from tsqp.runtime.worker_sessions import WorkerSessions
from tsqp.tee.call_log import CallLog
from tsqp.tee.crypto.pad_pool import PadPool
from tsqp.tee.decoder import Decoder
from tsqp.tee.engine.engine import Engine
from tsqp.tee.engine.observer import Observer
from tsqp.tee.offload.offload import Offload
from tsqp.tee.text.tokenizer import Tokenizer
from tsqp.tee.worker_view import WorkerView
from tsqp.wire.channel import Channel, Counters

log = logging.getLogger("tsqp")

Renew = Callable[[], Offload]  # begins new sessions with workers, or raises TSQPError


class LoadedModel:
    """The engine of one model, the sessions with its workers, and the call log.

    Attributes:
        options: as given, with the field that was chosen.
        tokenizer: of the model.
        config: of the model.
        dtype: the floating-point type of this side.
        model_digest: see `LLM.model_digest`.
        sessions: the present sessions with workers.
        failover: all workers, and which of them are used.
        engine: runs requests.
    """

    def __init__(
        self,
        model: str,
        options: Options,
        *,
        tokenizer: Tokenizer | None = None,
        on_load: Progress | None = None,
        at_end: Callable[[Callable[[], None]], None],
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        renew: Callable[[Renew], Offload] | None = None,
        worker_view: WorkerView | None = None,
    ) -> None:
        """Load what this side needs, and open a session with a worker, or with each of shares.

        Args:
            at_end: receives each function that has to be called at the end, the last one first,
                as soon as there is something to close: loading may be interrupted. A function may
                be called twice.
            max_model_len: a shorter maximum length of prompt and answer than the model's own.
            max_num_seqs: see `Scheduler`.
            renew: called instead of beginning new sessions after the end of others, with the
                function that begins them.
            worker_view: samples what workers receive.

        Raises:
            UsageError: the call log exists, or the model's key cannot be read.
            ModelError: the checkpoint cannot be used, or is not the expected one.
            WorkerError: there is no worker that can be used.
        """
        self.options = options
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        key_file = options.model_key_file
        self._key = options.model_key if key_file is None else read_model_key(key_file)
        self.tokenizer = Tokenizer(model, key=self._key) if tokenizer is None else tokenizer
        self._at_end = at_end
        self._call_log = None if options.rpc_log is None else CallLog(Path(options.rpc_log))
        if self._call_log is not None:
            at_end(self._call_log.close)
        self._load(model, on_load or silent, max_model_len, max_num_seqs, renew, worker_view)
        if self._call_log is not None:
            self._begin_log(self._call_log, model)

    @property
    def workers(self) -> list[WorkerProcess]:
        return self.failover.workers

    @property
    def offload(self) -> Offload:
        return self.sessions.offload

    @property
    def pads(self) -> PadPool | None:
        return self.sessions.pads

    @property
    def channels(self) -> list[Channel]:
        return self.sessions.channels

    @property
    def rpc(self) -> Counters:
        """See `LLM.rpc`."""
        return self.failover.current.rpc

    def _load(
        self,
        model: str,
        progress: Progress,
        max_model_len: int | None,
        max_num_seqs: int,
        renew: Callable[[Renew], Offload] | None,
        worker_view: WorkerView | None,
    ) -> None:
        options, key_file = self.options, self.options.model_key_file
        if options.privacy == "open":
            log.warning("privacy open: the worker reads every prompt and every answer")
        if self._key is not None and options.privacy != "tee":
            log.warning(
                "privacy %s: workers hold the weights in plain, so encryption protects them in "
                "files only",
                options.privacy,
            )
        # One reading of each file: what the tokenizer uses is what the digest covers.
        checkpoint = open_checkpoint(model, self.tokenizer.files, self._key)
        try:
            if isinstance(checkpoint, GGUFCheckpoint):
                self.tokenizer.use_header(checkpoint.header)
            self.config = checkpoint.config
            self.dtype = parse_dtype(options.dtype, self.config)
            weights_dtype = torch.int8 if options.masked else self.dtype

            def process_of(link: Link) -> WorkerProcess:
                given = options.threads, options.device, key_file
                return WorkerProcess(link, model, weights_dtype, *given)

            workers = [process_of(link) for link in options.links]
            self.failover = self._arranged(workers, process_of)
            if self.workers or self.tokenizer.files is not None:
                self.tokenizer.preload()  # while the workers load, and before the digest is taken
            norms = WeightsDigest()  # read once: what is used is what is hashed
            layers = Layers(checkpoint, self.dtype, norms, compiled=options.masked)
            builder = Builder(options, checkpoint, self.dtype, norms, progress, worker_view)
            self.sessions = WorkerSessions(self.failover, builder.build(self.failover))
            self._at_end(self.offload.close)
            self.options = builder.options  # with the field that was chosen
            self.model_digest = builder.model_digest
            self._weights_digest = builder.weights_digest
            decoder = Decoder(
                checkpoint, self.dtype, layers, self.offload.placement, self.offload.most_scores
            )
        finally:
            checkpoint.close()
        if max_model_len is not None:
            shorter = min(max_model_len, self.config.max_positions)
            self.config = replace(self.config, max_positions=shorter)
        self.engine = Engine(
            decoder,
            self.offload,
            self.config,
            self.tokenizer,
            Observer(
                cpu_clock=self.sessions.cpu_s,
                call_log=self._call_log,
                on_chunks=None if worker_view is None else worker_view.begin_step,
            ),
            prefill_chunk=options.prefill_chunk,
            max_num_seqs=max_num_seqs,
            microbatches=options.microbatches,
            rebuild=partial(_rebuild, self.sessions, renew) if self.workers else None,
        )
        self._at_end(self.engine.close)

    def _arranged(
        self, workers: list[WorkerProcess], process_of: Callable[[Link], WorkerProcess]
    ) -> Failover:
        """Find a worker, and arrange which of them are used together."""
        options = self.options
        look_first = options.expect_model is None
        for process in workers:
            self._at_end(process.close)
        together = options.privacy == "shares" or not workers
        groups = [workers] if together else [[each] for each in workers]
        failover = Failover(list(map(Alternative, groups)))
        failover.attempt(lambda each: each.start(look_first=look_first))
        reached = sorted(workers, key=lambda each: each not in failover.current.workers)
        shards = count_shards(reached, options)
        if options.privacy == "pad" and (shards > 1 or options.workers_file is not None):
            replicas = Replicas(workers, shards, options, process_of)
            self._at_end(replicas.stop)
            return Failover([replicas])
        if shards > 1:
            failover = Failover([Alternative(workers)])
            failover.attempt(lambda each: each.start(look_first=look_first))
        return failover

    def _begin_log(self, call_log: CallLog, model: str) -> None:
        digest = self._weights_digest if self.channels else None
        transport = self.sessions.transport
        header = run_header(
            __version__, model, self.options, self.config, self.dtype, transport, digest
        )
        call_log.begin(header)
        self.sessions.record(call_log)


def _rebuild(
    sessions: WorkerSessions, renew: Callable[[Renew], Offload] | None, error: TSQPError
) -> Offload:
    """A new offload after sessions ended with this error; see `Engine`."""
    sessions.end(error)
    return sessions.renew() if renew is None else renew(sessions.renew)
