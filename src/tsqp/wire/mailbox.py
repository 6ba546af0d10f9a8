"""Messages in shared memory that both sides poll, without a system call or a thread to wake.

Waking an idle core costs more than most calls, and a message through a socket wakes three threads.
So on one machine, calls and answers are in two small rings at the start of the segment. Each side
polls them for a bounded time before it goes to sleep on its socket. A side that sleeps says so in
the segment, and is then woken through the socket.

The rings hold the same frames as the socket does, and what is taken from them is copied once
and decoded by the same rules. x86 only: its stores become visible in order.
"""

import platform
import threading
from typing import Literal

SLOTS = 16
SLOT_BYTES = 256
HEADER_BYTES = 16  # sequence number and length
MAX_FRAME = SLOT_BYTES - HEADER_BYTES
RING_BYTES = SLOTS * SLOT_BYTES
FLAG_BYTES = 64  # a cache line for each side's flag
MAILBOX_BYTES = 2 * FLAG_BYTES + 2 * RING_BYTES
CAN_POLL = platform.machine() in ("x86_64", "AMD64")

Side = Literal["tee", "worker"]


class _Ring:
    """One writer, one reader. The writer never has more than SLOTS frames unread."""

    def __init__(self, memory: memoryview) -> None:
        self._bytes = memory
        self._words = memory.cast("Q")
        self._count = 0  # frames written, or read

    def put(self, frame: bytes) -> None:
        self._count += 1
        start = self._count % SLOTS * SLOT_BYTES
        self._bytes[start + HEADER_BYTES : start + HEADER_BYTES + len(frame)] = frame
        self._words[start // 8 + 1] = len(frame)
        self._words[start // 8] = self._count  # last: from here on the reader may look

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
        # A length that cannot be gives an empty frame, which the codec refuses.
        end = start + HEADER_BYTES + (length if length <= MAX_FRAME else 0)
        return bytes(self._bytes[start + HEADER_BYTES : end])


class Mailbox:
    """One side's view of the two rings and the two flags."""

    def __init__(self, memory: memoryview, side: Side) -> None:
        """Use the first MAILBOX_BYTES of a segment, which begin as zeros."""
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
            whether the peer sleeps, and must be woken through the socket.
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
        """Tell the peer that this side sleeps. Look for mail once more before going to sleep."""
        self._flags[self._my_flag] = asleep
        self._order()

    def _order(self) -> None:
        """Keep the store before and the load after in order: taking a lock is a full barrier."""
        with self._fence:
            pass
