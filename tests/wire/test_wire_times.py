"""Where the time of a call went: stages that follow one another, and the worker's word."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from wire_helpers import TIMEOUT, Echo, HelperProcess, WorkerThread, begin, finish, hello

from tsqp.wire.call_times import AWAY, MASK, RECEIVE, SEND, STAGES, UNMASK, WAIT, CallTimes
from tsqp.wire.client import RemoteChannel
from tsqp.wire.messages import Linear, Operation, Result, SeedProduct, Weighted, WeightedValues
from tsqp.wire.tensors import Spec

pytestmark = pytest.mark.usefixtures("nothing_is_left")

SENT = torch.ones(3, 5)
MS = 1_000_000
OVER = pytest.mark.parametrize("shm_bytes", [2**20, 0], ids=["shared", "inline"])


def timed_channel(
    worker: HelperProcess | WorkerThread, folder: Path, shm_bytes: int
) -> tuple[RemoteChannel, list[CallTimes]]:
    """A channel, and the times of its calls in the order in which they ended."""
    channel = RemoteChannel(worker.endpoint, hello(shm_bytes=shm_bytes), shm_folder=folder)
    ended: list[CallTimes] = []
    channel.on_times = ended.append
    return channel, ended


@OVER
def test_the_stages_of_a_call_fill_the_time_it_took(
    shm_bytes: int, worker: HelperProcess, shared_folder: Path
) -> None:
    channel, ended = timed_channel(worker, shared_folder, shm_bytes)
    began = time.perf_counter_ns()
    finish(channel, begin(channel, SENT, group="sleep", layer=30))
    took = time.perf_counter_ns() - began
    channel.close()
    [times] = ended
    # The worker may begin before this thread knows that it has sent the call.
    assert 30 * MS < times.compute_ns <= sum(times.stages_ns[each] for each in (SEND, WAIT, AWAY))
    assert 0 <= times.began_ns - began < took
    assert sum(times.stages_ns) <= took
    for stage in (MASK, SEND, WAIT, RECEIVE, UNMASK):
        assert times.stages_ns[stage] > 0, STAGES[stage]
    assert (times.kind, times.layer, times.group, times.rows) == ("linear", 30, "sleep", 3)
    assert times.sent_bytes == times.received_bytes == 60


@OVER
def test_waiting_is_counted_once_where_another_answer_comes_first(
    shm_bytes: int, worker: HelperProcess, shared_folder: Path
) -> None:
    channel, ended = timed_channel(worker, shared_folder, shm_bytes)
    began = time.perf_counter_ns()
    first = begin(channel, SENT, group="sleep", layer=30)
    second = begin(channel, SENT, group="sleep", layer=30)
    finish(channel, second)
    finish(channel, first)
    took = time.perf_counter_ns() - began
    channel.close()
    late, early = ended
    assert early.stages_ns[WAIT] == 0
    assert 0 < late.stages_ns[WAIT] <= early.stages_ns[AWAY]
    assert early.compute_ns > 30 * MS
    assert sum(sum(each.stages_ns) - each.stages_ns[AWAY] for each in ended) <= took


class Gate(Echo):
    """Holds each call of the group "hold" until a test opens it."""

    def __init__(self) -> None:
        super().__init__()
        self.holds, self.opened = threading.Event(), threading.Event()

    def run(
        self, operation: Operation, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        if operation == Linear(0, "hold"):
            self.holds.set()
            assert self.opened.wait(TIMEOUT)
        super().run(operation, inputs, outputs)


@OVER
def test_an_answer_does_not_tell_how_long_the_worker_served_others(
    shm_bytes: int, tmp_path: Path, shm_folder: Path
) -> None:
    gate = Gate()
    with WorkerThread(f"ipc://{tmp_path}/socket", gate, shm_folder=shm_folder) as worker:
        (other, _), (channel, ended) = (
            timed_channel(worker, shm_folder, shm_bytes) for _ in range(2)
        )
        held = begin(other, SENT, group="hold")
        assert gate.holds.wait(TIMEOUT)
        ticket = begin(channel, SENT)
        began = time.perf_counter_ns()
        threading.Event().wait(0.2)
        waited_ns = time.perf_counter_ns() - began
        gate.opened.set()
        finish(channel, ticket)
        finish(other, held)
        channel.close()
        other.close()
    [times] = ended
    assert times.compute_ns + waited_ns <= sum(times.stages_ns)
    assert Result.__struct_fields__ == ("compute_ns",)


def test_a_secret_seed_is_not_kept_for_a_log() -> None:
    seed = bytes(range(32))
    times = CallTimes(
        lambda times: None,
        SeedProduct(1, "qkv", "wide", 7, seed),
        [],
        [Spec((7, 40), torch.uint8)],
    )
    kept = {name: getattr(times, name) for name in CallTimes.__slots__}
    assert (times.kind, times.rows, times.received_bytes) == ("seed_product", 7, 280)
    assert not [name for name, value in kept.items() if isinstance(value, bytes | SeedProduct)]


def test_rows_of_flat_numbers_are_those_of_the_answer() -> None:
    operation = WeightedValues(0, (Weighted(1, 3, 20), Weighted(2, 1, 5)))
    weights, answer = Spec((2 * (3 * 20 + 5),), torch.float32), Spec((4, 64), torch.float32)
    assert CallTimes(lambda times: None, operation, [weights], [answer]).rows == 4


def test_a_call_ends_once() -> None:
    ended: list[CallTimes] = []
    times = CallTimes(ended.append, SeedProduct(1, "qkv", "wide", 7, bytes(32)), [], [])
    times.end()
    stages = list(times.stages_ns)
    times.end()
    assert ended == [times]
    assert times.stages_ns == stages
