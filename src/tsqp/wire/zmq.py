"""ZeroMQ sockets, and the only place that knows ZeroMQ: its exceptions end here.

The worker binds and the TEE connects, also where the TEE could bind: inside Gramine binding a
numeric TCP address aborts in libzmq. Heartbeats of libzmq's own thread show a peer that is gone or
stopped even while a long computation keeps the main threads busy.
"""

import os
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from tsqp.errors import (
    HandshakeError,
    ProtocolError,
    WorkerError,
    WorkerLost,
    WorkerUnavailable,
)
from tsqp.wire.codec import MAX_MESSAGE
from tsqp.wire.endpoint import Endpoint
from tsqp.wire.greeting import ask_mechanism
from tsqp.wire.quotas import client_name
from tsqp.wire.socket_file import identify, remove_own, remove_stale

HEARTBEAT_MS = 1000
SILENCE_MS = 4000  # a peer that misses its heartbeats for this long is gone
TICK_MS = 100  # how often a blocked wait looks at its deadline and at the connection
SEND_MS = 1000  # how long a peer that does not read is waited for
SPIN_S = 0.001
LOOKS = 8  # at the mailbox for one at the socket
MAX_UNREAD = 16  # messages that wait, here or for a peer, before no more are taken
MAX_FRAME = 2**30
KEY_LENGTH = 40  # characters of Z85, for 32 bytes
ASK_S = 1.0  # for finding out why a handshake failed
HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)

Buffer = bytes | memoryview


class Doorbell(Protocol):
    """Where mail may come besides the socket: see `tsqp.wire.mailbox`."""

    @property
    def has_mail(self) -> bool: ...

    def say_asleep(self, asleep: bool) -> None: ...


class _NoDoorbell:
    has_mail = False

    def say_asleep(self, asleep: bool) -> None:
        pass


NO_DOORBELL: Doorbell = _NoDoorbell()  # for a connection without shared memory


class _Socket:
    """What both ends share: options, the monitor, and receiving into fixed memory."""

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
        self._socket.set(zmq.RCVHWM, MAX_UNREAD)
        self._socket.set(zmq.SNDTIMEO, SEND_MS)
        # Only where it is asked for: with it, "localhost" may no longer mean 127.0.0.1.
        self._socket.set(zmq.IPV6, int(endpoint.address.startswith("[")))
        self._message = bytearray(MAX_MESSAGE)
        self._monitor: zmq.Socket[bytes] | None = None
        self.closed = False

    def _watch(self, events: int) -> None:
        self._monitor = self._socket.get_monitor_socket(events)

    def _events(self, wait_ms: int = 0) -> int:
        """All connection events since the last look, as bits."""
        assert self._monitor is not None
        seen = 0
        while self._monitor.poll(0 if seen else wait_ms):
            seen |= parse_monitor_message(self._monitor.recv_multipart())["event"]
        return seen

    def receive_into(self, buffer: memoryview | bytearray) -> int:
        """The true length of the next frame, whose beginning is now in `buffer`."""
        return self._socket.recv_into(buffer)

    @property
    def _has_message(self) -> bool:
        events = self._socket.get(zmq.EVENTS)
        assert isinstance(events, int)
        return bool(events & zmq.POLLIN)

    def _wait(self, doorbell: Doorbell, *, spin: bool) -> bool:
        """Wait for mail or a message for one tick; whether there is a message.

        Waking a core that sleeps takes longer than most answers, so with `spin` this looks for
        a while first. Each look offers the core to whoever else wants it: a peer on the same
        cores loses nothing.
        """
        end = time.perf_counter() + (SPIN_S if spin else 0)
        looks = 1 if doorbell is NO_DOORBELL else LOOKS  # at the mail; the socket is slower to ask
        while time.perf_counter() < end:
            for _ in range(looks):
                if doorbell.has_mail:
                    return False
                os.sched_yield()
            if self._has_message:
                return True
        doorbell.say_asleep(True)
        try:
            return not doorbell.has_mail and bool(self._socket.poll(TICK_MS))
        finally:
            doorbell.say_asleep(False)

    @property
    def more(self) -> bool:
        """Whether the message received so far has further frames."""
        return bool(self._socket.get(zmq.RCVMORE))

    def receive_exactly(self, buffers: Sequence[memoryview], sender: str) -> None:
        """Receive the remaining frames of a message into `buffers`, one each.

        Raises:
            ProtocolError: there are fewer or more frames, or one has another length.
        """
        fault = ""
        for number, buffer in enumerate(buffers):
            if not self.more:
                fault = f"{number} tensors where {len(buffers)} are due"
                break
            length = self._socket.recv_into(buffer)
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
            self._socket.recv_into(bytearray())
            dropped += 1
        return dropped

    def close(self) -> None:
        """Close the socket and everything behind it; safe to call twice."""
        if self.closed:
            return
        self.closed = True
        try:
            if self._monitor is not None:
                self._events()  # a full monitor blocks libzmq's thread, which would block the rest
                self._socket.disable_monitor()
        finally:  # a socket that an interrupt left open would make the end of the context wait
            self._context.destroy(linger=0)


