"""The shared memory that a worker makes for its sessions."""

from dataclasses import dataclass
from pathlib import Path

from tsqp.errors import WorkerUnavailable
from tsqp.wire.fixed_segment import FixedPlace, FixedSegment
from tsqp.wire.messages import Hello
from tsqp.wire.quotas import Quotas
from tsqp.wire.shm import NamedSegment, SealedSegment, free_bytes

OfferedSegment = SealedSegment | NamedSegment | FixedSegment


@dataclass(frozen=True, slots=True)
class Offers:
    """Makes segments.

    Attributes:
        folder: where segments with a name are.
        fixed: the place for clients that map memory only at a fixed place.
    """

    quotas: Quotas
    folder: Path
    fixed: FixedPlace | None = None

    def make(
        self, hello: Hello, held: int, *, may_seal: bool = True
    ) -> tuple[OfferedSegment | None, str]:
        """Make a segment for a new session.

        Args:
            held: bytes that the open sessions hold.
            may_seal: whether sealed memory is tried first.

        Returns:
            the segment or None, and why there is none, or why it is not sealed.
        """
        if not hello.shm_bytes:
            return None, ""
        if not self.quotas.max_shm_bytes:
            return None, "the worker was started with --no-shm"
        if hello.fixed_shm:
            if self.fixed is None:
                return None, "the worker was started without --shm-name"
            kinds: list[Path | FixedPlace | None] = [self.fixed]
        else:
            kinds = [None, self.folder] if may_seal else [self.folder]
        reasons: list[str] = []
        for kind in kinds:
            try:
                segment = self._make(kind, hello.shm_bytes, held)
                segment.write(hello.nonce)
                return segment, "; ".join(reasons)
            except WorkerUnavailable as exc:
                if (reason := f"the worker has {exc}") not in reasons:
                    reasons.insert(0, reason)
        return None, "; ".join(reasons)

    def _make(self, kind: Path | FixedPlace | None, wanted: int, held: int) -> OfferedSegment:
        if isinstance(kind, FixedPlace):
            if not kind.is_name:  # takes no memory of this machine that is not taken already
                size = min(wanted, self.quotas.max_shm_bytes)
                return FixedSegment.make(kind, size)
            free = free_bytes(kind.path.parent)
            return FixedSegment.make(kind, self.quotas.shm_bytes(wanted, held, free))
        size = self.quotas.shm_bytes(wanted, held, free_bytes(kind))
        return SealedSegment.create(size) if kind is None else NamedSegment.create(size, kind)
