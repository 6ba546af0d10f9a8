"""The ZeroMQ socket of the TEE, and the base class of both sides' sockets.

ZeroMQ's exceptions are translated here and in `tsqp.wire.server_socket`.

The worker always binds and the TEE connects, because libzmq aborts in Gramine when it binds a
numeric TCP address. libzmq's own thread sends heartbeats, which detect a peer that is gone or
stopped even during a long computation.
"""

import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from tsqp.errors import (
    ProtocolError,
    WorkerLost,
    WorkerUnavailable,
)
from tsqp.wire.codec import MAX_MESSAGE
from tsqp.wire.endpoint import Endpoint
from tsqp.wire.greeting import why_not
from tsqp.wire.inflow import (
    SLACK,
    Guard,
    Inflow,
)
from tsqp.wire.patience import Patience
from tsqp.wire.relay import CAN_RELAY, Relay, no_worker_at
from tsqp.wire.wakeup import Wakeup

HEARTBEAT_MS = 1000
SILENCE_MS = 4000  # a peer without heartbeats for this long counts as gone
TICK_MS = 100  # how often a wait checks its deadline and the connection
SEND_MS = 1000  # how long to wait for a peer that does not read
SPIN_S = 0.001  # how long a wait polls before it sleeps, if that was of use the last time
MAX_SKIPPED = 15  # waits without polling after that was of no use
MAX_UNREAD = 16  # maximum number of messages that a worker queues for a peer that does not read
MAX_FRAME = 2**30
KEY_LENGTH = 40  # characters of Z85 for 32 bytes
HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)

Buffer = bytes | memoryview


class BaseSocket:
    """The common part of both sides: options, the monitor, and receiving into buffers."""

    def __init__(self, kind: int, endpoint: Endpoint) -> None:
        self._context = zmq.Context(io_threads=1)
        try:
            self._socket: zmq.Socket[bytes] = self._context.socket(kind)
        except zmq.ZMQError as exc:
            self._context.term()
            raise WorkerUnavailable(f"Cannot open a socket for {endpoint}: {exc}.") from exc
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.RCVTIMEO, TICK_MS)
        self._socket.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        self._socket.set(zmq.HEARTBEAT_TIMEOUT, SILENCE_MS)
        self._socket.set(zmq.HANDSHAKE_IVL, SILENCE_MS)
        self._socket.set(zmq.MAXMSGSIZE, MAX_FRAME)
        # No limit on the number of messages, which `Inflow` bounds instead. A peer that passes such
        # a limit and hangs up makes libzmq 4.3.5 abort this process: it stops reading, sees the
        # end, and asserts that there was none when its next heartbeat is due (libzmq#4841).
        self._socket.set(zmq.RCVHWM, 0)
        self._socket.set(zmq.SNDTIMEO, SEND_MS)
        # Only if an IPv6 address is given: otherwise "localhost" may no longer mean 127.0.0.1.
        self._socket.set(zmq.IPV6, int(endpoint.address.startswith("[")))
        self._message = bytearray(MAX_MESSAGE)
        self._monitor: zmq.Socket[bytes] | None = None
        self._inflow: Inflow | None = None
        self.closed = False

    def _watch(self, events: int) -> None:
        self._monitor = self._socket.get_monitor_socket(events)

    def _next_events(self, wait_ms: int = 0) -> Iterator[tuple[int, int]]:
        """The connection events since the last look, each with its descriptor."""
        assert self._monitor is not None
        while self._monitor.poll(wait_ms):
            message = parse_monitor_message(self._monitor.recv_multipart())
            yield int(message["event"]), int(message["value"])
            wait_ms = 0

    def _events(self) -> int:
        """The kinds of connection events since the last look, as bits."""
        seen = 0
        for event, _ in self._next_events():
            seen |= event
        return seen

    def receive_into(self, buffer: memoryview | bytearray) -> int:
        """Receive the next frame into `buffer`, cut to its size; returns the full length."""
        length = self._socket.recv_into(buffer)
        if self._inflow is not None:
            self._inflow.received_frame(length)
        return length

    @property
    def _has_message(self) -> bool:
        events = self._socket.get(zmq.EVENTS)
        assert isinstance(events, int)
        return bool(events & zmq.POLLIN)

    def _wait(self, wakeup: Wakeup, *, spin: bool) -> bool:
        """Wait for mail or a message for one tick; returns whether there is a message.

        Waking a sleeping core takes longer than most answers, so with `spin` this first polls for a
        while. Each poll yields the core, so a peer on the same core is not delayed.
        """
        end = time.perf_counter() + (SPIN_S if spin else 0)
        while time.perf_counter() < end:
            if wakeup.linger():
                return False
            if self._has_message:
                return True
        wakeup.say_asleep(True)
        try:
            return not wakeup.has_mail and bool(self._socket.poll(TICK_MS))
        finally:
            wakeup.say_asleep(False)

    @property
    def more(self) -> bool:
        """Whether the current message has more frames."""
        return bool(self._socket.get(zmq.RCVMORE))

    def receive_exactly(self, buffers: Sequence[memoryview], sender: str) -> None:
        """Receive the remaining frames of a message into `buffers`, one each.

        Raises:
            ProtocolError: the number of frames or the length of a frame is wrong.
        """
        fault = ""
        for number, buffer in enumerate(buffers):
            if not self.more:
                fault = f"{number} tensors where {len(buffers)} are due"
                break
            length = self.receive_into(buffer)
            if length != buffer.nbytes:
                fault = f"a tensor of {length} bytes where {buffer.nbytes} are due"
                break
        if self.drain() and not fault:
            fault = f"more than the {len(buffers)} tensors that are due"
        if fault:
            raise ProtocolError(f"{sender} sent {fault}.")

    def drain(self) -> int:
        """Drop the remaining frames of a message; returns how many there were."""
        dropped = 0
        while self.more:
            self.receive_into(bytearray())
            dropped += 1
        return dropped

    def close(self) -> None:
        """Close the socket and everything behind it; safe to call twice."""
        if self.closed:
            return
        self.closed = True
        try:
            if self._monitor is not None:
                self._stop_monitor()
        finally:  # after an interrupt too: the context would wait for an open socket
            self._context.destroy(linger=0)

    def _stop_monitor(self) -> None:
        self._socket.disable_monitor()


