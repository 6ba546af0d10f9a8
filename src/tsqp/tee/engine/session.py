"""The offload of an engine and its keys and values; replaced after its worker was lost."""

import logging
from collections.abc import Callable
from contextlib import suppress

from tsqp.errors import IntegrityError, LatticeError, ProtocolError, TSQPError, WorkerLost
from tsqp.model.config import ModelConfig
from tsqp.tee.decoder import Decoder
from tsqp.tee.engine.sequence_kv import SequenceKv
from tsqp.tee.offload.offload import Offload

log = logging.getLogger("tsqp")

# After these errors the session with a worker is over, and its offload cannot be used any more.
SESSION_OVER = (WorkerLost, ProtocolError, IntegrityError, LatticeError)


class Session:
    """Holds an offload, and replaces it where that may be done.

    Args:
        rebuild: makes a new offload after the session of the last one ended with an error, or
            raises TSQPError: one of SESSION_OVER except WorkerLost if there will never be another.
            None if there is no way to make one.

    Attributes:
        offload: the present one.
        kv: the keys and values of its sequences. A new offload keeps them if they are in the TEE.
    """

    def __init__(
        self,
        offload: Offload,
        config: ModelConfig,
        decoder: Decoder,
        rebuild: Callable[[TSQPError], Offload] | None,
    ) -> None:
        self.offload = offload
        self.kv = SequenceKv(offload.kv, config)
        self._config = config
        self._decoder = decoder
        self._rebuild = rebuild

    def replace(self, error: TSQPError) -> TSQPError | None:
        """Make a new offload after the end of a session.

        `rebuild` decides which worker it is with. A wrong lattice mask is not the worker's fault,
        so then there is none.

        Returns:
            None, or the error of the requests if there is no new offload.
        """
        if (failure := self._begin(error)) is not None:
            self.kv.drop()
            return failure
        if self.offload.kv is not self.kv.kv:
            self.kv.drop()
            self.kv = SequenceKv(self.offload.kv, self._config)
        self._decoder.most_scores = self.offload.most_scores
        log.warning("a new session with the worker has begun, because the last one ended")
        return None

    def close(self) -> None:
        """Close the offload, and make no other; safe to call twice."""
        self._rebuild = None
        self.offload.close()

    def _begin(self, error: TSQPError) -> TSQPError | None:
        if isinstance(error, LatticeError):
            self._rebuild = None  # and with it the check vectors that it may hold
        if self._rebuild is None:
            return error
        with suppress(TSQPError):  # with its masks, before there are more
            self.offload.close()
        try:
            self.offload = self._rebuild(error)
        except TSQPError as cause:
            log.warning("no new session with the worker: %s", str(cause))  # no traceback is kept
            if isinstance(cause, SESSION_OVER) and not isinstance(cause, WorkerLost):
                self._rebuild = None
                return error
            # The worker that lied is not the reason any more: another one may be there later.
            return error if isinstance(error, WorkerLost) else cause
        return None
