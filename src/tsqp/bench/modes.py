"""The modes that `tsqp bench` compares. Each has a runner that times one prompt and answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter, process_time, thread_time
from typing import Any, Protocol

import torch

from tsqp import LLM, SamplingParams
from tsqp.algebra.params import DEGREE, FIELDS, LATTICE, FieldName
from tsqp.bench.baseline import Transformers
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.checkpoint.memory import available_bytes
from tsqp.checkpoint.weights import parse_dtype
from tsqp.gpu.backends import parse_device
from tsqp.model.config import ModelConfig, linear_groups
from tsqp.tee.crypto.lattice import LatticeProvider
from tsqp.tee.crypto.pads import row_bytes_in_stock

TIMEOUT_S = 60.0  # per call; the machine may be busy


@dataclass(frozen=True, slots=True)
class Setting:
    """The settings that all modes share.

    Attributes:
        model: as for `LLM`.
        dtype: "float32", "float16" or "bfloat16".
        field: field of the residues, in the private modes.
        prompt_tokens: length of each prompt; its tokens are random, and prefill is one chunk.
        new_tokens: number of generated tokens; the first one belongs to the prefill.
        threads: threads of each of transformers, the TEE and a worker.
        device: device of the workers, as in `tsqp worker --device`.
        batch: number of prompts that are processed together.
    """

    model: str
    dtype: str
    field: FieldName
    prompt_tokens: int
    new_tokens: int
    threads: int
    device: str = "auto"
    batch: int = 1

    @property
    def forwards(self) -> int:
        """Tokens that one run feeds to the model: all but the last."""
        return self.batch * (self.prompt_tokens + self.new_tokens - 1)


@dataclass(frozen=True, slots=True)
class Sample:
    """The cost of one run.

    Attributes:
        prefill_s: seconds for all prompts of a batch.
        decode_s_per_token: seconds for each token after the first.
        prefill_cpu_s_per_token: CPU time of the TEE per prompt token, including pads made
            when needed but not pads made ahead.
        decode_cpu_s_per_token: the same for each token after the first.
        pads_cpu_s_per_token: CPU time per token to make the pads that this run used, when needed or
            ahead.
        worker_s: compute time that the workers reported.
        calls_per_forward: calls divided by the number of forward passes.
        tensor_bytes: bytes of tensors, in both directions.
        socket_bytes: bytes that went through the socket: messages, and tensors sent inline.
    """

    prefill_s: float
    decode_s_per_token: float
    prefill_cpu_s_per_token: float
    decode_cpu_s_per_token: float
    pads_cpu_s_per_token: float = 0.0
    worker_s: float = 0.0
    calls_per_forward: float = 0.0
    tensor_bytes: float = 0.0
    socket_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class LatticeStock:
    """How lattice masks are made, on which their cost depends.

    Attributes:
        pad_memory: bytes for the stock.
        classes: k, in how many classes the rows of each group's batches are made [P14].
    """

    pad_memory: int
    classes: int


class Runner(Protocol):
    """A model loaded in one mode."""

    def run(self, prompt_ids: Sequence[int], new_tokens: int) -> Sample: ...

    def close(self) -> None: ...


class LlmRunner:
    """Runs any mode of TSQP.

    Args:
        stocked: whether to make the pads of a whole run ahead of it, as far as memory allows.
        options: options of `LLM`.

    Attributes:
        stock_rows: pads of each group in stock before a run.
        field: field of the residues, in the private modes.
        lattice_stock: how lattice masks are made; None without them.
    """

    def __init__(self, setting: Setting, *, stocked: bool = False, **options: Any) -> None:
        self.stock_rows, pad_memory = _stock(setting) if stocked else (0, 0)
        self._batch = setting.batch
        self.field = setting.field
        self.llm = LLM(
            setting.model,
            dtype=setting.dtype,
            field=setting.field,
            threads=setting.threads,
            prefill_chunk=setting.batch * setting.prompt_tokens,
            pad_memory=pad_memory,
            timeout=TIMEOUT_S,
            device=setting.device if "worker" in options else "auto",
            **options,
        )
        self.lattice_stock = _lattice_stock(self.llm, pad_memory)

    def run(self, prompt_ids: Sequence[int], new_tokens: int) -> Sample:
        """Generate one greedy answer from a full stock of pads, then refill the stock."""
        llm = self.llm
        self._fill()
        llm.stats.reset()
        before = _count(llm)
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        llm.generate([prompt_ids] * self._batch, params)
        crossed = {name: value - before[name] for name, value in _count(llm).items()}
        stats = llm.stats
        prompt, new = self._batch * len(prompt_ids), self._batch * (new_tokens - 1)
        if self.field == LATTICE.name and self.stock_rows:
            pads_cpu_s_per_token = self._renew()
        else:
            pads_cpu_s_per_token = (crossed["pads_cpu_s"] + self._fill()) / (prompt + new)
        return Sample(
            prefill_s=stats.prefill_s,
            decode_s_per_token=stats.decode_s / new,
            prefill_cpu_s_per_token=stats.prefill_cpu_s / prompt,
            decode_cpu_s_per_token=stats.decode_cpu_s / new,
            pads_cpu_s_per_token=pads_cpu_s_per_token,
            worker_s=crossed["worker_s"],
            calls_per_forward=crossed["calls"] / new_tokens,
            tensor_bytes=crossed["tensor_bytes"],
            socket_bytes=crossed["socket_bytes"],
        )

    def _fill(self) -> float:
        """Fill the stock of pads; returns the CPU seconds of all threads."""
        began = process_time()
        self.llm.fill_pads()
        return process_time() - began

    def _renew(self) -> float:
        """Renew the whole stock of lattice masks; returns CPU seconds for one row of every group.

        A class of masks is made as a whole, but a run uses only part of it. The stock must be full
        before, because memory that is used for the first time costs more.
        """
        pool = self.llm._pads
        assert pool is not None
        made, began, thread_began = pool.stats.made_rows, process_time(), thread_time()
        pool.discard()
        discarding_s = thread_time() - thread_began  # a run's own time includes taking its rows
        pool.fill()
        cpu_s, rows = process_time() - began - discarding_s, pool.stats.made_rows - made
        return cpu_s * len(linear_groups(self.llm.config)) / rows

    def close(self) -> None:
        self.llm.close()


class TransformersRunner:
    """Runs transformers, the external reference, on the CPU or on the workers' device."""

    def __init__(self, setting: Setting, *, on_worker: bool = False) -> None:
        torch.set_num_threads(setting.threads)
        device = parse_device(setting.device if on_worker else "cpu")
        self._batch = setting.batch
        checkpoint = open_checkpoint(setting.model)
        try:
            dtype = parse_dtype(setting.dtype, checkpoint.config)
            self._model = Transformers(checkpoint, dtype, device)
        finally:
            checkpoint.close()

    def run(self, prompt_ids: Sequence[int], new_tokens: int) -> Sample:
        """Generate one greedy answer."""
        prompts = [prompt_ids] * self._batch
        prefill_s, prefill_cpu_s = _time(partial(self._model.prefill, prompts))
        decode_s, decode_cpu_s = _time(partial(self._model.decode, new_tokens - 1))
        new = self._batch * (new_tokens - 1)
        return Sample(
            prefill_s=prefill_s,
            decode_s_per_token=decode_s / new,
            prefill_cpu_s_per_token=prefill_cpu_s / (self._batch * len(prompt_ids)),
            decode_cpu_s_per_token=decode_cpu_s / new,
        )

    def close(self) -> None:
        pass


