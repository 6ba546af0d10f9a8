"""Parses the endpoints of `--listen` and `--worker`."""

import ipaddress
import re
import socket
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Literal

from tsqp.errors import WorkerUnavailable

MAX_SOCKET_PATH = 107  # sizeof(sockaddr_un.sun_path) - 1
FORMS = "ipc:///PATH, tcp://HOST:PORT, local, or inproc"
HOST = re.compile(r"[^][:;\s]+|\[[^][;\s]*:[^][;\s]*\]")  # a name, an IPv4 or an [IPv6] address


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A parsed endpoint. `address` is a path for ipc, HOST:PORT for tcp, and empty otherwise."""

    scheme: Literal["ipc", "tcp", "local", "inproc"]
    address: str = ""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.address}" if self.address else self.scheme

    @property
    def is_abstract(self) -> bool:
        """Whether it is an ipc name in Linux's abstract namespace, which has no file."""
        return self.scheme == "ipc" and self.address.startswith("@")

    @property
    def host(self) -> str:
        """The host of a tcp endpoint, without brackets."""
        return self.address.rpartition(":")[0].strip("[]") if self.scheme == "tcp" else ""

    @property
    def port(self) -> int:
        """The port of a tcp endpoint."""
        return int(self.address.rpartition(":")[2])

    @property
    def ip(self) -> IPv4Address | IPv6Address | None:
        """The IP address of a tcp endpoint, as libzmq parses it; None for a host name.

        Like libzmq, this accepts all spellings of inet_aton, such as 127.1 and 0x7f000001, and
        drops the zone of an address such as fe80::1%eth0.
        """
        host = self.host.rpartition("%")[0] or self.host
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            try:
                return IPv4Address(socket.inet_aton(host))
            except OSError:
                return None
        mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
        return address if mapped is None else mapped

    @property
    def is_loopback(self) -> bool:
        """Whether certainly only processes of this machine can reach it."""
        if self.scheme != "tcp":
            return True
        return self.host == "localhost" if self.ip is None else self.ip.is_loopback


def parse_endpoint(text: str) -> Endpoint:
    """Parse an endpoint.

    Raises:
        WorkerUnavailable: `text` has none of the known forms.
    """
    if text == "local":
        return Endpoint("local")
    if text == "inproc":
        return Endpoint("inproc")
    scheme, separator, address = text.partition("://")
    if separator and scheme == "ipc":
        return Endpoint("ipc", _checked_path(address))
    if separator and scheme == "tcp":
        return Endpoint("tcp", _checked_host_and_port(address))
    raise WorkerUnavailable(f"This is not an endpoint; use {FORMS}.")


def _checked_path(path: str) -> str:
    if not path.isprintable() or path in ("", "@", "*"):  # libzmq reads "*" as any free path
        raise WorkerUnavailable(
            f"An ipc endpoint needs a path, as in ipc:///run/tsqp.sock; {FORMS}."
        )
    if len(path.encode()) > MAX_SOCKET_PATH:
        raise WorkerUnavailable(
            f"The socket path has {len(path.encode())} bytes, and Unix sockets allow "
            f"{MAX_SOCKET_PATH}; use a shorter one, in /tmp or /run."
        )
    return path


def _checked_host_and_port(address: str) -> str:
    if ";" in address:  # libzmq reads the part before ";" as the address to connect from
        raise WorkerUnavailable(
            "A tcp endpoint names one address, the worker's; write it as tcp://127.0.0.1:5555."
        )
    host, _, port = address.rpartition(":")
    is_port = port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535
    if not host.isprintable() or not is_port or HOST.fullmatch(host) is None:
        raise WorkerUnavailable(
            "A tcp endpoint needs a host, and a port from 0 to 65535; "
            "write it as tcp://127.0.0.1:5555 or tcp://[::1]:5555."
        )
    return address
