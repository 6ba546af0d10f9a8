"""Host memory that is registered with the CUDA driver, so that a device copies it directly.

Registered pages stay where they are, and copies from and to them need no staging and return at
once. It is an attempt: a driver may refuse, always on GPUs in confidential-computing mode, and
sometimes for large ranges. Copies then go through the driver's own buffer.
"""

import logging
from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import Tensor

log = logging.getLogger("tsqp")

CHUNK = 256 * 2**20  # bytes of one registration
PORTABLE = 1  # cudaHostRegisterPortable: for every context of this process


class RegisteredMemory:
    """A range of host memory, registered as far as the driver allows it.

    A copy must not cross from one registration to another, or to memory that is not registered: the
    driver refuses it. So `pieces` divides copies.

    Args:
        memory: uint8, one dimension. It must stay mapped until `unregister`.
    """

    def __init__(self, memory: Tensor, device: torch.device) -> None:
        self._start = memory.data_ptr()
        self._end = self._start + memory.nbytes
        self._registered: list[int] = []  # where each chunk begins
        for first in range(self._start, self._end, CHUNK):
            if not self._register(first, min(CHUNK, self._end - first)):
                _clear_error(device)
                break
            self._registered.append(first)

    @property
    def registered_bytes(self) -> int:
        """How many bytes, from the first on, are registered."""
        return min(len(self._registered) * CHUNK, self._end - self._start)

    def pieces(self, tensor: Tensor) -> Iterator[slice]:
        """Bytes of a contiguous tensor, divided where a registration ends."""
        start = tensor.data_ptr()
        done, size = 0, tensor.nbytes
        while done < size:
            end = size
            if self._start <= start + done < self._end:
                end = min(size, done + CHUNK - (start + done - self._start) % CHUNK)
            yield slice(done, end)
            done = end

    def unregister(self) -> None:
        """Before the memory is unmapped, and after the last copy has ended."""
        while self._registered:
            first = self._registered.pop()
            try:
                code = int(torch.cuda.cudart().cudaHostUnregister(first))
            except Exception as exc:  # the runtime is broken
                log.debug("shared memory stays registered (%s)", type(exc).__name__)
            else:
                if code:
                    log.debug("shared memory stays registered (CUDA error %d)", code)

    def _register(self, first: int, size: int) -> bool:
        try:
            code = int(torch.cuda.cudart().cudaHostRegister(first, size, PORTABLE))
        except Exception as exc:  # the runtime is broken
            log.debug("shared memory is not registered (%s): plain copies", type(exc).__name__)
            return False
        if code:
            log.debug("shared memory is not registered (CUDA error %d): plain copies", code)
        return not code


def _clear_error(device: torch.device) -> None:
    """The runtime keeps a refusal as its last error, and the next launch would report it."""
    with suppress(RuntimeError):
        torch.empty(1, device=device).fill_(0)
