"""Sessions with workers: reaching one, starting one, or running one in this process."""

import logging
import secrets
from collections.abc import Sequence
from pathlib import Path

import torch

from tsqp.checkpoint.checkpoint import Checkpoint
from tsqp.gpu.backends.cpu import CpuBackend
from tsqp.gpu.worker import OPEN_ABILITIES, PRIVATE_ABILITIES, Worker
from tsqp.gpu.worker_weights import load_integers, load_weights
from tsqp.model.macs import dearest_row_macs, widest_group_macs
from tsqp.model.shard import WHOLE, Shard
from tsqp.runtime.links import Link
from tsqp.runtime.local_worker import LocalWorker
from tsqp.wire.call_limit import check_row_fits
from tsqp.wire.channel import Channel, InprocChannel
from tsqp.wire.client import RemoteChannel, check_reachable
from tsqp.wire.endpoint import parse_endpoint
from tsqp.wire.messages import Hello
from tsqp.wire.query_worker import ask_what_is_served
from tsqp.wire.tensors import WEIGHTS_DTYPES

log = logging.getLogger("tsqp")


class WorkerProcess:
    """The worker behind one link, from the first look to the session; it may be in this process.

    The steps are separate so that this process can load its weights while a local worker loads its
    own.
    """

    def __init__(
        self,
        link: Link,
        model: str,
        dtype: torch.dtype,
        threads: int | None = None,
        device: str = "auto",
        model_key_file: str | Path | None = None,
    ) -> None:
        """Does nothing yet.

        Args:
            dtype: dtype of the weights that the session needs; int8 for the private modes.
            threads, device, model_key_file: for a local worker.
        """
        self._link = link
        self._dtype = dtype
        self._local: LocalWorker | None = None
        self._inproc: Worker | None = None
        self.channel: Channel | None = None
        arguments = [model, "--serve", "private"]
        if dtype != torch.int8:
            arguments = [model, "--serve", "open", "--dtype", WEIGHTS_DTYPES[dtype]]
        arguments += [] if threads is None else ["--threads", str(threads)]
        if model_key_file is not None:
            arguments += ["--model-key-file", str(model_key_file)]
        if link.shm_place is not None:
            arguments += ["--shm-name", str(link.shm_place)]
        # Nobody else has a session there, so this one may have all memory for keys and values.
        self._arguments = [*arguments, "--device", device, "--max-sessions", "1"]

    @property
    def link(self) -> Link:
        """The link to it."""
        return self._link

    @property
    def endpoint(self) -> str:
        """The endpoint as given."""
        return str(self._link.endpoint)

    def start(self, *, look_first: bool = False) -> None:
        """Start a local worker unless it runs.

        Args:
            look_first: find out whether another worker is there, before weights are loaded in vain.
                Otherwise `connect` finds it out.

        Raises:
            WorkerUnavailable: nobody serves the endpoint.
            HandshakeError: the worker has another key.
        """
        link = self._link
        if link.endpoint.scheme == "local" and self._local is None:
            log.info("starting a worker on this machine, in the same trust domain")
            self._local = LocalWorker(self._arguments)
        if link.endpoint.scheme not in ("local", "inproc") and look_first:
            check_reachable(link.endpoint, link.key)

    def held_shard(self) -> Shard:
        """Ask the worker which part of the model it holds. The answer may be a lie.

        Raises:
            WorkerError: nobody answers, or the worker does not serve this kind of weights.
        """
        link = self._link
        if link.endpoint.scheme in ("local", "inproc"):
            return WHOLE
        return ask_what_is_served(link.endpoint, link.key, WEIGHTS_DTYPES[self._dtype]).shard

    def connect(
        self,
        checkpoint: Checkpoint,
        digest: str,
        shm_bytes: int,
        no_shm_reason: str,
        abilities: Sequence[str] = (),
        shard_digests: Sequence[str] = (),
    ) -> Channel:
        """Shake hands. Starts a local worker unless it runs.

        Args:
            digest: digest of the weights, computed by this process from its own copy.
            shm_bytes: shared memory wanted, 0 for none.
            no_shm_reason: the reason, if shm_bytes is 0.
            abilities: abilities that this session needs, besides those that every session needs.
            shard_digests: the digest of each shard, in their order, if the worker must hold one.

        Raises:
            WorkerError: the worker is gone, holds something else, or does too little in one call.
        """
        private = self._dtype == torch.int8
        hello = Hello(
            nonce=secrets.token_bytes(32),
            weights_digest=digest,
            dtype=WEIGHTS_DTYPES[self._dtype],
            abilities=(*(PRIVATE_ABILITIES if private else OPEN_ABILITIES), *abilities),
            shm_bytes=shm_bytes,
            fixed_shm=self._link.shm_place is not None,
            shard_digests=tuple(shard_digests),
        )
        endpoint = self._link.endpoint
        if endpoint.scheme == "inproc":
            if self._inproc is None:
                self._inproc = self._inproc_worker(checkpoint)
            self.channel = InprocChannel(self._inproc, hello)
            return self.channel
        self.start()
        if self._local is not None:
            self._local.await_ready()
            endpoint = parse_endpoint(self._local.endpoint)
        self.channel = channel = RemoteChannel(
            endpoint,
            hello,
            worker_key=self._link.key,
            shm_path=None if self._link.shm_place is None else self._link.shm_place.path,
            no_shm_reason=no_shm_reason,
        )
        if private or shard_digests:
            shard = Shard(channel.welcome.shard, channel.welcome.shards)
            row_macs = widest_group_macs(checkpoint.config, shard)
        else:
            row_macs = dearest_row_macs(checkpoint.config)
        check_row_fits(row_macs, channel.welcome.max_call_macs, channel.endpoint)
        name = f"{endpoint} (encrypted link)" if self._link.key else endpoint
        log.info("worker at %s: transport %s (%s)", name, channel.transport, channel.reason)
        return channel

    def close(self) -> None:
        """End the session, and a local worker; safe to call twice."""
        try:
            if self.channel is not None:
                self.channel.close()
        finally:
            if self._local is not None:
                self._local.close()
                self._local = None

    def _inproc_worker(self, checkpoint: Checkpoint) -> Worker:
        cpu = CpuBackend()
        if self._dtype == torch.int8:
            return Worker(None, load_integers(checkpoint, cpu))
        return Worker(load_weights(checkpoint, self._dtype, cpu))
