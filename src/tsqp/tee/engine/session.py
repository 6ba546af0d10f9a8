"""The offload of an engine, which a new one replaces after its worker was lost."""

import logging
from collections.abc import Callable
from contextlib import suppress

from tsqp.errors import IntegrityError, LatticeError, ProtocolError, TSQPError, WorkerLost
from tsqp.tee.offload.offload import Offload

log = logging.getLogger("tsqp")

# After these errors the session with a worker is over, and its offload cannot be used any more.
SESSION_OVER = (WorkerLost, ProtocolError, IntegrityError, LatticeError)


class Session:
    """Holds an offload, and replaces it where that may be done.

    Args:
        rebuild: makes a new offload, or raises TSQPError; None if there is no way to make one.

    Attributes:
        offload: the present one.
    """

    def __init__(self, offload: Offload, rebuild: Callable[[], Offload] | None) -> None:
        self.offload = offload
        self._rebuild = rebuild

    def replace(self, error: TSQPError) -> bool:
        """Make a new offload after the end of a session; False if there is no new one.

        Only a lost worker is tried again, and not one that broke the protocol or sent a wrong
        product. A wrong lattice mask is not tried again either.
        """
        if not isinstance(error, WorkerLost):
            self._rebuild = None  # and with it the check vectors that it may hold
        if self._rebuild is None:
            return False
        with suppress(TSQPError):  # with its masks, before there are more
            self.offload.close()
        try:
            self.offload = self._rebuild()
        except TSQPError as cause:
            if isinstance(cause, SESSION_OVER) and not isinstance(cause, WorkerLost):
                self._rebuild = None
            log.warning("no new session with the worker: %s", cause)
            return False
        log.warning("a new session with the worker has begun, because the last one was lost")
        return True

    def close(self) -> None:
        """Close the offload, and make no other; safe to call twice."""
        self._rebuild = None
        self.offload.close()
