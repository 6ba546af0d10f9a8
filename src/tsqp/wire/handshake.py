"""Checks that both sides agree before the first call. Each side runs these checks."""

import hmac
import re

from tsqp.errors import HandshakeError
from tsqp.wire.messages import Hello, Welcome

_OTHER_DTYPE = re.compile(r"the worker computes in (float32|float16|bfloat16) and")
_OTHER_WEIGHTS = re.compile(r"the worker holds other weights \(digest ([0-9a-f]{12})…")


def read_refusal(reason: str) -> tuple[str | None, str | None]:
    """Read the worker's dtype, or the first digits of its digest, from `check_agreement`'s refusal.

    Both are None if the client was refused for another reason.
    """
    dtype, digest = _OTHER_DTYPE.search(reason), _OTHER_WEIGHTS.search(reason)
    return dtype and dtype[1], digest and digest[1]


def check_agreement(hello: Hello, welcome: Welcome) -> None:
    """Raise HandshakeError unless the worker serves what the client needs."""
    if welcome.dtype != hello.dtype:
        raise HandshakeError(
            f"the worker computes in {welcome.dtype} and this side in {hello.dtype}; "
            "start both with the same --dtype."
        )
    if not hmac.compare_digest(welcome.weights_digest, hello.weights_digest):
        raise HandshakeError(
            f"the worker holds other weights (digest {welcome.weights_digest[:12]}…, here "
            f"{hello.weights_digest[:12]}…); start both with the same model."
        )
    missing = sorted(set(hello.abilities) - set(welcome.abilities))
    if missing:
        raise HandshakeError(
            f"the worker cannot do {', '.join(missing)}; "
            "install the same tsqp version on both sides."
        )
