"""The TEE's channel to a worker process: messages over ZeroMQ, tensors in shared memory or inline.

Every answer is checked against this side's own records: its ticket must belong to an open call, and
its tensors must have exactly the requested lengths.
"""

import hmac
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from tsqp.errors import (
    HandshakeError,
    ProtocolError,
    RemoteError,
    WorkerError,
    WorkerLost,
)
from tsqp.wire.call_forms import CallForms, PlacedForm
from tsqp.wire.call_times import (
    AWAY,
    MASK,
    RECEIVE,
    SEND,
    SERIALISE,
    WAIT,
    CallTimes,
    OnTimes,
    end_stage,
)
from tsqp.wire.channel import Counters, Slot
from tsqp.wire.codec import encode, printable, tee_decoder, wrap
from tsqp.wire.endpoint import Endpoint
from tsqp.wire.handshake import check_agreement, no_answer
from tsqp.wire.mailbox import CAN_POLL, MAILBOX_BYTES, MAX_FRAME, SLOTS, Mailbox
from tsqp.wire.messages import (
    Attach,
    Bye,
    Failure,
    Hello,
    Message,
    Offer,
    Operation,
    Probe,
    Result,
    SealedRef,
    Welcome,
)
from tsqp.wire.offered import map_offered
from tsqp.wire.remote_call import RemoteCall
from tsqp.wire.shm import SHM_FOLDER, Arena, Segment
from tsqp.wire.tensors import Spec, raw
from tsqp.wire.wakeup import NO_WAKEUP
from tsqp.wire.zmq import ClientSocket

CONNECT_S = 5.0
MAX_INLINE = 2**29  # maximum bytes of a call without shared memory; larger calls are split


def check_reachable(
    endpoint: Endpoint, worker_key: str | None = None, timeout: float | None = None
) -> None:
    """Check that a worker serves `endpoint`: a cheap test before expensive work.

    Args:
        timeout: in seconds; CONNECT_S by default.

    Raises:
        WorkerUnavailable: nobody serves the endpoint.
        HandshakeError: the worker does not hold the secret key of `worker_key`.
    """
    ClientSocket(endpoint, CONNECT_S if timeout is None else timeout, worker_key).close()


