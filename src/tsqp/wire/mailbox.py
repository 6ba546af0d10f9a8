"""Messages in shared memory that both sides poll, without system calls.

Waking an idle core takes longer than most calls, and a message through a socket wakes three
threads. On one machine, calls and answers therefore go through two small rings at the start of the
segment. Each side polls its ring for a bounded time before it sleeps on its socket. A sleeping side
sets a flag in the segment, and the peer then wakes it through the socket.

The rings hold the same frames as the socket. A frame is copied out once and then decoded by the
same rules. A frame is written before the sequence number of its slot and read after it, in the
order that `tsqp.wire.shared_words` guarantees.
"""

from typing import Literal

import numpy as np

from tsqp.wire.patience import Patience
from tsqp.wire.shared_words import CAN_ORDER, announce, await_word, publish, spins_in

SLOTS = 16
SLOT_BYTES = 256
HEADER_BYTES = 16  # sequence number and length
MAX_FRAME = SLOT_BYTES - HEADER_BYTES
RING_BYTES = SLOTS * SLOT_BYTES
FLAG_BYTES = 64  # one cache line per flag
MAILBOX_BYTES = 2 * FLAG_BYTES + 2 * RING_BYTES
CAN_POLL = CAN_ORDER
SPIN_S = 50e-6  # how long a side keeps its core while it polls; a call to a fast GPU takes less
MAX_SKIPPED = 64  # takes without spinning after spinning was of no use
YIELDS = 64  # looks of one `linger`, each after offering the core

Side = Literal["tee", "worker"]


def prepare() -> None:
    """Compile what a mailbox needs, which takes up to a second; does nothing the second time."""
    spins_in(SPIN_S)
    publish.compile()
    announce.compile()


class _Ring:
    """A ring for one writer and one reader. At most SLOTS frames are unread."""

    def __init__(self, memory: memoryview, address: int) -> None:
        self._bytes = memory
        self._words = memory.cast("Q")
        self._address = address
        self._count = 0  # number of frames written or read so far
        self._publish, self._await = publish.function, await_word.function

    def put(self, frame: bytes, flag: int) -> int:
        """Write a frame, and then load the word at address `flag`."""
        self._count = count = self._count + 1
        start = count % SLOTS * SLOT_BYTES
        self._bytes[start + HEADER_BYTES : start + HEADER_BYTES + len(frame)] = frame
        self._words[start // 8 + 1] = len(frame)
        # The sequence number must be last: now the reader may read the slot.
        return int(self._publish(self._address + start, count, flag))

    @property
    def has_frame(self) -> bool:
        word = (self._count + 1) % SLOTS * SLOT_BYTES // 8
        return self._words[word] == self._count + 1

    def await_frame(self, spins: int, yields: int) -> bool:
        """Whether the next frame is there after so many looks; see `await_word`."""
        count = self._count + 1
        found: bool = self._await(self._address + count % SLOTS * SLOT_BYTES, count, spins, yields)
        return found

    def take(self, spins: int = 0) -> bytes | None:
        count = self._count + 1
        start = count % SLOTS * SLOT_BYTES
        if not self._await(self._address + start, count, spins, 0):
            return None
        self._count = count
        length = self._words[start // 8 + 1]
        # An impossible length gives an empty frame, which the codec refuses.
        end = start + HEADER_BYTES + (length if length <= MAX_FRAME else 0)
        return bytes(self._bytes[start + HEADER_BYTES : end])


class Mailbox:
    """One side's access to the two rings and the two flags."""

    def __init__(self, memory: memoryview, side: Side) -> None:
        """Use the first MAILBOX_BYTES of a segment, which must be zero at first."""
        prepare()
        self._memory = np.frombuffer(memory, np.uint8)  # keeps the addresses below valid
        address = self._memory.ctypes.data
        out, back = (
            _Ring(memory[start : start + RING_BYTES], address + start)
            for start in (2 * FLAG_BYTES, 2 * FLAG_BYTES + RING_BYTES)
        )
        mine = 0 if side == "tee" else 1
        self._out, self._in = (out, back) if side == "tee" else (back, out)
        self._my_flag = address + mine * FLAG_BYTES
        self._peer_flag = address + (1 - mine) * FLAG_BYTES
        self._spins = spins_in(SPIN_S)
        self._patience = Patience(MAX_SKIPPED)

    def post(self, frame: bytes) -> bool:
        """Post a frame of at most MAX_FRAME bytes to the peer.

        Returns:
            whether the peer sleeps and must be woken through the socket.
        """
        return self._out.put(frame, self._peer_flag) != 0

    def take(self) -> bytes | None:
        """A private copy of the next frame, if there is one."""
        return self._in.take()

    def take_soon(self) -> bytes | None:
        """A private copy of the next frame, if it comes within SPIN_S.

        This keeps the core, which the peer may need. So it waits only if that was of use the last
        time, and once in MAX_SKIPPED times otherwise.
        """
        if self._in.has_frame or not self._patience.may_poll():
            return self._in.take()
        frame = self._in.take(self._spins)
        self._patience.note(polled=True, useful=frame is not None)
        return frame

    def linger(self, yields: int = YIELDS) -> bool:
        """Offer the core to others so many times, or until there is mail; whether there is."""
        return self._in.await_frame(0, yields)

    @property
    def has_mail(self) -> bool:
        return self._in.has_frame

    def say_asleep(self, asleep: bool) -> None:
        """Tell the peer whether this side sleeps. Check for mail once more before sleeping."""
        announce(self._my_flag, int(asleep))
