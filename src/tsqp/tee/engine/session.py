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
        rebuild: makes a new offload, or raises TSQPError; None if there is no way to make one.

    Attributes:
        offload: the present one.
        kv: the keys and values of its sequences. A new offload keeps them if they are in the TEE.
    """

    def __init__(
        self,
        offload: Offload,
        config: ModelConfig,
        decoder: Decoder,
        rebuild: Callable[[], Offload] | None,
    ) -> None:
        self.offload = offload
        self.kv = SequenceKv(offload.kv, config)
        self._config = config
        self._decoder = decoder
        self._rebuild = rebuild

    def replace(self, error: TSQPError) -> bool:
        """Make a new offload after the end of a session; False if there is no new one.

        Only a lost worker is tried again, and not one that broke the protocol or sent a wrong
        product. A wrong lattice mask is not tried again either.
        """
        if not self._begin(error):
            self.kv.drop()
            return False
        if self.offload.kv is not self.kv.kv:
            self.kv.drop()
            self.kv = SequenceKv(self.offload.kv, self._config)
        self._decoder.most_scores = self.offload.most_scores
        log.warning("a new session with the worker has begun, because the last one was lost")
        return True

    def close(self) -> None:
        """Close the offload, and make no other; safe to call twice."""
        self._rebuild = None
        self.offload.close()

    def _begin(self, error: TSQPError) -> bool:
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
        return True
