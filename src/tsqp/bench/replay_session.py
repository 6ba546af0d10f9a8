"""Sessions of the trusted side with a replay worker, for benchmarks only.

The trusted side is composed as `tsqp.runtime.loaded_model` does it, of the same parts: nothing of
it is changed or left out. Only the checkpoint is a model of zeros.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from time import process_time

import torch

from tsqp.bench.zero_model import ZeroCheckpoint
from tsqp.checkpoint.weights_digest import WeightsDigest
from tsqp.model.shard import WHOLE, Shard
from tsqp.nn.layers import Layers
from tsqp.runtime.build import Builder
from tsqp.runtime.failover import Alternative, Begin, Failover
from tsqp.runtime.generate import generate
from tsqp.runtime.links import Link
from tsqp.runtime.local_worker import LocalWorker
from tsqp.runtime.options import Options
from tsqp.runtime.replicas import Replicas
from tsqp.runtime.worker_link import WorkerProcess
from tsqp.tee.crypto.pad_pool import PadPool
from tsqp.tee.decoder import Decoder
from tsqp.tee.engine.engine import Engine
from tsqp.tee.engine.observer import Observer
from tsqp.tee.sampling import SamplingParams
from tsqp.tee.stats import Stats


class ReplayProcess(LocalWorker):
    """A replay worker as a child process, which ends with this one."""

    PROGRAM = ("-m", "tsqp.bench.serve_replay")

    def __init__(
        self, model: ZeroCheckpoint, dtype: str, gpu: str | None = None, shard: Shard = WHOLE
    ) -> None:
        """Start it; `await_ready` says when it serves.

        Args:
            gpu: one of `simulated_gpu.GPUS`, whose times it takes; None to answer at once.
            shard: the part of the model that it serves.
        """
        arguments = [model.random.name, "--layers", str(model.layers), "--dtype", dtype]
        arguments += ["--shard", f"{shard.number}/{shard.count}"]
        super().__init__([*arguments, *([] if gpu is None else ["--gpu", gpu])])


@dataclass(frozen=True, slots=True)
class ReplaySession:
    """An engine whose linear layers a replay worker answers.

    Attributes:
        pads: the stock of pads or masks; None in `open`.
        calls: counts the calls to the worker since the session began.
    """

    engine: Engine
    pads: PadPool | None
    calls: Callable[[], int]

    @property
    def stats(self) -> Stats:
        return self.engine.stats

    def run(
        self, prompt_ids: Sequence[int], new_tokens: int, on_prefill: Callable[[], None]
    ) -> None:
        """Generate one greedy answer.

        Args:
            on_prefill: called after each step with prompt tokens.
        """
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        generate(self.engine, [prompt_ids], params, on_progress=lambda done, total: on_prefill())


class ReplayModel:
    """What the trusted side needs of a model of zeros in one mode, for sessions with some workers.

    Args:
        options: the options of the run. Its workers are replay workers that serve this model.
            There is one session at a time.
        shards: how many shards the workers hold; each session is then with all of them.
    """

    def __init__(self, checkpoint: ZeroCheckpoint, options: Options, shards: int = 1) -> None:
        self._checkpoint = checkpoint
        self._dtype: torch.dtype = getattr(torch, options.dtype)
        weights_dtype = torch.int8 if options.masked else self._dtype
        if options.threads is not None:
            torch.set_num_threads(options.threads)

        def process_of(link: Link) -> WorkerProcess:
            return WorkerProcess(link, checkpoint.name, weights_dtype)

        workers = [process_of(link) for link in options.links]
        self._replicas = Replicas(workers, shards, options, process_of) if shards > 1 else None
        alternatives = [self._replicas] if self._replicas else [Alternative([w]) for w in workers]
        self._failover = Failover(alternatives)
        norms = WeightsDigest()
        self._layers = Layers(checkpoint, self._dtype, norms, compiled=options.masked)
        builder = Builder(options, checkpoint, self._dtype, norms)
        self._begins: list[Begin] = builder.build(self._failover)
        self._options = options

    @contextmanager
    def session(self, number: int) -> Iterator[ReplaySession]:
        """A session with the worker of this number, or with all shards."""
        with ExitStack() as stack:
            alternative = self._failover.alternatives[number]
            stack.callback(alternative.close if self._replicas is None else self._replicas.stop)
            offload, pads = self._begins[number]()
            stack.callback(offload.close)
            config = self._checkpoint.config
            decoder = Decoder(
                self._checkpoint, self._dtype, self._layers, offload.placement, offload.most_scores
            )
            cpu_clock = process_time if pads is None else pads.other_cpu_s
            engine = Engine(
                decoder,
                offload,
                config,
                observer=Observer(cpu_clock=cpu_clock),
                prefill_chunk=self._options.prefill_chunk,
            )
            stack.callback(engine.close)
            yield ReplaySession(engine, pads, lambda: sum(alternative.rpc.calls.values()))
