"""Which worker holds which shard: asked before anything is loaded, and checked in the sessions."""

from collections.abc import Sequence

from tsqp.errors import HandshakeError, UsageError, WorkerError
from tsqp.runtime.options import WORKER_HINTS, Options
from tsqp.runtime.worker_link import WorkerProcess
from tsqp.wire.channel import Channel


def count_shards(workers: Sequence[WorkerProcess], options: Options) -> int:
    """How many shards the model is cut into; 1 if each worker holds the whole model.

    The first worker that answers decides, and its session checks what it says.

    Raises:
        WorkerError: none answers, for example because all of them still load their model.
        HandshakeError: there are not as many workers as shards.
        UsageError: the options do not allow shards.
    """
    may_replicate = options.privacy == "pad"
    if options.privacy not in ("pad", "open") or len(workers) < 2:
        return 1
    unanswered: WorkerError | None = None
    for worker in workers:
        try:
            shard = worker.held_shard()
        except WorkerError as error:
            unanswered = unanswered or error
            continue
        if shard.is_whole:
            return 1
        if shard.count > len(workers):
            raise HandshakeError(
                f"The worker at {worker.endpoint} holds {shard}, but {len(workers)} workers are "
                f"given; give one or more for each of the {shard.count} shards."
            )
        if shard.count != len(workers) and not may_replicate:
            raise HandshakeError(
                f"The worker at {worker.endpoint} holds {shard}, but {len(workers)} --worker are "
                "given; --privacy open takes one worker for each shard, because only pad notices "
                "a replica that computes wrongly."
            )
        _check_options(options)
        return shard.count
    assert unanswered is not None
    raise unanswered


def in_order_of_shards(channels: Sequence[Channel]) -> list[Channel]:
    """The sessions with all shards of a model, in the order of their features.

    Args:
        channels: each to one of as many shards as there are channels.

    Raises:
        HandshakeError: two workers hold the same shard, so another one is missing.
    """
    found: dict[int, Channel] = {}
    for channel in channels:
        number = channel.welcome.shard
        other = found.setdefault(number, channel)
        if other is not channel:
            raise HandshakeError(
                f"The workers at {other.endpoint} and {channel.endpoint} both hold shard {number} "
                f"of {len(channels)}; give one worker for each shard."
            )
    return [found[number] for number in sorted(found)]


def _check_options(options: Options) -> None:
    if options.gpu_attention or options.fuse_layers:
        raise UsageError(
            "Workers with shards only run linear layers; leave --attention gpu and --fuse layer "
            "out, or use a worker of the whole model."
        )
    if options.hints == WORKER_HINTS:
        raise UsageError(
            "Workers with shards do not make hints; leave --hints worker out, or give a file of "
            "`tsqp prepare --hints`."
        )
    if options.shm_name is not None:
        raise UsageError(
            "--shm-name is the place of one worker's memory, and each shard has a worker; leave it "
            "out."
        )
