"""Peers that speak ZeroMQ, or plain TCP, without our client and our server."""

import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import zmq
from wire_helpers import SEGMENT, TIMEOUT, eventually, hello, welcome

from tsqp.wire.codec import encode, tee_decoder, worker_decoder
from tsqp.wire.endpoint import Endpoint, parse_endpoint
from tsqp.wire.mailbox import (
    FLAG_BYTES,
    HEADER_BYTES,
    MAILBOX_BYTES,
    RING_BYTES,
    SLOT_BYTES,
    SLOTS,
    Mailbox,
)
from tsqp.wire.messages import Attach, Call, Hello, Message, Probe, SealedRef, Welcome
from tsqp.wire.shm import NamedSegment, SealedSegment

Frames = Sequence[bytes]
CALLS = 2 * FLAG_BYTES  # where the two rings begin
ANSWERS = CALLS + RING_BYTES


class RawClient:
    """A DEALER that sends whatever a test wants."""

    def __init__(
        self,
        endpoint: Endpoint,
        context: zmq.Context[Any] | None = None,
        server_key: str | None = None,
    ) -> None:
        self._own_context = zmq.Context() if context is None else None
        self._context = context or self._own_context
        self._socket = self._context.socket(zmq.DEALER)
        if server_key is not None:
            self._socket.curve_publickey, self._socket.curve_secretkey = zmq.curve_keypair()
            self._socket.curve_serverkey = server_key.encode()
        self._socket.set(zmq.LINGER, 2000)
        self._socket.set(zmq.RCVTIMEO, int(TIMEOUT * 1000))
        self._socket.connect(str(endpoint))

    def send(self, *frames: bytes) -> None:
        self._socket.send_multipart(frames)

    def receive(self) -> Message:
        """The next message but for probes, whatever its ticket."""
        while True:
            _, message = tee_decoder("a test").decode(self._socket.recv_multipart()[0])
            if not isinstance(message, Probe):
                return message

    def receive_frames(self) -> list[bytes]:
        """The frames of the next message, whatever it is."""
        return self._socket.recv_multipart()

    def shake_hands(self, **changes: Any) -> Message:
        self.send(encode(hello(**changes)))
        return self.receive()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        if self._own_context is not None:
            self._own_context.term()


