"""A small sample of what a worker received for a request, next to the values that it stands for.

Off by default: it keeps activations in memory for a while, so that a user can look at them. Shape
suffixes: T rows of one call; D input features; B bytes of a row; R rows and C columns of a sample.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Generic

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tsqp.algebra import residue_bytes
from tsqp.algebra.params import Field
from tsqp.errors import IntegrityError
from tsqp.model.linear_group import LinearGroup
from tsqp.nn.attention import Segment
from tsqp.tee.crypto.row_pool import RowPool
from tsqp.tee.engine.sequence import Chunk
from tsqp.tee.offload.masked import Group, Kept, PrivateOffload
from tsqp.tee.offload.offload import Attention, Linear, Pending, Request

ROWS = COLUMNS = 64  # of a sample, at most
KEPT_S = 60.0  # after its last row
MOST_REQUESTS = 64  # of which samples are kept; the oldest one is dropped
WIDEST = 3.0  # plain values are shown up to so many times their root mean square

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Sample:
    """The last rows of one request, one for each token, and the first columns of them.

    Attributes:
        group: whose input they are.
        masked_RC: what left the trusted side, scaled from [0, p) to bytes.
        plain_RC: what would have left in `open`, scaled to bytes; 128 is zero.
    """

    group: LinearGroup
    masked_RC: Bytes
    plain_RC: Bytes


@dataclass(slots=True)
class _Rows:
    """Rows of one request, the newest last."""

    sequence: int
    expires: float
    masked_C: deque[Bytes] = field(default_factory=lambda: deque(maxlen=ROWS))
    plain_C: deque[NDArray[np.float32]] = field(default_factory=lambda: deque(maxlen=ROWS))


class WorkerView:
    """Samples of the requests of the last minute, by tenant and request id.

    The thread that computes calls everything but `sample`, which any thread may call.

    Args:
        clock: returns seconds.

    Attributes:
        group: the inputs of this group are sampled. None where nothing is masked.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self.group: LinearGroup | None = None
        self._clock = clock
        self._lock = threading.Lock()
        self._requests: dict[tuple[str, str], _Rows] = {}  # the one that began last is last
        self._sequences: dict[int, int] = {}  # of this step, by the id of their KV
        self._attended: list[int | None] = []  # the sequence of each row that was attended to
        self._sent: Iterator[int | None] | None = None  # the same for the rows that go out now

    def began(self, sequence: int, tenant: str, request_id: str) -> None:
        """Sample a sequence for a request, and forget an earlier request with the same id."""
        with self._lock:
            self._forget_old()
            self._requests.pop((tenant, request_id), None)
            while len(self._requests) >= MOST_REQUESTS:
                del self._requests[next(iter(self._requests))]
            self._requests[tenant, request_id] = _Rows(sequence, self._clock() + KEPT_S)

    def sample(self, tenant: str, request_id: str) -> Sample | None:
        """What there is of a request of this tenant; None if there is nothing (any more)."""
        with self._lock:
            self._forget_old()
            rows = self._requests.get((tenant, request_id))
            if rows is None or not rows.masked_C or self.group is None:
                return None
            masked_RC, plain_RC = np.stack(rows.masked_C), np.stack(rows.plain_C)
        return Sample(self.group, masked_RC, _as_bytes(plain_RC))

    def begin_step(self, chunks: Sequence[Chunk]) -> None:
        """Take note of which sequences are computed now."""
        self._sequences = {each.sequence.kv_id: each.sequence.id for each in chunks}

    def attended(self, layer: int, segments: Sequence[Segment]) -> None:
        """Take note of whose rows go out next: the input of "o" is the output of attention."""
        if self.group is not None and layer == self.group.layer:
            self._attended = [
                self._sequences.get(each.sequence) for each in segments for _ in range(each.length)
            ]

    def watch(
        self, groups: Mapping[LinearGroup, Group[Kept]], num_layers: int
    ) -> dict[LinearGroup, Group[Kept]]:
        """The same groups; one that follows attention, in the middle of the model, is sampled.

        Not in the last layer, if there are others: most rows of a prompt end before it.
        """
        place = (num_layers - 1) // 2, "o"
        [self.group] = [group for group in groups if (group.layer, group.name) == place]
        return {**groups, self.group: WatchedGroup(groups[self.group], self)}

    @contextmanager
    def sending(self, request: Linear) -> Iterator[None]:
        """While a request is being sent. Rows that are sent later, after an answer, are left out.

        Nothing is sampled unless it is certain whose rows they are.
        """
        if request.group == self.group:
            owners, self._attended = self._attended, []
            if len(owners) == len(request.x_TD):
                self._sent = iter(owners)
        try:
            yield
        finally:
            self._sent = None

    def masked(self, x_TD: Tensor, c_TB: Tensor, residues: Field) -> None:
        """Take the next rows that go out.

        Args:
            x_TD: float32.
            c_TB: their masked form. A worker may be able to write there, so it is only shown.
        """
        if self._sent is None:
            return
        c_TD = np.empty(x_TD.shape, residues.dtype)
        residue_bytes.unpack(c_TB.numpy(), residues, c_TD)
        shown_TC = c_TD[:, :COLUMNS].astype(np.int64).clip(0, residues.p - 1) * 256 // residues.p
        x_TC = x_TD[:, :COLUMNS].numpy()
        with self._lock:
            by_sequence = {each.sequence: each for each in self._requests.values()}
            for c_C, x_C, sequence in zip(shown_TC, x_TC, self._sent, strict=False):
                rows = None if sequence is None else by_sequence.get(sequence)
                if rows is not None:
                    rows.masked_C.append(c_C.astype(np.uint8))
                    rows.plain_C.append(x_C.copy())
                    rows.expires = self._clock() + KEPT_S

    def _forget_old(self) -> None:
        now = self._clock()
        self._requests = {key: rows for key, rows in self._requests.items() if rows.expires > now}


