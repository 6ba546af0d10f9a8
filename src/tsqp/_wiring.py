"""The only place that joins the zones: builds a TEE side, a worker side, or both."""

import logging
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

import torch

from tsqp._local_worker import LocalWorker
from tsqp.errors import UsageError
from tsqp.gpu.weights import load_weights
from tsqp.gpu.worker import Worker
from tsqp.model.checkpoint import Checkpoint, open_checkpoint
from tsqp.model.config import LAYER_GROUPS, ModelConfig, parts
from tsqp.model.digest import weights_digest
from tsqp.model.weights import (
    check_memory,
    embedding_bytes,
    linear_bytes,
    parse_dtype,
    read_bias,
)
from tsqp.tee.decoder import Decoder
from tsqp.tee.engine import Engine
from tsqp.tee.offload.base import Offload
from tsqp.tee.offload.local import LocalOffload
from tsqp.tee.offload.open import OpenOffload
from tsqp.tee.sampling import Completion, SamplingParams
from tsqp.tee.stats import Stats
from tsqp.tee.tokenizer import Tokenizer
from tsqp.wire.channel import Channel, Counters, InprocChannel
from tsqp.wire.client import RemoteChannel, check_reachable
from tsqp.wire.endpoint import Endpoint, parse_endpoint
from tsqp.wire.messages import Hello
from tsqp.wire.tensors import DTYPE_NAMES

log = logging.getLogger("tsqp")

PRIVACY_MODES = ("tee", "open")
MIN_SHM = 2**20
MAX_SHM = 2**30
HEAD_ROWS = 8  # sequences whose logits travel in one call; more are split


class LLM:
    """A model that answers from this process, which is the trusted side.

    Usable as a context manager; `close` ends the session with the worker.
    """

    def __init__(
        self,
        model: str,
        *,
        privacy: str,
        worker: str | Sequence[str] | None = None,
        attention: str = "tee",
        dtype: str = "auto",
        threads: int | None = None,
        prefill_chunk: int = 512,
        timeout: float = 8.0,
        shm: bool = True,
        insecure: bool = False,
        lanes: int = 1,
    ) -> None:
        """Load what this side needs and open a session with the worker.

        Args:
            model: a Hugging Face directory, a .gguf file, "random:NAME[:SEED]", or "demo".
            privacy: "tee" (no worker) or "open" (the worker reads everything).
            worker: where the worker listens; "local" starts one as a child process.
            attention: where the attention products run; "tee".
            dtype: "float32", "float16", "bfloat16", or "auto", the checkpoint's own.
            threads: for computing, on this side and on a local worker; None leaves torch's choice.
            prefill_chunk: most prompt tokens in one step.
            timeout: seconds that the worker may take for one call.
            shm: share memory with a worker on the same machine.
            insecure: speak to a worker on another machine over a link that is not encrypted.
            lanes: parts of a batch that take turns, so that both sides work at once.

        Raises:
            UsageError: options that are unknown or contradict each other.
            ModelError: the checkpoint cannot be used.
            WorkerError: there is no worker, or it serves something else.
        """
        endpoint = _check_options(privacy, worker, attention, insecure)
        for name, number in (
            ("prefill_chunk", prefill_chunk),
            ("lanes", lanes),
            ("threads", 1 if threads is None else threads),
        ):
            if number < 1:
                raise UsageError(f"{name} is {number}; it must be 1 or more.")
        if not 0 < timeout < math.inf:
            raise UsageError(f"timeout is {timeout}; it must be a number of seconds above 0.")
        if threads is not None:
            torch.set_num_threads(threads)
        self.privacy = privacy
        self._channel: Channel | None = None
        self._local: LocalWorker | None = None
        self._offload: Offload | None = None
        try:
            self._tokenizer = Tokenizer(model)
            checkpoint = open_checkpoint(model)
            try:
                self.config = checkpoint.config
                self.dtype = parse_dtype(dtype, self.config)
                if endpoint is not None:
                    shm_bytes = _segment_bytes(self.config, self.dtype, prefill_chunk) if shm else 0
                    self._channel = self._connect(endpoint, model, checkpoint, shm_bytes, threads)
                self._offload = _offload(checkpoint, self.dtype, self._channel, timeout)
                decoder = Decoder(checkpoint, self.dtype)
            finally:
                checkpoint.close()
            self._engine = Engine(
                decoder,
                self._offload,
                self.config,
                self._tokenizer,
                prefill_chunk=prefill_chunk,
                lanes=lanes,
            )
        except BaseException:
            self.close()
            raise

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        sampling_params: SamplingParams | None = None,
        *,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Completion]:
        """Complete one or several prompts, all of them at once.

        Args:
            prompts: texts, or token ids.
            sampling_params: how to choose tokens; the same for all prompts.
            on_text: called with the number of the prompt and each new piece of its answer.

        Returns:
            one completion a prompt, in order.

        Raises:
            PromptError: a prompt is empty, or longer than the model's context.
            WorkerError: the worker failed; nothing is left running.
        """
        several = [prompts] if isinstance(prompts, str) else prompts
        ids = [self.tokenize(p) if isinstance(p, str) else list(p) for p in several]
        return self._engine.generate(ids, sampling_params or SamplingParams(), on_text)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        sampling_params: SamplingParams | None = None,
        *,
        on_text: Callable[[int, str], None] | None = None,
    ) -> Completion:
        """Answer a conversation, `[{"role": "user", "content": "..."}, ...]`.

        Raises:
            TokenizerError: the model has no chat template.
        """
        ids = self._tokenizer.encode_chat(messages)
        return self.generate([ids], sampling_params, on_text=on_text)[0]

    def tokenize(self, text: str, *, chat: bool = False) -> list[int]:
        """The token ids of a prompt; with `chat`, of a conversation that begins with it.

        Raises:
            TokenizerError: the model has no tokenizer, or no chat template.
        """
        if chat:
            return self._tokenizer.encode_chat([{"role": "user", "content": text}])
        return self._tokenizer.encode(text)

    @property
    def stats(self) -> Stats:
        """Where the time of this side went since it was loaded."""
        return self._engine.stats

    @property
    def transport(self) -> str:
        """How calls and tensors reach the worker (docs/troubleshooting.md); "none" without one."""
        return self._channel.transport if self._channel else "none"

    @property
    def transport_reason(self) -> str:
        """Why this transport."""
        return self._channel.reason if self._channel else "no worker"

    @property
    def rpc(self) -> Counters:
        """What crossed between this side and the worker since the session began."""
        return self._channel.counters if self._channel else Counters()

    def close(self) -> None:
        """End the session, and stop a local worker; safe to call twice."""
        try:
            if self._offload is not None:
                self._offload.close()
            if self._channel is not None:
                self._channel.close()
        finally:
            if self._local is not None:
                self._local.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _connect(
        self,
        endpoint: Endpoint,
        model: str,
        checkpoint: Checkpoint,
        shm_bytes: int,
        threads: int | None,
    ) -> Channel:
        log.warning("privacy open: the worker reads every prompt and every answer")
        if endpoint.scheme == "local":
            log.info("starting a worker on this machine, in the same trust domain")
            arguments = [model, "--dtype", DTYPE_NAMES[self.dtype]]
            arguments += [] if threads is None else ["--threads", str(threads)]
            self._local = LocalWorker(arguments)
        elif endpoint.scheme != "inproc":
            check_reachable(endpoint)  # the digest of a large model takes a while
        hello = _hello(checkpoint, self.dtype, shm_bytes)
        if endpoint.scheme == "inproc":
            weights = load_weights(checkpoint, self.dtype, torch.device("cpu"))
            return InprocChannel(Worker(weights), hello)
        if self._local is not None:
            self._tokenizer.preload()  # takes seconds, as the worker does meanwhile
            self._local.await_ready()
            endpoint = parse_endpoint(self._local.endpoint)
        channel = RemoteChannel(endpoint, hello)
        log.info("worker at %s: transport %s (%s)", endpoint, channel.transport, channel.reason)
        return channel


