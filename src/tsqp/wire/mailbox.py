"""Messages in shared memory that both sides poll, without system calls.

Waking an idle core takes longer than most calls, and a message through a socket wakes three
threads. On one machine, calls and answers therefore go through two small rings at the start of the
segment. Each side polls its ring for a bounded time before it sleeps on its socket. A sleeping side
sets a flag in the segment, and the peer then wakes it through the socket.

The rings hold the same frames as the socket. A frame is copied out once and then decoded by the
same rules. This works only on x86, because only there do stores become visible in order.
"""

import platform
import threading
from typing import Literal

SLOTS = 16
SLOT_BYTES = 256
HEADER_BYTES = 16  # sequence number and length
MAX_FRAME = SLOT_BYTES - HEADER_BYTES
RING_BYTES = SLOTS * SLOT_BYTES
FLAG_BYTES = 64  # one cache line per flag
MAILBOX_BYTES = 2 * FLAG_BYTES + 2 * RING_BYTES
CAN_POLL = platform.machine() in ("x86_64", "AMD64")

Side = Literal["tee", "worker"]


class _Ring:
    """A ring for one writer and one reader. At most SLOTS frames are unread."""

    def __init__(self, memory: memoryview) -> None:
        self._bytes = memory
        self._words = memory.cast("Q")
        self._count = 0  # number of frames written or read so far

    def put(self, frame: bytes) -> None:
        self._count += 1
        start = self._count % SLOTS * SLOT_BYTES
        self._bytes[start + HEADER_BYTES : start + HEADER_BYTES + len(frame)] = frame
        self._words[start // 8 + 1] = len(frame)
        self._words[start // 8] = self._count  # must be last: now the reader may read the slot

    @property
    def has_frame(self) -> bool:
        word = (self._count + 1) % SLOTS * SLOT_BYTES // 8
        return self._words[word] == self._count + 1

    def take(self) -> bytes | None:
        if not self.has_frame:
            return None
        self._count += 1
        start = self._count % SLOTS * SLOT_BYTES
        length = self._words[start // 8 + 1]
        # An impossible length gives an empty frame, which the codec refuses.
        end = start + HEADER_BYTES + (length if length <= MAX_FRAME else 0)
        return bytes(self._bytes[start + HEADER_BYTES : end])


class Mailbox:
    """One side's access to the two rings and the two flags."""

    def __init__(self, memory: memoryview, side: Side) -> None:
        """Use the first MAILBOX_BYTES of a segment, which must be zero at first."""
        flags = memory[: 2 * FLAG_BYTES].cast("Q")
        rings = [
            _Ring(memory[start : start + RING_BYTES])
            for start in (2 * FLAG_BYTES, 2 * FLAG_BYTES + RING_BYTES)
        ]
        mine = 0 if side == "tee" else 1
        self._out, self._in = rings[mine], rings[1 - mine]
        self._flags = flags
        self._my_flag, self._peer_flag = mine * FLAG_BYTES // 8, (1 - mine) * FLAG_BYTES // 8
        self._fence = threading.Lock()

    def post(self, frame: bytes) -> bool:
        """Post a frame of at most MAX_FRAME bytes to the peer.

        Returns:
            whether the peer sleeps and must be woken through the socket.
        """
        self._out.put(frame)
        self._order()
        return bool(self._flags[self._peer_flag])

    def take(self) -> bytes | None:
        """A private copy of the next frame, if there is one."""
        return self._in.take()

    @property
    def has_mail(self) -> bool:
        return self._in.has_frame

    def say_asleep(self, asleep: bool) -> None:
        """Tell the peer whether this side sleeps. Check for mail once more before sleeping."""
        self._flags[self._my_flag] = asleep
        self._order()

    def _order(self) -> None:
        """Prevent reordering of the store before and the load after: a lock is a full barrier."""
        with self._fence:
            pass