class PostingClient(RawClient):
    """A client that posts whatever a test wants, in a segment of its own."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint)
        greeting = self.shake_hands()
        assert isinstance(greeting, Welcome)
        ref = greeting.segment
        assert isinstance(ref, SealedRef)
        self.segment = SealedSegment.open(ref.pid, ref.descriptor, ref.size)
        self.memory = self.segment.memory(MAILBOX_BYTES)
        self.mailbox = Mailbox(self.memory, "tee")
        self.send(encode(Attach(True, True)))

    def post(self, frame: bytes) -> None:
        if self.mailbox.post(frame):
            self.wake()

    def wake(self) -> None:
        self.send(encode(Probe()))

    def take(self) -> tuple[int, Message]:
        """The next posted answer, with its ticket."""
        assert eventually(lambda: self.mailbox.has_mail)
        mail = self.mailbox.take()
        assert mail is not None
        return tee_decoder("a test").decode(mail)

    def fill(self, place: int, sequence: int, length: int, content: bytes) -> None:
        """Write a slot of the ring of calls."""
        fill_slot(self.memory[CALLS:ANSWERS], place, sequence, length, content)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        del self.mailbox, self.memory
        self.segment.close()


def fill_slot(ring: memoryview, place: int, sequence: int, length: int, content: bytes) -> None:
    """Write one slot by hand: what is read from it may be whatever these say."""
    slot = ring[place * SLOT_BYTES : (place + 1) * SLOT_BYTES]
    slot[: HEADER_BYTES + len(content)] = struct.pack("<QQ", sequence, length) + content


class LyingWorker:
    """A ROUTER that shakes hands, and answers each call with frames that a test makes.

    Args:
        answers: each makes one message of the ticket of a call.
        greeting: makes what answers the handshake, of its nonce; None says nothing.
        offer: what answers a client that wants a segment with a name.
    """

    def __init__(
        self,
        *answers: Callable[[int], Frames],
        greeting: Callable[[bytes], Frames | None] = lambda nonce: [encode(welcome(nonce))],
        offer: Frames = (),
        repeat: bool = False,
    ) -> None:
        self._answers = answers
        self._offer_frames = offer
        self._greeting = greeting
        self._repeat = repeat
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.RCVTIMEO, 20)
        self._socket.set(zmq.SNDTIMEO, 20)
        self.port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self.endpoint = parse_endpoint(f"tcp://127.0.0.1:{self.port}")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def encrypt(self, secret_key: str) -> None:
        """Take encrypted links only, at another address than before."""
        self._socket.unbind(f"tcp://127.0.0.1:{self.port}")
        self._socket.set(zmq.CURVE_SERVER, 1)
        self._socket.set(zmq.CURVE_SECRETKEY, secret_key.encode())
        self.port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self.endpoint = parse_endpoint(f"tcp://127.0.0.1:{self.port}")

    def _serve(self) -> None:
        decoder = worker_decoder()
        while not self._stop.is_set():
            try:
                identity, frame = self._socket.recv_multipart()[:2]
            except zmq.Again:
                continue
            ticket, message = decoder.decode(frame)
            if isinstance(message, Hello):
                greeting = self._greeting(message.nonce)
                if greeting is not None:
                    self._socket.send_multipart([identity, *greeting])
            if isinstance(message, Attach) and message.wants_name:
                self._socket.send_multipart([identity, *self._offer_frames])
            while isinstance(message, Call) and not self._stop.is_set():
                for answer in self._answers:
                    self._socket.send_multipart([identity, *answer(ticket)])
                if not self._repeat:
                    break
                time.sleep(0.01)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(TIMEOUT)
        self._socket.close()
        self._context.term()
        assert not self._thread.is_alive()


class PostingLiar(LyingWorker):
    """A lying worker that shares a segment, in which a test writes what it likes."""

    def __init__(self, shm_folder: Path) -> None:
        self.segment = NamedSegment.create(SEGMENT, shm_folder)
        self.memory = self.segment.memory(MAILBOX_BYTES)
        super().__init__(greeting=self._offer)

    def _offer(self, nonce: bytes) -> Frames:
        self.segment.write(nonce)
        return [encode(welcome(nonce, segment=self.segment.ref))]

    def fill(self, place: int, sequence: int, length: int, content: bytes) -> None:
        """Write a slot of the ring of answers."""
        fill_slot(self.memory[ANSWERS:], place, sequence, length, content)

    def answer(self, place: int, frame: bytes) -> None:
        """Post an honest frame as the answer of that number, counted from 1."""
        self.fill(place % SLOTS, place, len(frame), frame)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        del self.memory
        self.segment.close()


class TCPServer:
    """A listening TCP socket that hands each connection to a thread of its own."""

    def __init__(self, handle: Callable[[socket.socket], None], port: int = 0) -> None:
        self._handle = handle
        self._listener = socket.create_server(("127.0.0.1", port))
        self._listener.settimeout(0.05)
        self.endpoint = parse_endpoint(f"tcp://127.0.0.1:{self._listener.getsockname()[1]}")
        self._connections: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._stop = threading.Event()

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            self._connections.append(connection)
            self._start(self._run, connection)

    def _run(self, connection: socket.socket) -> None:
        try:
            self._handle(connection)
        except OSError:
            return  # closed by the other side, or at the end

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        self._threads.append(threading.Thread(target=target, args=arguments))
        self._threads[-1].start()

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._threads[0].join(TIMEOUT)
        for connection in self._connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        for thread in self._threads:
            thread.join(TIMEOUT)
            assert not thread.is_alive()
        for connection in [*self._connections, self._listener]:
            connection.close()


class CountingProxy(TCPServer):
    """Passes a TCP connection on, and counts its bytes."""

    def __init__(self, target: Endpoint) -> None:
        super().__init__(self._pass_on)
        self.total = 0
        self._lock = threading.Lock()
        host, _, port = target.address.rpartition(":")
        self._target = (host, int(port))

    def _pass_on(self, client: socket.socket) -> None:
        server = socket.create_connection(self._target)
        self._connections.append(server)
        back = threading.Thread(target=self._pump, args=(server, client))
        back.start()
        self._pump(client, server)
        back.join()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(2**16):
                with self._lock:
                    self.total += len(data)
                sink.sendall(data)
        except OSError:
            pass  # one of them is closed, so is the other now
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
