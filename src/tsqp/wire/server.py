"""The worker's serving loop: handles sessions, their shared memory, and one call at a time.

Clients are not trusted. Each tensor reference of a client is checked against its own segment and
the shapes of the operation, before anything is read or allocated.
"""

import os
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import torch
from torch import Tensor

from tsqp.errors import (
    HandshakeError,
    OutOfMemory,
    ProtocolError,
    RecordingError,
    TSQPError,
)
from tsqp.wire.channel import Service
from tsqp.wire.codec import encode, printable, worker_decoder
from tsqp.wire.endpoint import Endpoint
from tsqp.wire.fixed_segment import FixedPlace
from tsqp.wire.handshake import check_agreement
from tsqp.wire.known_calls import Tensors
from tsqp.wire.mailbox import CAN_POLL, YIELDS, prepare
from tsqp.wire.messages import (
    INLINE,
    MAX_SENTENCE,
    MAX_TRACEBACK,
    Attach,
    Bye,
    Call,
    Failure,
    FromTEE,
    Hello,
    Message,
    Offer,
    Operation,
    Probe,
    Result,
    TensorRef,
)
from tsqp.wire.offers import Offers
from tsqp.wire.quotas import DEFAULT_QUOTAS, Quotas
from tsqp.wire.server_session import Begun, Session
from tsqp.wire.server_socket import ServerSocket
from tsqp.wire.shm import SHM_FOLDER, NamedSegment, SealedSegment
from tsqp.wire.tensors import raw, spec_of
from tsqp.wire.wakeup import NO_WAKEUP
from tsqp.wire.zmq import MAX_FRAME

LOOK_EVERY_S = 0.5  # how often a busy worker checks for clients that left
MOST_BEGUN = 2  # calls of a session that a device computes while the next is read
LOOKS_AT_BEGUN = 8  # for each look at the socket, which is slower
ASK_EVERY_S = 0.001  # how often the socket is asked while the only session posts calls
LOOKS = 10  # more than one, as libzmq reports a broken connection before it drops the peer


OnCall = Callable[[int, Operation, Sequence[Tensor]], None]


