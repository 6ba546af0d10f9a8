"""Checks that both sides agree before the first call. Each side runs these checks."""

import hmac
import re
from typing import NamedTuple

from tsqp.errors import HandshakeError, WorkerUnavailable
from tsqp.model.shard import MAX_SHARDS, WHOLE, Shard
from tsqp.wire.messages import Hello, Welcome

_OTHER_DTYPE = re.compile(r"the worker computes in (float32|float16|bfloat16) and")
_OTHER_WEIGHTS = re.compile(
    r"the worker holds (?:other weights|shard ([0-9]{1,2}) of ([0-9]{1,2})) "
    r"\(digest ([0-9a-f]{12})…"
)


def no_answer(endpoint: object) -> WorkerUnavailable:
    """The error for a worker that does not answer the first message."""
    return WorkerUnavailable(
        f"The worker at {endpoint} accepts connections but does not answer; "
        "wait if it is still loading its model, else look at its output."
    )


class Refusal(NamedTuple):
    """What the refusal of `check_agreement` tells about a worker.

    Attributes:
        dtype: the worker's dtype, if that is why.
        digest: the first digits of its digest, if that or the shard is why.
        shard: which shard it holds; the whole model unless the refusal says otherwise.
    """

    dtype: str | None
    digest: str | None
    shard: Shard


def read_refusal(reason: str) -> Refusal:
    """Read a worker's refusal. The texts come from the worker, and may be lies."""
    dtype, weights = _OTHER_DTYPE.search(reason), _OTHER_WEIGHTS.search(reason)
    shard = WHOLE
    if weights is not None and weights[1] is not None:
        number, count = int(weights[1]), int(weights[2])
        if 1 <= number <= count <= MAX_SHARDS:
            shard = Shard(number, count)
    return Refusal(dtype and dtype[1], weights and weights[3], shard)


def check_agreement(hello: Hello, welcome: Welcome) -> None:
    """Raise HandshakeError unless the worker serves what the client needs."""
    if welcome.dtype != hello.dtype:
        raise HandshakeError(
            f"the worker computes in {welcome.dtype} and this side in {hello.dtype}; "
            "start both with the same --dtype."
        )
    wanted = _wanted_digest(hello, welcome)
    if not hmac.compare_digest(welcome.weights_digest, wanted):
        raise HandshakeError(
            f"the worker holds other weights (digest {welcome.weights_digest[:12]}…, here "
            f"{wanted[:12]}…); start both with the same model."
        )
    missing = sorted(set(hello.abilities) - set(welcome.abilities))
    if missing:
        raise HandshakeError(
            f"the worker cannot do {', '.join(missing)}; "
            "install the same tsqp version on both sides."
        )


def _wanted_digest(hello: Hello, welcome: Welcome) -> str:
    """The digest that the worker's shard must have."""
    number, count = welcome.shard, welcome.shards
    if number > count:
        raise HandshakeError(f"the worker names shard {number} of {count}; do not trust it.")
    if count != max(1, len(hello.shard_digests)):
        held = "the whole model" if count == 1 else f"shard {number} of {count}"
        wanted = f"one of {len(hello.shard_digests)} shards"
        raise HandshakeError(
            f"the worker holds {held} (digest {welcome.weights_digest[:12]}…), and this side needs "
            f"{wanted if hello.shard_digests else 'the whole model'}; give --worker for each "
            "shard of one model, or workers of the whole model only."
        )
    return hello.shard_digests[number - 1] if hello.shard_digests else hello.weights_digest