class RemoteChannel:
    """A session with a worker process, for use by one thread."""

    def __init__(
        self,
        endpoint: Endpoint,
        hello: Hello,
        *,
        worker_key: str | None = None,
        connect_timeout: float | None = None,
        shm_folder: Path = SHM_FOLDER,
        shm_path: Path | None = None,
        no_shm_reason: str = "--no-shm was given",
    ) -> None:
        """Connect and shake hands.

        Args:
            endpoint: ipc or tcp.
            hello: what the TEE needs; `shm_bytes` = 0 sends all tensors inline.
            worker_key: the worker's public key, for an encrypted link.
            connect_timeout: seconds for the connection, and again for the handshake; CONNECT_S by
                default.
            shm_path: the only path at which memory may be shared, see `--shm-name`.
            no_shm_reason: the reason to report if `shm_bytes` is 0.

        Raises:
            WorkerUnavailable: nobody serves the endpoint.
            HandshakeError: the worker runs another version, model or dtype, or has another key.
        """
        assert hello.fixed_shm == (shm_path is not None)
        self._pid = os.getpid()
        self.endpoint = str(endpoint)
        self.counters = Counters()
        self.on_times: OnTimes | None = None
        self.transport = "inline"
        self.reason = no_shm_reason
        self._decoder = tee_decoder(self.endpoint)
        self._segment: Segment | None = None
        self._arena: Arena | None = None
        self._mailbox: Mailbox | None = None
        self._forms = CallForms()
        self._calls: dict[int, RemoteCall] = {}
        self._cancelled: dict[int, RemoteCall] = {}
        self._in_socket: set[int] = set()  # tickets of calls through the socket, not yet answered
        self._last_ticket = 0
        if connect_timeout is None:
            connect_timeout = CONNECT_S
        self._socket = ClientSocket(endpoint, connect_timeout, worker_key)
        try:
            self.welcome = self._shake_hands(hello, time.monotonic() + connect_timeout)
            if hello.shm_bytes:
                self._attach(hello, shm_folder, shm_path, time.monotonic() + connect_timeout)
        except BaseException:
            self.close()
            raise

    @property
    def max_call_bytes(self) -> int:
        """A third of the segment: room for an answer in use, the next call, and gaps."""
        return self._arena.size // 3 if self._arena else MAX_INLINE

    def reserve(
        self, operation: Operation, inputs: Sequence[Spec], outputs: Sequence[Spec]
    ) -> RemoteCall:
        self._check_open()  # a forked process still maps its parent's segment
        times = CallTimes(self.on_times, operation, inputs, outputs) if self.on_times else None
        form = self._forms.find(operation, inputs, outputs)
        place = self._arena.take(form.room) if self._arena else None
        if place is None or self._segment is None:
            tensors = [[torch.empty(spec.shape, dtype=spec.dtype) for spec in specs]
                       for specs in (inputs, outputs)]  # fmt: skip
            refs = form.refs(None)
            placed = PlacedForm(tuple(tensors[0]), tuple(tensors[1]), refs, form.body(refs))
        else:
            placed = form.at(place, self._segment)
        return RemoteCall(self.release, form, placed, place, times)

    def submit(self, slot: Slot) -> int:
        assert isinstance(slot, RemoteCall)
        times, form = slot.times, slot.form
        end_stage(times, MASK)
        self._last_ticket += 1
        ticket = self._last_ticket
        frame = wrap(slot.body, ticket)
        inline = [] if slot.place is not None else [raw(tensor) for tensor in slot.inputs]
        end_stage(times, SERIALISE)
        try:
            self._calls[ticket] = slot  # before sending: the answer may come at once
            if slot.inline_bytes:
                self._socket.inflow.expect(slot.inline_bytes)
            if not (slot.place is not None and self._post(frame)):
                self._in_socket.add(ticket)
                self._send_frames([frame, *inline])
        except BaseException:  # a partly sent message cannot be taken back
            self.close()
            raise
        self.counters.count_call(form.kind)
        self.counters.sent_bytes += form.sent_bytes
        end_stage(times, SEND)
        return ticket

    def discard(self, slot: Slot) -> None:
        assert isinstance(slot, RemoteCall)
        self.release(slot)

    def wait(self, ticket: int, deadline: float) -> RemoteCall:
        self._check_open()
        call = self._calls[ticket]
        end_stage(call.times, AWAY)
        try:
            while not call.answered:
                self._receive(deadline, call.times)
        except WorkerError:
            self.close()
            raise
        del self._calls[ticket]
        if call.error is not None:
            self.release(call)
            raise call.error
        return call

    def cancel(self, ticket: int) -> None:
        call = self._calls.pop(ticket, None)
        if call is not None and call.answered:
            self.release(call)
        elif call is not None:
            self._cancelled[ticket] = call  # the worker may write there until it has answered

    def release(self, call: RemoteCall) -> None:
        """Free the memory of an answered call; safe to call twice."""
        if call.place is not None and self._arena is not None:
            self._arena.give_back(call.place)
            call.place = None
        call.inputs = call.outputs = ()

    def close(self) -> None:
        if self._is_forked:
            return
        if not self._socket.closed:
            try:
                with suppress(WorkerError):
                    self._send(Bye())
            finally:
                self._socket.close()
        if self._segment is not None:
            self._segment.close()
        self._segment = self._arena = self._mailbox = None
        self._forms.forget()
        self._calls.clear()
        self._cancelled.clear()
        self._in_socket.clear()

    def _send(self, message: Message) -> None:
        self._send_frames([encode(message)])

    def _send_frames(self, frames: list[bytes | memoryview]) -> None:
        self._check_open()
        self.counters.socket_bytes += sum(map(len, frames))
        self._socket.send(frames)

    def _post(self, frame: bytes) -> bool:
        """Send a call through the mailbox; returns False if there is no mailbox or no room.

        A posted call may overtake one in the socket, on whose outcome it may depend.
        """
        if self._mailbox is None or len(self._calls) + len(self._cancelled) > SLOTS:
            return False
        if self._in_socket:
            return False
        self._check_open()
        if len(frame) > MAX_FRAME:
            return False
        if self._mailbox.post(frame):
            self._send(Probe())
        return True

    @property
    def _is_forked(self) -> bool:
        """Whether this process is a fork of the one that made the channel."""
        return self._pid != os.getpid()

    def _check_open(self) -> None:
        if self._socket.closed or self._is_forked:
            raise WorkerLost(f"The session with the worker at {self.endpoint} has ended.")

    def _next(self, deadline: float) -> bytes | memoryview:
        """The first frame of the next message, valid until the next call."""
        self._check_open()
        mailbox = self._mailbox
        if mailbox is not None and (mail := mailbox.take_soon()) is not None:
            return mail
        while mailbox is None or (mail := mailbox.take()) is None:
            frame = self._socket.receive(deadline, mailbox or NO_WAKEUP)
            if frame is not None:
                self.counters.socket_bytes += len(frame)
                return frame
        return mail

    def _receive(self, deadline: float, waiting: CallTimes | None) -> None:
        """Take one message from the socket and record which call it answers.

        Args:
            waiting: times of the call that `wait` waits for.
        """
        frame = self._next(deadline)
        try:
            self._take(frame, deadline, waiting, is_posted=isinstance(frame, bytes))
        except BaseException:  # the rest of a partly read message would be misread
            self.close()
            raise

    def _take(
        self,
        frame: bytes | memoryview,
        deadline: float,
        waiting: CallTimes | None,
        *,
        is_posted: bool,
    ) -> None:
        end_stage(waiting, WAIT)
        ticket, message = self._decoder.decode(frame)
        if isinstance(message, Probe):
            self._receive_inline([])
            if time.monotonic() >= deadline:
                raise WorkerLost(f"The worker at {self.endpoint} sent probes instead of answers.")
            return
        call = self._calls.get(ticket) or self._cancelled.get(ticket)
        if isinstance(message, Failure) and (call is None or message.kind == "protocol"):
            raise self._remote_error(message)  # the worker has also ended the session
        if call is None or call.answered or not isinstance(message, Result | Failure):
            raise ProtocolError(
                f"The worker at {self.endpoint} answered a call that is not open; "
                "restart the worker, and do not trust it."
            )
        if call.times is not waiting:
            end_stage(call.times, AWAY)
        if isinstance(message, Failure):
            call.error = self._remote_error(message)
        else:
            if call.times is not None:
                call.times.compute_ns = message.compute_ns
            self.counters.count_compute(call.form.kind, message.compute_ns / 1e9)
            self.counters.received_bytes += call.form.received_bytes
        if not is_posted or call.place is None:
            has_tensors = call.place is None and call.error is None
            self._receive_inline(call.outputs if has_tensors else ())
        call.answered = True
        self._in_socket.discard(ticket)
        if call.inline_bytes:
            self._socket.inflow.expect(-call.inline_bytes)
        end_stage(call.times, RECEIVE)
        if call.times is not waiting:
            end_stage(waiting, AWAY)  # this time belongs to the other call
        if self._cancelled.pop(ticket, None) is not None:
            self.release(call)

    def _remote_error(self, failure: Failure) -> RemoteError:
        text = f"The worker at {self.endpoint} failed: {printable(failure.message)}"
        trace = printable(failure.traceback, keep="\n")
        return RemoteError(text, trace, out_of_memory=failure.kind == "memory")

    def _receive_inline(self, tensors: Sequence[Tensor]) -> None:
        buffers = [raw(tensor) for tensor in tensors]
        self._socket.receive_exactly(buffers, f"The worker at {self.endpoint}")
        self.counters.socket_bytes += sum(buffer.nbytes for buffer in buffers)

    def _shake_hands(self, hello: Hello, deadline: float) -> Welcome:
        self._send(hello)
        try:
            _, message = self._decoder.decode(self._next(deadline))
        except WorkerLost as exc:
            raise no_answer(self.endpoint) from exc
        self._receive_inline([])
        if isinstance(message, Failure):
            reason = printable(message.message)
            raise HandshakeError(f"Refused by the worker at {self.endpoint}: {reason}")
        if not isinstance(message, Welcome) or not hmac.compare_digest(message.nonce, hello.nonce):
            raise ProtocolError(f"The worker at {self.endpoint} answered the handshake wrongly.")
        try:
            check_agreement(hello, message)
        except HandshakeError as exc:
            raise HandshakeError(f"Refused the worker at {self.endpoint}: {exc}") from None
        return message

    def _attach(self, hello: Hello, folder: Path, fixed: Path | None, deadline: float) -> None:
        """Map the segment that the worker offers, and tell the worker to withdraw the offer."""
        ref = self.welcome.segment
        segment, self.reason = map_offered(ref, self.welcome.reason, hello, folder, fixed)
        if segment is None and isinstance(ref, SealedRef) and fixed is None:
            # A segment with a name may work.
            why_not_sealed = self.reason
            self._send(Attach(mapped=False, poll=False, wants_name=True))
            offer = self._await_offer(deadline)
            segment, self.reason = map_offered(offer.segment, offer.reason, hello, folder)
            self.reason += f"; {why_not_sealed}"
        if segment is not None:
            self._segment = segment
            self._arena = Arena(segment.size, start=MAILBOX_BYTES)
            self.transport = "shm"
            if CAN_POLL:
                self._mailbox = Mailbox(segment.memory(MAILBOX_BYTES), "tee")
                self.transport = "poll"
        if ref is not None:
            self._send(Attach(self._segment is not None, self._mailbox is not None))

    def _await_offer(self, deadline: float) -> Offer:
        while True:
            _, message = self._decoder.decode(self._next(deadline))
            self._receive_inline([])
            if isinstance(message, Offer):
                return message
            if not isinstance(message, Probe) or time.monotonic() >= deadline:
                raise ProtocolError(
                    f"The worker at {self.endpoint} answered the handshake wrongly."
                )