class ClientSocket(_Socket):
    """The TEE's end of one connection, which is lost for good when it breaks once."""

    def __init__(self, endpoint: Endpoint, timeout: float, worker_key: str | None = None) -> None:
        """Connect within `timeout` seconds.

        Args:
            worker_key: public key that the worker must prove to hold the secret one of; everything
                that crosses is then encrypted. This side has a key pair for this connection alone.

        Raises:
            WorkerUnavailable: nobody listens there, or it is no ZeroMQ peer.
            HandshakeError: only one side encrypts, or the worker has another key.
        """
        super().__init__(zmq.DEALER, endpoint)
        self._name = str(endpoint)
        try:
            if worker_key is not None:
                public, secret = zmq.curve_keypair()
                self._socket.set(zmq.CURVE_PUBLICKEY, public)
                self._socket.set(zmq.CURVE_SECRETKEY, secret)
                self._socket.set(zmq.CURVE_SERVERKEY, worker_key.encode())
            self._socket.set(zmq.RECONNECT_IVL, TICK_MS)
            self._watch(zmq.EVENT_HANDSHAKE_SUCCEEDED | HANDSHAKE_FAILED | zmq.EVENT_DISCONNECTED)
            self._socket.connect(str(endpoint))
            if not self._await_connection(time.monotonic() + timeout):
                raise _why_not(endpoint, encrypting=worker_key is not None)
        except zmq.ZMQError as exc:
            self.close()
            raise WorkerUnavailable(f"Cannot connect to {endpoint}: {exc.strerror}.") from exc
        except BaseException:
            self.close()
            raise

    def _await_connection(self, deadline: float) -> bool:
        """Whether the handshake succeeded, once a peer is there."""
        while True:
            left_ms = int((deadline - time.monotonic()) * 1000)
            events = self._events(max(left_ms, 1))
            if events & HANDSHAKE_FAILED:
                return False
            if events & zmq.EVENT_HANDSHAKE_SUCCEEDED:
                return True
            if left_ms <= 0:
                raise WorkerUnavailable(
                    f"No worker answers at {self._name}; start one with "
                    f"`tsqp worker MODEL --listen {self._name}`, or correct --worker."
                )

    def send(self, frames: Sequence[Buffer]) -> None:
        """Send one message; frames after the first must stay unchanged until they have left.

        Raises:
            WorkerLost: the connection broke, or the worker does not read.
        """
        self._check_connection()  # libzmq would deliver to whoever has taken the worker's place
        try:
            self._socket.send(frames[0], zmq.SNDMORE if len(frames) > 1 else 0)
            for place, frame in enumerate(frames[1:], 2):
                more = zmq.SNDMORE if place < len(frames) else 0
                self._socket.send(frame, more, copy=False)
        except zmq.ZMQError as exc:
            raise WorkerLost(f"The worker at {self._name} takes no more messages.") from exc

    def receive(self, deadline: float, doorbell: Doorbell) -> memoryview | None:
        """The first frame of the next message, valid until the next call; None for mail.

        Raises:
            WorkerLost: the connection broke, or `deadline` (of time.monotonic) passed.
        """
        try:
            while not self._wait(doorbell, spin=True):
                if doorbell.has_mail:
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
        if length > len(self._message):
            self.drain()
            raise ProtocolError(
                f"The worker at {self._name} sent a message of {length} bytes, where "
                f"{MAX_MESSAGE} are allowed."
            )
        return memoryview(self._message)[:length]

    def _check_connection(self) -> None:
        if self._events() & zmq.EVENT_DISCONNECTED:
            raise WorkerLost(
                f"The worker at {self._name} is gone: the connection broke; "
                "look at its output, restart it and try again."
            )


def _why_not(endpoint: Endpoint, *, encrypting: bool) -> WorkerError:
    """What is wrong with a peer whose handshake failed."""
    mechanism = ask_mechanism(endpoint, ASK_S)
    if mechanism is None or (mechanism == "NULL" and not encrypting):
        return WorkerUnavailable(
            f"What listens at {endpoint} is no TSQP worker, or one that hangs; check the endpoint."
        )
    if not encrypting:
        return HandshakeError(
            f"The worker at {endpoint} takes encrypted links alone; give its public key, "
            "which it shows when it starts, as --worker-key."
        )
    if mechanism == "NULL":
        return HandshakeError(
            f"The worker at {endpoint} does not encrypt, and a --worker-key was given for it; "
            "start it with --keyfile, or leave --worker-key out."
        )
    return HandshakeError(
        f"The worker at {endpoint} does not hold the secret key that belongs to this --worker-key; "
        "check the key, which the worker shows when it starts, and the endpoint."
    )


