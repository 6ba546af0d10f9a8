"""`--privacy open`: linear layers and the embedding run on a worker that reads everything.

This mode is for a trusted GPU, and is the baseline for the private modes. Attention and the KV
cache stay in the TEE (`--attention tee`); `open_attention.py` runs them on the worker. Biases are
added in the TEE, as [P3] requires in every mode.

Shape suffixes: T tokens; D input and F output features of a linear layer.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType

import torch
from torch import Tensor

from tsqp.model.config import ModelConfig, linear_groups
from tsqp.model.linear_group import LinearGroup
from tsqp.model.shard import all_shards
from tsqp.nn.attention import CachedAttention
from tsqp.nn.kv_cache import KvCache
from tsqp.tee.offload.offload import Attention, Embedding, Kv, Linear, Pending, Request, attend_here
from tsqp.tee.placement import OPEN
from tsqp.wire import messages
from tsqp.wire.call_limit import rows_within
from tsqp.wire.channel import Channel, Reply
from tsqp.wire.messages import Operation
from tsqp.wire.tensors import Spec


@dataclass(frozen=True, slots=True)
class Columns:
    """The worker behind `channel` computes the output features [start, stop) of a group."""

    channel: Channel
    start: int
    stop: int


class OpenLinear:
    """Sends plain token ids and activations to workers; attention is left to subclasses.

    Args:
        channels: to one worker, or to the workers of all shards in their order.
        biases_F: of the groups that have one.
        timeout: seconds that the worker may take for one call.
        kv: where keys and values are kept.
    """

    def __init__(
        self,
        channels: Sequence[Channel],
        config: ModelConfig,
        dtype: torch.dtype,
        biases_F: Mapping[LinearGroup, Tensor],
        timeout: float,
        kv: Kv,
    ) -> None:
        self.kv = kv
        self._channels = tuple(channels)
        self._channel = channels[0]
        self._dtype = dtype
        # Which worker computes which features of a group.
        self._groups = {group: self._cut(group.features) for group in linear_groups(config)}
        self._hidden_size = config.hidden_size
        self._embedding = self._cut(config.hidden_size)
        self._biases_F = biases_F
        self._timeout = timeout

    def start(self, request: Request) -> Pending:
        if isinstance(request, Embedding):
            return self._call(messages.Embed(), request.token_ids_T, self._embedding, None)
        assert isinstance(request, Linear)
        group, operation = request.group, messages.Linear(*messages.place_of(request.group))
        return self._call(operation, request.x_TD, self._groups[group], self._biases_F.get(group))

    def close(self) -> None:
        for channel in self._channels:
            channel.close()

    def _cut(self, features: int) -> list[Columns]:
        """Which worker computes which of so many features."""
        rows = [shard.rows(features) for shard in all_shards(len(self._channels))]
        pairs = zip(self._channels, rows, strict=True)
        return [Columns(channel, each.start, each.stop) for channel, each in pairs]

    def _call(
        self, operation: Operation, x: Tensor, shards: Sequence[Columns], bias_F: Tensor | None
    ) -> Pending:
        rows = x.shape[0]
        block = min(_rows_per_call(x, shard, self._dtype) for shard in shards)
        if len(shards) == 1 and rows <= block:
            return self.submit_to(shards[0], operation, x, bias_F)

        def submit(part: Tensor, out: list[RemoteAnswer]) -> None:
            for shard in shards:
                bias = None if bias_F is None else bias_F[shard.start : shard.stop]
                out.append(self.submit_to(shard, operation, part, bias))

        return SplitAnswer(partial(submit, part) for part in torch.split(x, block))

    def submit_to(
        self, shard: Columns, operation: Operation, x: Tensor, bias_F: Tensor | None
    ) -> "RemoteAnswer":
        output = Spec((x.shape[0], shard.stop - shard.start), self._dtype)
        return self.submit(operation, (x,), output, bias_F, shard.channel)

    def submit(
        self,
        operation: Operation,
        inputs: Sequence[Tensor],
        output: Spec,
        bias_F: Tensor | None = None,
        channel: Channel | None = None,
    ) -> "RemoteAnswer":
        channel = channel or self._channel
        specs = [Spec(tuple(x.shape), x.dtype) for x in inputs]
        slot = channel.reserve(operation, specs, [output])
        for place, x in zip(slot.inputs, inputs, strict=True):
            place.copy_(x)
        return RemoteAnswer(channel, channel.submit(slot), bias_F, self._timeout)


class OpenOffload(OpenLinear):
    """Attention and the KV cache in the TEE, the rest as in `OpenLinear`."""

    placement = OPEN
    most_scores = 0

    def __init__(
        self,
        channels: Sequence[Channel],
        config: ModelConfig,
        dtype: torch.dtype,
        biases_F: Mapping[LinearGroup, Tensor],
        timeout: float,
        kv: KvCache,
    ) -> None:
        self._attention = CachedAttention(config, kv)
        super().__init__(channels, config, dtype, biases_F, timeout, kv)

    def start(self, request: Request) -> Pending:
        if isinstance(request, Attention):
            return attend_here(self._attention, request)
        return super().start(request)


class RemoteAnswer:
    """A pending answer. Without a bias it is read from where the worker wrote it."""

    def __init__(
        self, channel: Channel, ticket: int, bias_F: Tensor | None, timeout: float
    ) -> None:
        self._channel = channel
        self._ticket = ticket
        self._bias_F = bias_F
        self._timeout = timeout
        self._reply: Reply | None = None
        self.waited_s = 0.0

    def __enter__(self) -> Tensor:
        began = time.perf_counter()
        try:
            self._reply = self._channel.wait(self._ticket, time.monotonic() + self._timeout)
        except BaseException:  # Ctrl-C too: nobody else will ask for this answer
            self.cancel()
            raise
        self.waited_s = time.perf_counter() - began
        y_TF = self._reply.outputs[0]
        if self._bias_F is not None:
            y_TF = y_TF + self._bias_F
        if self._reply.times is not None:
            self._reply.times.end()  # what goes on inside the block is not about this call
        return y_TF

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._reply is not None
        self._reply.__exit__(kind, error, traceback)

    def cancel(self) -> None:
        self._channel.cancel(self._ticket)


class SplitAnswer:
    """An answer that takes several calls, one after the other, each for some of its rows.

    Args:
        submits: each submits the calls of the next rows, in the order of their columns, and adds
            them to the list that it is given. Calls in the list are cancelled if a later one fails.
    """

    def __init__(self, submits: Iterable[Callable[[list[RemoteAnswer]], None]]) -> None:
        self._submits = deque(submits)
        self._out: list[RemoteAnswer] = []
        self.waited_s = 0.0
        self._submit_next()

    def __enter__(self) -> Tensor:
        parts = []
        try:
            while self._out:
                parts.append(self._receive())
                self._submit_next()
        except BaseException:
            self.cancel()
            raise
        return torch.cat(parts)

    def __exit__(self, *_: object) -> None:
        pass

    def cancel(self) -> None:
        self._submits.clear()
        while self._out:
            self._out.pop().cancel()

    def _submit_next(self) -> None:
        if not self._submits:
            return
        try:
            self._submits.popleft()(self._out)
        except BaseException:
            self.cancel()
            raise

    def _receive(self) -> Tensor:
        columns = []
        while self._out:
            answer = self._out.pop(0)
            with answer as part_TF:
                columns.append(part_TF.clone())
            self.waited_s += answer.waited_s
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)


def _rows_per_call(x: Tensor, shard: Columns, dtype: torch.dtype) -> int:
    """How many rows of `x` fit into one call, with their answers and the work they take."""
    features = shard.stop - shard.start
    row_bytes = x[0].nbytes + features * dtype.itemsize
    by_work = rows_within(shard.channel.welcome.max_call_macs, features * x[0].numel())
    return max(1, min(by_work, shard.channel.max_call_bytes // row_bytes))
