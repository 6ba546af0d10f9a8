"""Nonces of a key broker, which remembers only those that were used.

A nonce holds its time and a code that only the broker can make. So giving one out takes no memory,
and nobody can displace the nonce of somebody else by asking for many.
"""

import hashlib
import hmac
import secrets
from collections import OrderedDict

from tsqp.api.key_release import NONCE_BYTES
from tsqp.client import clock
from tsqp.errors import AttestationError

NONCE_S = 60.0
MAX_USED = 100_000  # in NONCE_S; more requests than that do not fit through a broker
_TIME_BYTES = 8
_RANDOM_BYTES = 8
_CODE_BYTES = NONCE_BYTES - _TIME_BYTES - _RANDOM_BYTES


class Nonces:
    """Nonces that are good once, and for a minute."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)
        self._begin = clock.seconds()
        self._used: OrderedDict[bytes, float] = OrderedDict()  # until when it would be good

    def new(self) -> bytes:
        """A new one."""
        time = int((clock.seconds() - self._begin) * 1000).to_bytes(_TIME_BYTES, "big")
        head = time + secrets.token_bytes(_RANDOM_BYTES)
        return head + self._code(head)

    def take(self, nonce: bytes) -> None:
        """Use a nonce.

        Raises:
            AttestationError: it is not of this broker, too old, or was used.
        """
        head, code = nonce[:-_CODE_BYTES], nonce[-_CODE_BYTES:]
        if len(nonce) != NONCE_BYTES or not hmac.compare_digest(code, self._code(head)):
            raise AttestationError("The evidence is not over a nonce of this broker.")
        now = clock.seconds()
        end = self._begin + int.from_bytes(head[:_TIME_BYTES], "big") / 1000 + NONCE_S
        if end < now:
            raise AttestationError(f"The nonce is older than {NONCE_S:g} seconds: ask again.")
        while self._used and next(iter(self._used.values())) < now:
            self._used.popitem(last=False)
        if nonce in self._used:
            raise AttestationError("The nonce was used before: ask for another one.")
        if len(self._used) >= MAX_USED:  # forgetting one would let it be used again
            raise AttestationError("Too many nonces were used in the last minute.")
        # Kept a whole minute from now, so that the oldest entries are those that end first.
        self._used[nonce] = now + NONCE_S

    def _code(self, head: bytes) -> bytes:
        return hmac.digest(self._key, head, hashlib.sha256)[:_CODE_BYTES]
