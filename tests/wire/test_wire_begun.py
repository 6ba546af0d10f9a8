"""Calls that a device still computes when the worker takes the next one."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from wire_helpers import SHARED, Echo, WorkerThread, begin, eventually, finish, hello

import tsqp.wire.server
from tsqp.errors import RemoteError
from tsqp.wire.client import RemoteChannel
from tsqp.wire.messages import Attach, Hello, Linear, Operation, Welcome

pytestmark = pytest.mark.usefixtures("nothing_is_left")

FAILS, WAITS = "fails", "waits"  # groups


class Later:
    """A call of a made-up device, which computes it when it is waited for or `go` is set."""

    def __init__(self, device: "Device", operation: Linear, pair: tuple[Tensor, Tensor]) -> None:
        self._device, self._operation, self._pair = device, operation, pair

    def is_done(self) -> bool:
        return self._operation.group != WAITS or self._device.go.is_set()

    def wait(self) -> None:
        if self._operation.group == WAITS:
            assert self._device.go.wait(30)
        if self._operation.group == FAILS:
            raise RuntimeError("the device is on fire")
        self._pair[1].copy_(self._pair[0])
        self._device.computed.append(self._operation.layer)

    def compute_ns(self) -> int:
        return 5_000_000


class Device:
    """A service that computes later, and notes what it did and which memory it was told of."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.begun: list[int] = []
        self.computed: list[int] = []
        self.memory: list[int] = []
        self.told = 0

    def welcome(self, hello: Hello) -> Welcome:
        return Echo().welcome(hello)

    def open(self) -> "DeviceSession":
        return DeviceSession(self)


class DeviceSession(Echo):
    def __init__(self, device: Device) -> None:
        super().__init__()
        self._device = device
        self._memory: Tensor | None = None

    def run(  # type: ignore[override]
        self, operation: Operation, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> Later:
        assert isinstance(operation, Linear)
        self._device.begun.append(operation.layer)
        return Later(self._device, operation, (inputs[0], outputs[0]))

    def use_memory(self, memory: Tensor) -> None:
        self._memory = memory
        self._device.told += 1
        self._device.memory.append(memory.nbytes)

    def forget_memory(self) -> None:
        if self._memory is not None:
            self._memory[-1] += 1  # a crash, if it is unmapped
            self._device.memory.remove(self._memory.nbytes)
            self._memory = None


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def own(device: Device, tmp_path: Path, shm_folder: Path) -> Iterator[WorkerThread]:
    with WorkerThread(f"ipc://{tmp_path}/socket", device, shm_folder=shm_folder) as own:
        yield own


def connect(worker: WorkerThread, folder: Path, **changes: int) -> RemoteChannel:
    return RemoteChannel(worker.endpoint, hello(**changes), shm_folder=folder)


def test_another_client_is_answered_while_a_device_computes(
    device: Device, own: WorkerThread, shm_folder: Path
) -> None:
    slow, quick = connect(own, shm_folder), connect(own, shm_folder)
    assert slow.transport == SHARED
    waiting = begin(slow, torch.ones(3), group=WAITS, layer=1)
    assert eventually(lambda: device.begun == [1])
    assert finish(quick, begin(quick, torch.full((3,), 2.0), layer=2))[0].tolist() == [2] * 3
    assert device.computed == [2]
    device.go.set()
    assert finish(slow, waiting)[0].tolist() == [1] * 3
    assert slow.counters.compute_s == {"linear": 0.005}  # as the device says
    slow.close()
    quick.close()


def test_a_client_has_so_many_calls_begun_and_no_more(
    device: Device, own: WorkerThread, shm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tsqp.wire.server, "MOST_BEGUN", 2)
    channel = connect(own, shm_folder)
    tickets = [
        begin(channel, torch.full((3,), float(layer)), group=WAITS, layer=layer)
        for layer in range(5)
    ]
    assert eventually(lambda: len(device.begun) == 3)  # the last of them waits for the first
    device.go.set()
    for layer, ticket in enumerate(tickets):
        assert finish(channel, ticket)[0].tolist() == [layer] * 3
    assert device.computed == device.begun == [0, 1, 2, 3, 4]
    channel.close()


def test_a_call_in_frames_is_complete_before_the_next_is_begun(
    device: Device, own: WorkerThread, shm_folder: Path
) -> None:
    channel = connect(own, shm_folder, shm_bytes=0)
    tickets = [begin(channel, torch.ones(3), group=WAITS, layer=layer) for layer in (0, 1)]
    assert eventually(lambda: bool(device.begun))
    assert device.begun == [0]
    device.go.set()
    assert [finish(channel, ticket)[0].tolist() for ticket in tickets] == [[1] * 3] * 2
    channel.close()


def test_a_device_that_fails_costs_one_call(
    device: Device, own: WorkerThread, shm_folder: Path
) -> None:
    channel = connect(own, shm_folder)
    failing = begin(channel, torch.ones(3), group=FAILS)
    following = begin(channel, torch.ones(3))
    with pytest.raises(RemoteError, match="the device is on fire"):
        finish(channel, failing)
    assert finish(channel, following)[0].tolist() == [1] * 3
    channel.close()


def test_a_session_knows_its_memory_as_long_as_it_is_mapped(
    device: Device, own: WorkerThread, shm_folder: Path
) -> None:
    channel = connect(own, shm_folder)
    begin(channel, torch.ones(3), group=WAITS)
    assert eventually(lambda: bool(device.begun))
    assert len(device.memory) == 1
    channel._send(Attach(mapped=True, poll=True))  # again: preparing memory takes long
    device.go.set()
    assert eventually(lambda: device.computed == [0])
    begin(channel, torch.ones(3), layer=1)
    assert eventually(lambda: device.computed == [0, 1])
    assert device.told == 1
    channel.close()
    assert eventually(lambda: device.memory == [])


def test_no_posted_call_overtakes_one_in_the_socket(
    device: Device, own: WorkerThread, shm_folder: Path
) -> None:
    channel = connect(own, shm_folder)
    long = begin(channel, *[torch.ones(1, 1, 1, 3)] * 8, group=WAITS)  # too long for the mailbox
    short = begin(channel, torch.ones(3), layer=1)
    assert channel._in_socket == {long, short}
    device.go.set()
    finish(channel, long)
    finish(channel, short)
    assert channel._in_socket == set()
    finish(channel, begin(channel, torch.ones(3), layer=2))
    assert device.begun == [0, 1, 2]
    channel.close()