def _as_bytes(plain_RC: NDArray[np.float32]) -> Bytes:
    unit = WIDEST * float(np.sqrt(np.mean(np.square(plain_RC, dtype=np.float64)))) or 1.0
    scaled_RC: Bytes = np.rint(128 + 127 * (plain_RC / unit)).clip(0, 255).astype(np.uint8)
    return scaled_RC


class WatchedOffload(PrivateOffload):
    """A `PrivateOffload` of whose requests a `WorkerView` is told."""

    def __init__(self, view: WorkerView, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._view = view

    def start(self, request: Request) -> Pending:
        if isinstance(request, Attention):
            self._view.attended(request.layer, request.segments)
        if isinstance(request, Linear):
            with self._view.sending(request):
                return super().start(request)
        return super().start(request)


class WatchedGroup(Generic[Kept]):
    """A group of which a `WorkerView` sees what goes in and what goes out."""

    def __init__(self, group: Group[Kept], view: WorkerView) -> None:
        self._group = group
        self._view = view
        self.linear, self.features, self.width = group.linear, group.features, group.width

    @property
    def field(self) -> Field:
        return self._group.field

    @property
    def row_bytes(self) -> int:
        return self._group.row_bytes

    def mask(self, x_TD: Tensor, r_TD: NDArray[Any], c_TB: Tensor, row_pool: RowPool) -> Kept:
        [kept] = self.mask_for((), x_TD, r_TD, c_TB, row_pool)
        return kept

    def mask_for(
        self,
        others: Sequence[Group[Kept]],
        x_TD: Tensor,
        r_TD: NDArray[Any],
        c_TB: Tensor,
        row_pool: RowPool,
    ) -> list[Kept]:
        kept = self._group.mask_for(others, x_TD, r_TD, c_TB, row_pool)
        self._view.masked(x_TD, c_TB, self.field)
        return kept

    def check_and_unmask(
        self,
        z_TB: Tensor,
        u_TF: NDArray[Any],
        masked: Kept,
        y_TF: Tensor,
        worker_name: str,
        row_pool: RowPool,
    ) -> None:
        self._group.check_and_unmask(z_TB, u_TF, masked, y_TF, worker_name, row_pool)

    def wrong_product(self, worker_name: str) -> IntegrityError:
        return self._group.wrong_product(worker_name)
