"""The ZeroMQ socket of a worker."""

import os
import threading
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

import zmq

from tsqp.errors import WorkerUnavailable
from tsqp.wire.codec import MAX_MESSAGE
from tsqp.wire.endpoint import Endpoint
from tsqp.wire.inflow import LOOK_MS
from tsqp.wire.peers import Peers
from tsqp.wire.quotas import client_name
from tsqp.wire.socket_file import identify, remove_own, remove_stale
from tsqp.wire.wakeup import Wakeup
from tsqp.wire.zmq import MAX_UNREAD, BaseSocket, Buffer

FOREVER = -1


class ServerSocket(BaseSocket):
    """The worker's socket. It has many peers, which libzmq tells apart by an identity."""

    def __init__(self, endpoint: Endpoint, secret_key: str | None = None) -> None:
        """Bind.

        Args:
            secret_key: if given, only encrypted connections are accepted, and the worker proves its
                identity. Clients are not authenticated.

        Raises:
            WorkerUnavailable: the address is in use or not allowed.
        """
        super().__init__(zmq.ROUTER, endpoint)
        has_file = endpoint.scheme == "ipc" and not endpoint.is_abstract
        self._path = Path(endpoint.address) if has_file else None
        self._file: tuple[int, int] | None = None
        self._scheme = endpoint.scheme
        self._sender: zmq.Frame | None = None
        self._peers = Peers(encrypted=secret_key is not None)
        self._a_peer_left = False
        self._guard_error: Exception | None = None
        self._guard = threading.Thread(target=self._guard_peers, name="tsqp-guard", daemon=True)
        try:
            if self._path is not None:
                remove_stale(self._path)
            self._socket.set(zmq.SNDHWM, MAX_UNREAD)
            self._socket.set(zmq.ROUTER_MANDATORY, 1)  # sending to a peer that left raises an error
            if secret_key is not None:
                self._socket.set(zmq.CURVE_SERVER, 1)
                self._socket.set(zmq.CURVE_SECRETKEY, secret_key.encode())
            self._watch(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_MONITOR_STOPPED)
            self._guard.start()
            mask = os.umask(0o177)  # only this user may use the socket file
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

    def measure(self) -> None:
        """Set the limits of memory for all peers: once more when everything is loaded."""
        self._peers.measure()

    @property
    def address(self) -> str:
        """The endpoint in use, with the port that the system chose if port 0 was given."""
        address = self._socket.get(zmq.LAST_ENDPOINT)
        assert isinstance(address, bytes)
        return address.rstrip(b"\0").decode()

    def receive(self, wakeup: Wakeup, *, wait: bool, spin: bool) -> tuple[bytes, memoryview] | None:
        """A peer and the first frame of its message; None for mail, or after a tick of silence.

        The frame is valid until the next call. A frame that is too long is returned as empty.

        Raises:
            RuntimeError: peers are not watched any more, because of an error in this program.
        """
        if self._guard_error is not None:
            raise RuntimeError("The connections are not watched any more.") from self._guard_error
        if not (self._wait(wakeup, spin=spin) if wait else self._has_message):
            return None
        first = self._sender = self._socket.recv(copy=False)
        identity = first.bytes
        self._inflow = self._peers.inflow(first.get(zmq.SRCFD)) if self._peers else None
        if not self.more:
            return identity, memoryview(b"")
        length = self.receive_into(self._message)
        return identity, memoryview(self._message)[: length if length <= MAX_MESSAGE else 0]

    @property
    def client(self) -> str:
        """The client that sent the last received message, see `client_name`."""
        assert self._sender is not None
        try:
            address = self._sender.get("Peer-Address")
        except zmq.ZMQError:  # libzmq does not know it
            address = ""
        return client_name(self._scheme, str(address))

    def send(self, identity: bytes, frames: Sequence[Buffer], *, wait: bool) -> bool:
        """Send one message; returns False if the peer has left or does not read.

        Args:
            wait: whether to wait for a peer that still has many unread messages.
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
        """Send one frame without waiting; returns False if the peer has left."""
        try:
            self._socket.send_multipart([identity, frame], zmq.NOBLOCK)
        except zmq.Again:
            return True  # it is there, but has too many unread messages
        except zmq.ZMQError:
            return False
        return True

    def a_peer_left(self) -> bool:
        """Whether any connection ended since the last call."""
        left, self._a_peer_left = self._a_peer_left, False
        return left

    def _guard_peers(self) -> None:
        """Watch the peers until the monitor stops; a thread, as the main one may be computing."""
        try:
            with suppress(zmq.ZMQError), closing(self._peers):  # an error: the context has ended
                while self._guard_once():
                    self._peers.look()
        except Exception as exc:
            self._guard_error = exc

    def _guard_once(self) -> bool:
        """Take what the monitor tells next; whether it goes on."""
        for event, descriptor in self._next_events(LOOK_MS if self._peers else FOREVER):
            if event == zmq.EVENT_MONITOR_STOPPED:
                return False
            if event == zmq.EVENT_ACCEPTED:
                self._peers.add(descriptor)
            else:
                self._peers.remove(descriptor)
                self._a_peer_left = True
        return True

    def close(self) -> None:
        """Close the socket and remove its file, which libzmq leaves behind; safe to call twice."""
        if self._path is not None and self._file is not None:
            remove_own(self._path, self._file)
            self._file = None
        super().close()

    def _stop_monitor(self) -> None:
        super()._stop_monitor()
        if self._guard.ident is not None:
            self._guard.join(1.0)
