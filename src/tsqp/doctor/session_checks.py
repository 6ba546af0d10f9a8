"""Checks of a worker, step by step: connect, shake hands, and verify its products.

Shape suffixes: T tokens; D input and F output features of a group; H query heads; J key/value
heads; K features of one head; S tokens of a sequence.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from tsqp.checkpoint.checkpoint import Checkpoint, open_checkpoint
from tsqp.checkpoint.model_key import read_model_key
from tsqp.checkpoint.quantize import quantize_group
from tsqp.checkpoint.weights import parse_dtype, read_bias, read_embedding, read_linear
from tsqp.doctor.check import NOT_SERVED, Check, Skipped, Wrong, run_check
from tsqp.errors import HandshakeError
from tsqp.gpu.worker import ATTENTION_ABILITY, LATTICE_ABILITY
from tsqp.model.config import layer_groups
from tsqp.model.linear_group import LinearGroup
from tsqp.nn.attention import Segment
from tsqp.runtime.build import Builder
from tsqp.runtime.failover import Alternative, Failover
from tsqp.runtime.options import Options
from tsqp.runtime.worker_link import WorkerProcess
from tsqp.tee.crypto.freivalds import Trust, process_limit
from tsqp.tee.crypto.pad_pool import PadPool
from tsqp.tee.crypto.row_pool import RowPool
from tsqp.tee.offload.lattice_load import LatticeLoad
from tsqp.tee.offload.masked import LinearPart
from tsqp.tee.offload.offload import (
    AttentionScores,
    Embedding,
    Linear,
    Offload,
    Request,
    WeightedValues,
)
from tsqp.tee.offload.open_attention import OpenAttentionOffload
from tsqp.tee.offload.pad import PadLinear
from tsqp.wire.channel import Channel
from tsqp.wire.endpoint import parse_endpoint
from tsqp.wire.handshake import read_refusal

TIMEOUT_S = 8.0
FEW_ROWS, MANY_ROWS = 4, 512
CALLS = 20
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

Step = tuple[str, Callable[[], str]]


@dataclass(frozen=True, slots=True)
class Target:
    """A worker to check: its endpoint, the model that it should serve, and session options."""

    model: str
    worker: str
    worker_key: str | None = None
    dtype: str = "auto"
    threads: int | None = None
    insecure: bool = False
    shm_name: str | None = None
    model_key_file: Path | None = None


def session_checks(target: Target) -> Iterator[Check]:
    """Run all checks of one worker, in every mode that it serves. A failure ends its mode."""
    with ExitStack() as stack:
        opened: list[Checkpoint] = []

        def open_model() -> str:
            path = target.model_key_file
            key = None if path is None else read_model_key(path)
            opened.append(open_checkpoint(target.model, key=key))
            stack.callback(opened[0].close)
            config = opened[0].config
            return f"{opened[0].name}, {config.num_layers} layers of {config.hidden_size}"

        yield (found := run_check("model", open_model))
        if found.state != "ok":
            return
        modes = [_Mode(target, opened[0], privacy, stack) for privacy in ("pad", "open")]
        yield (found := run_check("reach the worker", modes[0].reach))
        if found.state != "ok":
            return
        states = []
        for mode in modes:
            for check in _until_one_fails(mode.steps()):
                yield check
                states.append(check.state)
        if set(states) == {"skipped"}:
            yield Check("modes", "bad", 0.0, "The worker serves no mode; do not trust it.")


def _until_one_fails(steps: Iterable[Step]) -> Iterator[Check]:
    for name, step in steps:
        check = run_check(name, step)
        yield check
        if check.state != "ok":
            return


class _Mode:
    """A session in one privacy mode."""

    _offload: Offload
    _channel: Channel

    def __init__(
        self, target: Target, checkpoint: Checkpoint, privacy: str, stack: ExitStack
    ) -> None:
        self._target = target
        self._checkpoint = checkpoint
        self._privacy = privacy
        self._stack = stack
        self._dtype = parse_dtype(target.dtype, checkpoint.config)
        self._groups = layer_groups(checkpoint.config, 0)

    def steps(self) -> Iterator[Step]:
        """The steps that follow `reach`."""
        yield f"{self._privacy}: handshake", self._shake_hands
        if self._privacy == "open":
            yield "open: embedding", self._embed
        yield f"{self._privacy}: product", self._multiply
        if self._privacy == "pad":
            yield "pad: lattice masks", self._multiply_with_lattice_masks
        if self._privacy == "open":
            yield "open: attention", self._attend
        yield f"{self._privacy}: speed", self._hurry
        yield f"{self._privacy}: transport", self._transport

    def reach(self) -> str:
        """Check that a worker serves the endpoint, and that it has the given key."""
        [link] = self._options().links
        if link.endpoint.scheme == "local":
            return "local: one is started for each mode"
        self._process().start(look_first=True)
        return f"{link.endpoint}{', over an encrypted link' if link.key else ''}"

    def _process(self) -> WorkerProcess:
        [link] = self._options().links
        dtype = torch.int8 if self._privacy == "pad" else self._dtype
        return WorkerProcess(link, self._target.model, dtype, self._target.threads)

    def _shake_hands(self) -> str:
        process = self._process()
        self._stack.callback(process.close)
        builder = Builder(self._options(), self._checkpoint, self._dtype)
        try:
            [begin] = builder.build(Failover([Alternative([process])]))
            self._offload, _ = begin()
        except HandshakeError as exc:
            if NOT_SERVED in str(exc):
                raise Skipped(exc) from exc
            if not (shard := read_refusal(str(exc)).shard).is_whole:
                raise Wrong(
                    f"The worker holds {shard}, and its products can only be checked with the "
                    "others: give --worker for each shard to `tsqp generate`, which checks all of "
                    "them."
                ) from exc
            raise
        self._stack.callback(self._offload.close)
        assert process.channel is not None
        self._channel = process.channel
        kind = "int8" if self._privacy == "pad" else str(self._dtype).removeprefix("torch.")
        return f"the same {kind} weights on both sides"

    def _embed(self) -> str:
        ids_T = torch.arange(FEW_ROWS)
        expected_TD = read_embedding(self._checkpoint, self._dtype)[ids_T]
        if not torch.equal(self._ask(Embedding(ids_T)), expected_TD):
            raise Wrong("The worker's embedding is not the model's; do not trust this worker.")
        return f"{FEW_ROWS} rows are the model's"

    def _multiply(self) -> str:
        """Against float64; in `pad` the check of [P7] comes before."""
        error = self._product_error(self._offload)
        return f"{'padded, checked, and ' if self._privacy == 'pad' else ''}right to {error:.0e}"

    def _multiply_with_lattice_masks(self) -> str:
        """The same with `--field lattice`, with the hints of this group only."""
        if LATTICE_ABILITY not in self._channel.welcome.abilities:
            raise Wrong(
                "The worker does not know lattice masks, which --field lattice needs; install the "
                "same version of tsqp on both sides."
            )
        group = self._groups.qkv
        bias_F = read_bias(self._checkpoint, group, self._dtype)
        shapes = {group: group.shape}
        load = LatticeLoad(shapes, {} if bias_F is None else {group: bias_F})
        load.add(group, quantize_group(self._checkpoint, group))
        with closing(PadPool(load.provider(0), shapes, 0)) as pool, closing(RowPool(1)) as rows:
            offload = PadLinear(
                self._channel,
                load.groups[0][0],
                pool,
                self._dtype,
                TIMEOUT_S,
                rows,
                Trust(process_limit),
            )
            return f"masked, checked twice, and right to {self._product_error(offload):.0e}"

    def _product_error(self, offload: Offload | LinearPart) -> float:
        group, x_TD = self._groups.qkv, self._inputs(FEW_ROWS)
        if self._privacy == "pad":
            integers = quantize_group(self._checkpoint, group)
            weight_FD = integers.weight_FD.double() * integers.scale_F.double()[:, None]
        else:
            weight_FD = self._weight(group)
        expected_TF = x_TD.double() @ weight_FD.t()
        bias_F = read_bias(self._checkpoint, group, self._dtype)
        expected_TF += 0.0 if bias_F is None else bias_F.double()
        with offload.start(Linear(group, x_TD)) as answer:
            return self._error("The product", answer, expected_TF)

    def _attend(self) -> str:
        """Check the products of `--attention gpu` against float64: Q·Kᵀ, and P·V with "o"."""
        if ATTENTION_ABILITY not in self._channel.welcome.abilities:
            raise Wrong(
                "The worker cannot do attention, which --attention gpu needs; install the same "
                "version of tsqp on both sides."
            )
        c, rows = self._checkpoint.config, FEW_ROWS
        offload = OpenAttentionOffload(self._channel, c, self._dtype, {}, TIMEOUT_S)
        q_THK = self._waves(rows, c.num_heads, c.head_dim)
        k_TJK, v_TJK = self._waves(2, rows, c.num_kv_heads, c.head_dim).cos()
        p_HTS = self._waves(c.num_heads, rows, rows)

        offload.kv.alloc(0, rows)
        request = AttentionScores(0, q_THK, k_TJK, v_TJK, [Segment(0, 0, rows)])
        scores_HTS = self._ask(request, offload).view(c.num_heads, rows, rows)
        o_TD = self._ask(WeightedValues(0, [(0, p_HTS)]), offload)
        offload.kv.free(0)

        # Each key/value head serves the same number of consecutive query heads.
        k_SHK, v_SHK = (
            x.double().repeat_interleave(c.num_heads // c.num_kv_heads, 1) for x in (k_TJK, v_TJK)
        )
        expected_HTS = torch.einsum("thk,shk->hts", q_THK.double(), k_SHK)
        values_TD = torch.einsum("hts,shk->thk", p_HTS.double(), v_SHK).flatten(1)
        weight_FD = self._weight(self._groups.o)
        error = max(
            self._error("Q·Kᵀ", scores_HTS, expected_HTS),
            self._error("P·V", o_TD, values_TD @ weight_FD.t()),
        )
        return f"Q·Kᵀ and P·V right to {error:.0e}"

    def _hurry(self) -> str:
        one_s = median(self._time(1) for _ in range(CALLS))
        counters = self._channel.counters
        before = counters.sent_bytes + counters.received_bytes
        many_s = self._time(MANY_ROWS)
        rate = (counters.sent_bytes + counters.received_bytes - before) / many_s
        return (
            f"one row there and back in {1e6 * one_s:.0f} µs, {MANY_ROWS} rows in "
            f"{1e3 * many_s:.1f} ms ({rate / 1e6:.0f} MB/s), the product included"
        )

    def _transport(self) -> str:
        """Check that memory is shared where possible; if not, this often makes a worker slow."""
        channel = self._channel
        if channel.transport == "inline" and self._target.shm_name is not None:
            raise Wrong(f"Tensors go through the socket in spite of --shm-name: {channel.reason}.")
        if channel.transport == "inline" and parse_endpoint(self._target.worker).is_loopback:
            raise Wrong(
                f"Tensors go through the socket, though the worker is on this machine "
                f"({channel.reason}); let both sides see the same processes or the same /dev/shm, "
                "and start neither with --no-shm."
            )
        return f"{channel.transport} ({channel.reason})"

    def _options(self) -> Options:
        return Options(
            privacy=self._privacy,
            worker=self._target.worker,
            worker_key=self._target.worker_key,
            attention="tee",
            pad_memory=0,
            threads=self._target.threads,
            prefill_chunk=MANY_ROWS,
            timeout=TIMEOUT_S,
            insecure=self._target.insecure,
            shm_name=self._target.shm_name,
        )

    def _inputs(self, rows: int) -> Tensor:
        """Fixed inputs for the product, which contain no user data."""
        return self._waves(rows, self._checkpoint.config.hidden_size)

    def _waves(self, *shape: int) -> Tensor:
        return torch.arange(math.prod(shape)).sin().view(shape).to(self._dtype)

    def _weight(self, group: LinearGroup) -> Tensor:
        """The weight that the worker should have, [F, D], float64."""
        return read_linear(self._checkpoint, group, self._dtype).weight_FD.double()

    def _ask(self, request: Request, offload: Offload | None = None) -> Tensor:
        with (offload or self._offload).start(request) as answer:
            return answer.clone()

    def _error(self, what: str, found: Tensor, expected: Tensor) -> float:
        """The largest error, relative to the largest expected value."""
        error = float((found.double() - expected).abs().max() / expected.abs().max())
        if not error <= TOLERANCE[self._dtype]:
            raise Wrong(f"{what} is off by {error:.0e} of its size; do not trust this worker.")
        return error

    def _time(self, rows: int) -> float:
        request = Linear(self._groups.qkv, self._inputs(rows))
        began = perf_counter()
        self._ask(request)
        return perf_counter() - began
