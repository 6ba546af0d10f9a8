"""The TEE maps the shared memory that a worker offers."""

import hmac
from pathlib import Path

from tsqp.errors import WorkerUnavailable
from tsqp.wire.codec import printable
from tsqp.wire.fixed_segment import FixedSegment
from tsqp.wire.messages import FixedRef, Hello, SealedRef, SegmentRef
from tsqp.wire.shm import MIN_SEGMENT, NamedSegment, SealedSegment, Segment


def map_offered(
    ref: SealedRef | SegmentRef | FixedRef | None,
    reason: str,
    hello: Hello,
    folder: Path,
    fixed: Path | None = None,
) -> tuple[Segment | None, str]:
    """Map what a worker offers, if it can be used.

    Args:
        ref: the offered segment, or None.
        reason: the worker's reason if there is none, or if it is not sealed.
        hello: what the TEE asked for.
        folder: the folder of segments with a name.
        fixed: the only path that may be opened; None if no path was fixed.

    Returns:
        the mapped segment or None, and the reason to report.
    """
    reason = printable(reason)
    if ref is None:
        return None, reason or "the worker offers no shared memory"
    try:
        if not MIN_SEGMENT <= ref.size <= hello.shm_bytes:
            raise WorkerUnavailable("the worker offers a segment of another size than asked")
        segment = _open(ref, folder, fixed)
        if not hmac.compare_digest(segment.read(len(hello.nonce)), hello.nonce):
            raise WorkerUnavailable("the worker offers a segment that belongs to somebody else")
    except WorkerUnavailable as exc:
        return None, str(exc)
    place = "of sealed memory" if isinstance(ref, SealedRef) else f"in {folder}"
    if fixed is not None:
        place = f"at {fixed}"
    return segment, "; ".join(filter(None, [f"{ref.size} bytes {place}", reason]))


def _open(ref: SealedRef | SegmentRef | FixedRef, folder: Path, fixed: Path | None) -> Segment:
    if isinstance(ref, FixedRef) != (fixed is not None):
        raise WorkerUnavailable("the worker offers a segment at another place than asked")
    if fixed is not None:
        return FixedSegment.open(fixed, ref.size)
    if isinstance(ref, SealedRef):
        return SealedSegment.open(ref.pid, ref.descriptor, ref.size)
    assert isinstance(ref, SegmentRef)
    return NamedSegment.open(ref.name, ref.size, folder)