class Server:
    """Serves a `Service` to many sessions on one endpoint, from one thread."""

    _service: Service
    _on_call: OnCall | None

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        secret_key: str | None = None,
        quotas: Quotas = DEFAULT_QUOTAS,
        shm_folder: Path = SHM_FOLDER,
        shm_place: FixedPlace | None = None,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Bind `endpoint`.

        Args:
            secret_key: if given, the worker accepts only encrypted links; see `ServerSocket`.
            quotas: limits on what clients may take.
            shm_place: where memory is shared with clients that map it at a fixed place only.
            log: called with one line when a session begins or ends.

        Raises:
            WorkerUnavailable: the endpoint cannot be served.
        """
        self.sessions: dict[bytes, Session] = {}
        self._opened = 0
        self._decoder = worker_decoder()
        self._put_off: tuple[bytes, memoryview] | None = None  # a message for the next round
        self._called: set[bytes] = set()  # clients that had a call through the socket in this round
        self._quotas = quotas
        self._offers = Offers(quotas, shm_folder, shm_place)
        self._log = log
        if CAN_POLL:
            prepare()  # now, so that no session waits for it
        self._socket = ServerSocket(endpoint, secret_key)

    @property
    def address(self) -> str:
        """The endpoint in use."""
        return self._socket.address

    def serve(
        self, service: Service, stop: Callable[[], bool], on_call: OnCall | None = None
    ) -> None:
        """Serve until `stop()` returns true. It is called several times a second.

        Args:
            on_call: called before each call is computed, with the session, the operation and the
                inputs.

        Raises:
            RecordingError: `on_call` raised it; serving has ended.
        """
        self._service = service
        self._on_call = on_call
        self._socket.measure()  # again: what is loaded now took memory
        looked = time.monotonic()
        looks = 0
        busy = False
        while not stop():
            posted = self._serve_posted()
            active = self._serve_round(stop) or posted
            if any(session.begun for session in self.sessions.values()):
                self._await_begun()
                active = True
            if not active:
                # Spin only if there was work just now: another call may follow soon.
                self._put_off = self._socket.receive(self, wait=True, spin=busy)
            busy = active or self._put_off is not None
            if time.monotonic() - looked > LOOK_EVERY_S:
                looked = time.monotonic()
                looks = LOOKS if self._socket.a_peer_left() else max(0, looks - 1)
                if looks:
                    self._free_lost_sessions()
        for identity, session in list(self.sessions.items()):
            self._finish(identity, session, 0)

    def close(self) -> None:
        """End all sessions and stop listening; leaves nothing in /dev/shm or on disk."""
        for identity in list(self.sessions):
            self._end(identity, "the worker stops")
        self._socket.close()

    @property
    def has_mail(self) -> bool:
        """Whether any session has posted a call."""
        return any(s.mailbox is not None and s.mailbox.has_mail for s in self.sessions.values())

    def linger(self) -> bool:
        """Offer the core to others for some µs, or until a call is posted; whether one is."""
        boxes = [s.mailbox for s in self.sessions.values() if s.mailbox is not None]
        if len(boxes) == 1:
            return boxes[0].linger()
        looks = range(max(1, YIELDS // len(boxes))) if boxes else ()
        return any(box.linger(1) for _ in looks for box in boxes) or NO_WAKEUP.linger()

    def say_asleep(self, asleep: bool) -> None:
        """Tell all sessions with a mailbox whether this worker sleeps."""
        for session in self.sessions.values():
            if session.mailbox is not None:
                session.mailbox.say_asleep(asleep)

    def _serve_posted(self) -> bool:
        """Do what the only session posts, as long as its calls come soon; whether there were any.

        Asking the socket takes longer than a small call, so it is asked after ASK_EVERY_S only.
        With more sessions it is asked in each round, and they take turns.
        """
        if len(self.sessions) != 1:
            return False
        [(identity, session)] = self.sessions.items()
        found = False
        end = time.monotonic() + ASK_EVERY_S
        while (mailbox := session.mailbox) is not None and time.monotonic() < end:
            if session.begun and session.oldest_is_done():
                self._finish(identity, session, len(session.begun) - 1)
                if session.mailbox is None:  # it has ended
                    break
            frame = mailbox.take() if session.begun else mailbox.take_soon()
            if frame is not None:
                self._handle(identity, frame, posted=True)
                found = True
            elif session.begun:
                os.sched_yield()
            else:
                break
        return found

    def _serve_round(self, stop: Callable[[], bool]) -> bool:
        """Do one waiting call of each session; returns whether there was something to do.

        libzmq returns messages of its peers in turn. The first message of a peer that already had
        its turn is put off until the next round. Then follow posted calls, for sessions that had no
        call through the socket in this round.
        """
        self._called.clear()
        heard: set[bytes] = set()
        incoming, self._put_off = self._put_off, None
        while not stop():
            incoming = incoming or self._socket.receive(self, wait=False, spin=False)
            if incoming is None or incoming[0] in heard:
                self._put_off = incoming
                break
            heard.add(incoming[0])
            self._handle(*incoming)
            self._socket.drain()
            incoming = None
        return self._take_mail(stop) or bool(heard)

    def _take_mail(self, stop: Callable[[], bool]) -> bool:
        """Do one posted call of each session that had none yet; returns whether there was any."""
        found = False
        for identity, session in list(self.sessions.items()):
            if stop():
                break
            if identity in self._called:
                continue
            if session.mailbox is not None and (frame := session.mailbox.take()) is not None:
                self._handle(identity, frame, posted=True)
                found = True
        return found

    def _await_begun(self) -> None:
        """Answer calls that a device has computed; poll for a while if there are none."""
        for _ in range(LOOKS_AT_BEGUN):
            found = self.has_mail
            for identity, session in list(self.sessions.items()):
                while session.begun and session.oldest_is_done():
                    self._finish(identity, session, len(session.begun) - 1)
                    found = True
            if found:
                return
            os.sched_yield()

    def _finish(self, identity: bytes, session: Session, most: int) -> None:
        """Answer begun calls, the oldest first, until there are `most` of them."""
        while len(session.begun) > most:
            begun = session.begun.popleft()
            try:
                begun.completion.wait()
                compute_ns = begun.completion.compute_ns()
            except Exception as exc:  # of the device
                self._say_failed(identity, begun.ticket, exc)
            else:
                outputs = begun.held[1]
                self._answer(
                    identity, session, begun.ticket, begun.call, outputs, begun.posted, compute_ns
                )

    def _handle(self, identity: bytes, frame: bytes | memoryview, *, posted: bool = False) -> None:
        """Handle one message, from the socket or posted."""
        ticket = 0
        try:
            number, body = self._decoder.unwrap(frame)
            message = self._posted(identity, body) if posted else self._decoder.read(body)
            ticket = number
            self._dispatch(identity, ticket, message, posted)
        except HandshakeError as exc:
            self._send(identity, Failure("refused", _sentence(str(exc))), ticket)
        except ProtocolError as exc:
            self._send(identity, Failure("protocol", _sentence(str(exc))), ticket)
            self._end(identity, str(exc))
        except RecordingError as exc:  # a recording with gaps would be useless
            self._send(identity, Failure("error", _sentence(str(exc))), ticket)
            raise
        except Exception as exc:
            self._say_failed(identity, ticket, exc)

    def _say_failed(self, identity: bytes, ticket: int, exc: Exception) -> None:
        """Tell a client that its call failed, while `exc` is handled."""
        text = str(exc) if isinstance(exc, TSQPError) else f"{type(exc).__name__}: {exc}"
        trace = printable(traceback.format_exc()[-MAX_TRACEBACK:], keep="\n")
        kind: Literal["memory", "error"] = "memory" if isinstance(exc, OutOfMemory) else "error"
        self._send(identity, Failure(kind, _sentence(text), trace), ticket)

    def _posted(self, identity: bytes, body: bytes | memoryview) -> Call:
        """The call that a session has posted."""
        assert isinstance(body, bytes)
        known = self.sessions[identity].known
        call = known.call(body)
        if call is None:
            message = self._decoder.read(body)
            if not isinstance(message, Call):
                raise ProtocolError("A client posted something that is not a call.")
            known.remember(body, call := message)
        return call

    def _dispatch(self, identity: bytes, ticket: int, message: FromTEE, posted: bool) -> None:
        if isinstance(message, Hello):
            self._begin(identity, message)
            return
        session = self.sessions.get(identity)
        if session is None:
            raise ProtocolError("A client spoke before its handshake; begin with one.")
        match message:
            case Call():
                self._call(identity, session, ticket, message, posted)
            case Attach(wants_name=True):
                self._offer_named(identity, session)
            case Attach():
                session.attach(message)
            case Bye():
                self._end(identity, "done")

    def _begin(self, identity: bytes, hello: Hello) -> None:
        if identity in self.sessions:
            raise ProtocolError("A client shook hands twice in one session.")
        client = self._socket.client
        try:
            self._quotas.check_session(client, self._clients)
        except HandshakeError:
            self._free_lost_sessions()
            self._quotas.check_session(client, self._clients)
        welcome = self._service.welcome(hello)
        check_agreement(hello, welcome)
        self._opened += 1
        session = Session(self._opened, self._service.open(), client, hello)
        try:
            reason = self._share_memory(session, may_seal=True)
        except BaseException:
            session.close()
            raise
        self.sessions[identity] = session
        self._log(f"session opened, {len(self.sessions)} now")
        ref = session.segment.ref if session.segment else None
        self._send(identity, msgspec.structs.replace(welcome, segment=ref, reason=reason), 0)

    def _share_memory(self, session: Session, *, may_seal: bool) -> str:
        """Make a segment for a session; returns why there is none, or why it is not sealed."""
        held = sum(each.segment.size for each in self.sessions.values() if each.segment)
        session.segment, reason = self._offers.make(session.hello, held, may_seal=may_seal)
        return _sentence(reason)

    def _offer_named(self, identity: bytes, session: Session) -> None:
        """Replace a sealed segment, which the client cannot open, by a segment with a name."""
        if not isinstance(session.segment, SealedSegment) or session.mailbox is not None:
            raise ProtocolError("A client asked for another segment when it may not.")
        session.drop_segment()
        reason = self._share_memory(session, may_seal=False)
        assert session.segment is None or isinstance(session.segment, NamedSegment)
        self._send(identity, Offer(session.segment.ref if session.segment else None, reason), 0)

    @property
    def _clients(self) -> list[str]:
        """The client of each session."""
        return [session.client for session in self.sessions.values()]

    def _call(
        self, identity: bytes, session: Session, ticket: int, call: Call, posted: bool
    ) -> None:
        session.note(ticket, posted)
        tensors = session.known.tensors(call) if posted else None
        inputs, outputs = tensors or self._tensors(identity, session, call, posted)
        if self._on_call is not None:
            self._on_call(session.number, call.operation, inputs)
        start = time.perf_counter_ns()
        completion = session.service.run(call.operation, inputs, outputs)
        if completion is None:
            # The time of this call only: waiting times would show what other clients do.
            compute_ns = time.perf_counter_ns() - start
            self._answer(identity, session, ticket, call, outputs, posted, compute_ns)
            return
        session.begun.append(Begun(ticket, call, (inputs, outputs), posted, completion))
        # Frames take memory, so there is one such call at a time.
        is_shared = posted or not any(ref.offset == INLINE for ref in (*call.inputs, *call.outputs))
        self._finish(identity, session, MOST_BEGUN if is_shared else 0)

    def _answer(
        self,
        identity: bytes,
        session: Session,
        ticket: int,
        call: Call,
        outputs: Sequence[Tensor],
        posted: bool,
        compute_ns: int,
    ) -> None:
        result = Result(compute_ns)
        if not posted or session.mailbox is None:
            self._send(identity, result, ticket, _inline(outputs, call.outputs))
        elif session.mailbox.post(encode(result, ticket)):
            self._socket.probe(identity, encode(Probe()))

    def _tensors(self, identity: bytes, session: Session, call: Call, posted: bool) -> Tensors:
        """Check a call, and receive its inline inputs."""
        if posted and any(ref.offset == INLINE for ref in (*call.inputs, *call.outputs)):
            raise ProtocolError("A client posted a call whose tensors are not in shared memory.")
        specs = [spec_of(ref) for ref in (*call.inputs, *call.outputs)]
        session.service.check(call.operation, specs[: len(call.inputs)], specs[len(call.inputs) :])
        inputs = [self._place(session, ref) for ref in call.inputs]
        if not posted:  # otherwise the frames in the socket belong to a message that was put off
            self._called.add(identity)
            self._socket.receive_exactly(_inline(inputs, call.inputs), "A client")
        outputs = [self._place(session, ref) for ref in call.outputs]
        if posted:
            session.known.remember_tensors(call, (inputs, outputs))
        return inputs, outputs

    def _place(self, session: Session, ref: TensorRef) -> Tensor:
        spec = spec_of(ref)
        if ref.offset == INLINE:
            if spec.nbytes > MAX_FRAME:
                raise ProtocolError(f"A client wants a tensor of {spec.nbytes} bytes in one frame.")
            return torch.empty(spec.shape, dtype=spec.dtype)
        if session.segment is None:
            raise ProtocolError("A client named shared memory that its session does not have.")
        return session.segment.tensor(ref.offset, *spec)

    def _send(
        self, identity: bytes, message: Message, ticket: int, inline: Sequence[memoryview] = ()
    ) -> None:
        # Wait only for a session, and only once, so that no peer delays the others repeatedly.
        wait = isinstance(message, Result)
        if not self._socket.send(identity, [encode(message, ticket), *inline], wait=wait):
            self._end(identity, "the client left")

    def _free_lost_sessions(self) -> None:
        """Send each session one small message, which fails at once if the peer has left."""
        for identity in list(self.sessions):
            if not self._socket.probe(identity, encode(Probe())):
                self._end(identity, "the client left")

    def _end(self, identity: bytes, why: str) -> None:
        session = self.sessions.pop(identity, None)
        if session is not None:
            session.close()
            self._log(f"session ended ({why}), {len(self.sessions)} left")


def _inline(tensors: Sequence[Tensor], refs: tuple[TensorRef, ...]) -> list[memoryview]:
    """The bytes of the tensors that are sent as frames."""
    pairs = zip(tensors, refs, strict=True)
    return [raw(tensor) for tensor, ref in pairs if ref.offset == INLINE]


def _sentence(text: str) -> str:
    return printable(text[:MAX_SENTENCE])