class ClientSocket(BaseSocket):
    """The TEE's end of one connection. A broken connection is not restored."""

    def __init__(self, endpoint: Endpoint, timeout: float, worker_key: str | None = None) -> None:
        """Connect within `timeout` seconds.

        Args:
            worker_key: the worker must prove that it holds the secret key of this public key. All
                traffic is then encrypted. This side uses a new key pair for each connection.

        Raises:
            WorkerUnavailable: nobody listens there, or the listener is not a ZeroMQ peer.
            HandshakeError: only one side encrypts, or the worker has another key.
        """
        super().__init__(zmq.DEALER, endpoint)
        self._name = str(endpoint)
        self._patience = Patience(MAX_SKIPPED)
        self.inflow = self._inflow = Inflow(SLACK, encrypted=worker_key is not None)
        self._guard: Guard | Relay | None = None
        deadline = time.monotonic() + timeout
        try:
            if worker_key is not None:
                public, secret = zmq.curve_keypair()
                self._socket.set(zmq.CURVE_PUBLICKEY, public)
                self._socket.set(zmq.CURVE_SECRETKEY, secret)
                self._socket.set(zmq.CURVE_SERVERKEY, worker_key.encode())
            # Never reconnect: another process may have taken the worker's place.
            self._socket.set(zmq.RECONNECT_IVL, -1)
            self._watch(
                zmq.EVENT_CONNECTED
                | zmq.EVENT_CLOSED
                | zmq.EVENT_HANDSHAKE_SUCCEEDED
                | HANDSHAKE_FAILED
                | zmq.EVENT_DISCONNECTED
            )
            if not self._connect(endpoint, deadline):
                raise why_not(endpoint, encrypting=worker_key is not None)
        except zmq.ZMQError as exc:
            self.close()
            raise WorkerUnavailable(f"Cannot connect to {endpoint}: {exc.strerror}.") from exc
        except BaseException:
            self.close()
            raise

    def _connect(self, endpoint: Endpoint, deadline: float) -> bool:
        """Wait for a peer and its handshake; returns whether the handshake succeeded."""
        address = self._name
        if endpoint.scheme == "ipc" and CAN_RELAY:
            self._guard = relay = Relay(endpoint, self.inflow, deadline)
            address = relay.endpoint
            self._socket.connect(address)
            relay.begin()
        else:
            self._socket.connect(address)
        while True:
            left_ms = int((deadline - time.monotonic()) * 1000)
            for event, descriptor in self._next_events(max(left_ms, 1)):
                if event == zmq.EVENT_CONNECTED and endpoint.scheme == "tcp":
                    with suppress(OSError):  # it has already ended; an event will follow
                        self._guard = Guard(descriptor, self.inflow)
                elif event & HANDSHAKE_FAILED:
                    return False
                elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    return True
                elif event == zmq.EVENT_CLOSED:  # nobody listens yet
                    time.sleep(TICK_MS / 1000)
                    self._socket.disconnect(address)
                    self._socket.connect(address)
            if left_ms <= 0:
                raise WorkerUnavailable(no_worker_at(self._name))

    def send(self, frames: Sequence[Buffer]) -> None:
        """Send one message. Frames after the first must not change until they are sent.

        Raises:
            WorkerLost: the connection broke, or the worker does not read.
        """
        self._check_connection()  # after a break, libzmq would only queue the message
        try:
            self._socket.send(frames[0], zmq.SNDMORE if len(frames) > 1 else 0)
            for place, frame in enumerate(frames[1:], 2):
                more = zmq.SNDMORE if place < len(frames) else 0
                self._socket.send(frame, more, copy=False)
        except zmq.ZMQError as exc:
            self._check_connection()  # if the connection broke, this says why
            raise WorkerLost(f"The worker at {self._name} takes no more messages.") from exc

    def receive(self, deadline: float, wakeup: Wakeup) -> memoryview | None:
        """The first frame of the next message, valid until the next call; None if mail came.

        Raises:
            WorkerLost: the connection broke, or `deadline` (of time.monotonic) passed.
        """
        began = time.perf_counter()
        spin = polled = self._patience.may_poll()
        try:
            while not self._wait(wakeup, spin=spin):
                spin = False
                if wakeup.has_mail:
                    return None
                self._check_connection()
                if time.monotonic() >= deadline:
                    raise WorkerLost(
                        f"The worker at {self._name} stopped answering; look at its output, or "
                        "raise --timeout if it is only slow."
                    )
            length = self.receive_into(self._message)
        except zmq.ZMQError as exc:
            raise WorkerLost(f"The link to {self._name} failed: {exc.strerror}.") from exc
        finally:
            # Polling for an answer that takes longer would only keep the core from others.
            self._patience.note(polled=polled, useful=time.perf_counter() - began < SPIN_S)
        if length > len(self._message):
            self.drain()
            raise ProtocolError(
                f"The worker at {self._name} sent a message of {length} bytes, but "
                f"only {MAX_MESSAGE} are allowed."
            )
        return memoryview(self._message)[:length]

    def _check_connection(self) -> None:
        # Read the events first: the guard sets `is_over` before it ends the connection.
        is_lost = self._events() & zmq.EVENT_DISCONNECTED
        if is_lost and self._guard is not None:
            self._guard.close()  # looks a last time, for bytes that came since its last look
        if self.inflow.is_over:
            raise ProtocolError(
                f"The worker at {self._name} sent more than it was asked for, in a message without "
                "an end; restart the worker, and do not trust it."
            )
        if is_lost:
            raise WorkerLost(
                f"The worker at {self._name} is gone: the connection broke; "
                "look at its output, restart it and try again."
            )

    def close(self) -> None:
        """Close the socket and its connection; safe to call twice."""
        try:
            super().close()
        finally:
            if self._guard is not None:
                self._guard.close()


def new_key_pair() -> tuple[str, str]:
    """Make a new public key and its secret key."""
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def public_key_of(secret_key: str) -> str:
    """The public key of a secret key."""
    return zmq.curve_public(secret_key.encode()).decode()


def is_key(text: str) -> bool:
    """Whether `text` has the form of a key."""
    try:
        return len(text) == KEY_LENGTH and len(z85.decode(text)) == KEY_LENGTH // 5 * 4
    except (ValueError, KeyError, struct.error):
        return False