MODES: dict[str, Callable[[Setting], Runner]] = {
    "transformers": TransformersRunner,
    "transformers-worker": partial(TransformersRunner, on_worker=True),
    "tee": partial(LlmRunner, privacy="tee"),
    "open": partial(LlmRunner, privacy="open", worker="local"),
    "open-gpu-attention": partial(LlmRunner, privacy="open", worker="local", attention="gpu"),
    "open-fused": partial(LlmRunner, privacy="open", worker="local", fuse="layer"),
    "pad": partial(LlmRunner, privacy="pad", worker="local", stocked=True),
    "pad-inline": partial(LlmRunner, privacy="pad", worker="local"),
    "shares": partial(
        LlmRunner, privacy="shares", worker=("local", "local"), insecure_same_host=True
    ),
}


def stock_bytes(config: ModelConfig, rows: int, field: FieldName) -> int:
    """Bytes of the pads for `rows` tokens."""
    groups = linear_groups(config)
    return rows * sum(row_bytes_in_stock(FIELDS[field], *group.shape) for group in groups)


def _time(run: Callable[[], None]) -> tuple[float, float]:
    """Wall seconds and CPU seconds of one call."""
    began, cpu_began = perf_counter(), process_time()
    run()
    return perf_counter() - began, process_time() - cpu_began


def _stock(setting: Setting) -> tuple[int, int]:
    """Rows and bytes of the pads for one run, limited to half of the free memory."""
    checkpoint = open_checkpoint(setting.model)
    checkpoint.close()
    row_bytes = stock_bytes(checkpoint.config, 1, setting.field)
    rows = setting.forwards
    if setting.field == LATTICE.name:  # two whole batches: one is used while the other is made
        rows = 2 * DEGREE
    memory = min(rows * row_bytes, available_bytes() // 2)
    return memory // row_bytes, memory


def _lattice_stock(llm: LLM, pad_memory: int) -> LatticeStock | None:
    provider = None if llm._pads is None else llm._pads._provider
    if isinstance(provider, LatticeProvider):
        return LatticeStock(pad_memory, provider.classes)
    return None


def _count(llm: LLM) -> dict[str, float]:
    """Traffic and cost of pads since the session began."""
    rpc, pads = llm.rpc, llm.pads
    return {
        "calls": sum(rpc.calls.values()),
        "worker_s": sum(rpc.compute_s.values()),
        "tensor_bytes": rpc.sent_bytes + rpc.received_bytes,
        "socket_bytes": rpc.socket_bytes,
        "pads_cpu_s": pads.inline_cpu_s + pads.background_cpu_s if pads else 0.0,
    }