class ServerSocket(_Socket):
    """The worker's end: many peers, each with an identity that libzmq keeps apart."""

    def __init__(self, endpoint: Endpoint, secret_key: str | None = None) -> None:
        """Bind.

        Args:
            secret_key: takes none but encrypted connections, and proves who answers. Which clients
                may connect is left open.

        Raises:
            WorkerUnavailable: the address is taken, or may not be used.
        """
        super().__init__(zmq.ROUTER, endpoint)
        has_file = endpoint.scheme == "ipc" and not endpoint.is_abstract
        self._path = Path(endpoint.address) if has_file else None
        self._file: tuple[int, int] | None = None
        self._scheme = endpoint.scheme
        self._sender: zmq.Frame | None = None
        try:
            if self._path is not None:
                remove_stale(self._path)
            self._socket.set(zmq.SNDHWM, MAX_UNREAD)
            self._socket.set(zmq.ROUTER_MANDATORY, 1)  # sending to a peer that left is an error
            if secret_key is not None:
                self._socket.set(zmq.CURVE_SERVER, 1)
                self._socket.set(zmq.CURVE_SECRETKEY, secret_key.encode())
            self._watch(zmq.EVENT_DISCONNECTED)
            mask = os.umask(0o177)  # the socket file is for this user alone
            try:
                self._socket.bind(str(endpoint))
            finally:
                os.umask(mask)
            if self._path is not None:
                self._file = identify(self._path)
        except zmq.ZMQError as exc:
            self.close()
            raise WorkerUnavailable(f"Cannot listen on {endpoint}: {exc.strerror}.") from exc
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        """The endpoint in use, with the port that the system chose where it was 0."""
        address = self._socket.get(zmq.LAST_ENDPOINT)
        assert isinstance(address, bytes)
        return address.rstrip(b"\0").decode()

    def receive(
        self, doorbell: Doorbell, *, wait: bool, spin: bool
    ) -> tuple[bytes, memoryview] | None:
        """A peer and the first frame of its message; None for mail, or for one tick of silence.

        The frame is valid until the next call. A frame that is too long comes as an empty one.
        """
        if not (self._wait(doorbell, spin=spin) if wait else self._has_message):
            return None
        self._sender = self._socket.recv(copy=False)
        identity = self._sender.bytes
        if not self.more:
            return identity, memoryview(b"")
        length = self.receive_into(self._message)
        return identity, memoryview(self._message)[: length if length <= MAX_MESSAGE else 0]

    @property
    def client(self) -> str:
        """Who sent the message that was received last, see `client_name`."""
        assert self._sender is not None
        try:
            address = self._sender.get("Peer-Address")
        except zmq.ZMQError:  # libzmq does not know
            address = ""
        return client_name(self._scheme, str(address))

    def send(self, identity: bytes, frames: Sequence[Buffer], *, wait: bool) -> bool:
        """Send one message; False where the peer has left, or does not read.

        Args:
            wait: give a peer that has much to read some time before giving it up.
        """
        flags = 0 if wait else zmq.NOBLOCK
        try:
            self._socket.send(identity, flags | zmq.SNDMORE)
            for place, frame in enumerate(frames, 1):
                more = zmq.SNDMORE if place < len(frames) else 0
                self._socket.send(frame, flags | more, copy=place == 1)
        except zmq.ZMQError:
            return False
        return True

    def probe(self, identity: bytes, frame: bytes) -> bool:
        """Send one frame without waiting; False where the peer has left."""
        try:
            self._socket.send_multipart([identity, frame], zmq.NOBLOCK)
        except zmq.Again:
            return True  # it is there, and has more to read than it likes
        except zmq.ZMQError:
            return False
        return True

    def a_peer_left(self) -> bool:
        """Whether any connection ended since the last call."""
        return bool(self._events() & zmq.EVENT_DISCONNECTED)

    def close(self) -> None:
        """Close, and remove the socket file, which libzmq leaves; safe to call twice."""
        if self._path is not None and self._file is not None:
            remove_own(self._path, self._file)
            self._file = None
        super().close()


def new_key_pair() -> tuple[str, str]:
    """A public and a secret key."""
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def public_key_of(secret_key: str) -> str:
    """The public key that belongs to a secret one."""
    return zmq.curve_public(secret_key.encode()).decode()


def is_key(text: str) -> bool:
    """Whether `text` has the form of a key."""
    try:
        return len(text) == KEY_LENGTH and len(z85.decode(text)) == KEY_LENGTH // 5 * 4
    except (ValueError, KeyError, struct.error):
        return False
