"""The shared memory of a session, of which every byte that changes must be accounted for."""

from typing import Any

import numpy as np
import pytest

from tsqp.wire.client import RemoteChannel
from tsqp.wire.codec import worker_decoder
from tsqp.wire.mailbox import (
    FLAG_BYTES,
    HEADER_BYTES,
    MAILBOX_BYTES,
    RING_BYTES,
    SLOT_BYTES,
    SLOTS,
)
from tsqp.wire.messages import Call, Operation, TensorRef
from tsqp.wire.remote_call import RemoteCall
from tsqp.wire.shm import ALIGNMENT
from tsqp.wire.tensors import spec_of

FLAG = 8  # bytes of each side's flag; the rest of its cache line is never written
OUR_RING, THEIR_RING = 2 * FLAG_BYTES, 2 * FLAG_BYTES + RING_BYTES
THEIRS = [(FLAG_BYTES, FLAG_BYTES + FLAG), (THEIR_RING, THEIR_RING + RING_BYTES)]


class WatchedSegment:
    """Compares the whole segment before and after everything that the TEE does with it.

    The TEE may write its flag, the frames that it posts, and the inputs of a call between
    `reserve` and `submit`. The worker may write its flag, its ring, and the outputs of a call
    between `submit` and the end of `wait`. Nothing else may change at any time: not the rest of a
    ring's slot or of a flag's cache line, not the gaps between tensors, not an answer that is
    read, not memory that no call has.

    Attributes:
        operations: of all calls that were posted.
        looks: how often the segment was compared.
        gaps: how many bytes lay behind the tensors of calls, up to the next tensor's place.
    """

    def __init__(self, channel: RemoteChannel, monkeypatch: pytest.MonkeyPatch) -> None:
        segment, mailbox = channel._segment, channel._mailbox
        assert segment is not None and mailbox is not None
        self.operations: list[Operation] = []
        self.looks = self.gaps = 0
        self._segment = segment
        self._reserved: list[RemoteCall] = []  # whose inputs may be written
        self._submitted: list[RemoteCall] = []  # whose outputs may be
        self._frames: list[tuple[int, bytes]] = []  # posted since the last look, and where
        # So that a zero that is written is a change, too.
        noise = np.random.default_rng(0).bytes(segment.size - MAILBOX_BYTES)
        segment.write(noise)
        self._before = self._read()
        for name in ("reserve", "submit", "wait", "release"):
            between = getattr(self, f"_{name}")
            monkeypatch.setattr(channel, name, _calling(getattr(channel, name), between))
        monkeypatch.setattr(mailbox, "post", _calling(mailbox.post, self._post))

    def look(self) -> None:
        """Compare everything with the last look."""
        now = self._read()
        may_change = np.zeros(now.size, bool)
        for start, stop in (*self._ours(), *THEIRS):
            may_change[start:stop] = True
        changed = np.flatnonzero((now != self._before) & ~may_change)
        assert changed.size == 0, f"{changed.size} bytes were written, at {changed[:9].tolist()} …"
        assert int.from_bytes(now[:FLAG].tobytes(), "little") in (0, 1)
        for start, content in self._frames:
            assert now[start : start + len(content)].tobytes() == content
        self._frames.clear()
        self._before = now
        self.looks += 1

    def _read(self) -> np.ndarray:
        return np.frombuffer(self._segment.read(self._segment.size), np.uint8)

    def _ours(self) -> list[tuple[int, int]]:
        places = [(0, FLAG)]
        places += [(start, start + len(content)) for start, content in self._frames]
        for call in self._reserved:
            places += map(_place, call.refs[: len(call.inputs)])
        for call in self._submitted:
            places += map(_place, call.refs[len(call.inputs) :])
        return places

    def _reserve(self, reserve: Any, *arguments: Any) -> RemoteCall:
        self.look()
        call: RemoteCall = reserve(*arguments)
        assert call.place is not None  # else its tensors are not in the segment
        self._reserved.append(call)
        self.gaps += sum(-spec_of(ref).nbytes % ALIGNMENT for ref in call.refs)
        return call

    def _submit(self, submit: Any, call: RemoteCall) -> int:
        self.look()
        self._reserved.remove(call)
        self._submitted.append(call)
        ticket: int = submit(call)
        self.look()
        return ticket

    def _post(self, post: Any, frame: bytes) -> bool:
        _, message = worker_decoder().decode(frame)
        assert isinstance(message, Call)
        self.operations.append(message.operation)
        count = len(self.operations)
        header = np.array([count, len(frame)], "<u8").tobytes()
        assert len(header) == HEADER_BYTES
        self._frames.append((OUR_RING + count % SLOTS * SLOT_BYTES, header + frame))
        asleep: bool = post(frame)
        return asleep

    def _wait(self, wait: Any, *arguments: Any) -> RemoteCall:
        call: RemoteCall = wait(*arguments)
        self.look()
        self._submitted.remove(call)
        return call

    def _release(self, release: Any, call: RemoteCall) -> None:
        self.look()
        release(call)
        if call in self._reserved:  # it was given up
            self._reserved.remove(call)


def _calling(method: Any, between: Any) -> Any:
    return lambda *arguments: between(method, *arguments)


def _place(ref: TensorRef) -> tuple[int, int]:
    return ref.offset, ref.offset + spec_of(ref).nbytes