def _check_options(
    privacy: str, worker: str | Sequence[str] | None, attention: str, insecure: bool
) -> Endpoint | None:
    """The worker's endpoint, or None where the mode takes none."""
    if privacy not in PRIVACY_MODES:
        raise UsageError(
            f"There is no privacy mode {privacy!r}; choose {' or '.join(PRIVACY_MODES)}."
        )
    if attention != "tee":
        raise UsageError(f"There is no attention mode {attention!r}; choose tee.")
    workers = [worker] if isinstance(worker, str) else list(worker or [])
    if privacy == "tee":
        if workers:
            raise UsageError("--privacy tee takes no --worker; leave it out, or choose open.")
        return None
    if len(workers) != 1:
        raise UsageError(
            f"--privacy {privacy} needs one --worker, not {len(workers)}; "
            "name the endpoint of a running `tsqp worker`, or `local`."
        )
    endpoint = parse_endpoint(workers[0])
    if not endpoint.is_loopback and not insecure:
        raise UsageError(
            f"The link to {endpoint} is not encrypted, and whoever it passes can read and change "
            "what crosses; use a worker on this machine, or pass --insecure."
        )
    return endpoint


def _hello(checkpoint: Checkpoint, dtype: torch.dtype, shm_bytes: int) -> Hello:
    return Hello(
        nonce=secrets.token_bytes(32),
        weights_digest=weights_digest(checkpoint, dtype),
        dtype=DTYPE_NAMES[dtype],
        abilities=("embedding", "linear"),
        shm_bytes=shm_bytes,
    )


def _segment_bytes(config: ModelConfig, dtype: torch.dtype, rows: int) -> int:
    """Shared memory for the calls of a step of `rows` tokens."""

    def row_bytes(layer: int, group: str) -> int:
        members = parts(config, layer, group)
        return dtype.itemsize * (members[0].in_features + sum(p.out_features for p in members))

    widest = max(rows * row_bytes(0, group) for group in LAYER_GROUPS)
    widest = max(widest, min(rows, HEAD_ROWS) * row_bytes(-1, "lm_head"))
    # Room for an answer in use and for the next call, twice over for a second lane.
    return min(max(4 * widest, MIN_SHM), MAX_SHM)


def _offload(
    checkpoint: Checkpoint, dtype: torch.dtype, channel: Channel | None, timeout: float
) -> Offload:
    config = checkpoint.config
    if channel is None:
        tied = config.tie_word_embeddings
        required = linear_bytes(config, dtype) + (0 if tied else embedding_bytes(config, dtype))
        check_memory(required, f"The weights of {checkpoint.name}")
        return LocalOffload(checkpoint, dtype)
    biases_F = {
        (layer, group): bias_F
        for layer in range(config.num_layers)
        for group in LAYER_GROUPS
        if (bias_F := read_bias(checkpoint, layer, group, dtype)) is not None
    }
    return OpenOffload(channel, config, dtype, biases_F, timeout)
