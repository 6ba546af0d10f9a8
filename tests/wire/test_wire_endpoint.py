"""Parsing endpoints."""

import socket

import pytest

from tsqp.errors import WorkerUnavailable
from tsqp.wire.endpoint import MAX_SOCKET_PATH, parse_endpoint

LONGEST = "/" + "x" * (MAX_SOCKET_PATH - 1)


@pytest.mark.parametrize(
    ("text", "scheme", "address", "is_loopback"),
    [
        ("local", "local", "", True),
        ("inproc", "inproc", "", True),
        ("ipc:///run/tsqp.sock", "ipc", "/run/tsqp.sock", True),
        ("ipc://relative.sock", "ipc", "relative.sock", True),
        ("ipc://@abstract", "ipc", "@abstract", True),
        (f"ipc://{LONGEST}", "ipc", LONGEST, True),
        ("tcp://127.0.0.1:5555", "tcp", "127.0.0.1:5555", True),
        ("tcp://127.9.9.9:1", "tcp", "127.9.9.9:1", True),
        ("tcp://localhost:65535", "tcp", "localhost:65535", True),
        ("tcp://[::1]:5555", "tcp", "[::1]:5555", True),
        ("tcp://[2001:db8::1]:5555", "tcp", "[2001:db8::1]:5555", False),
        ("tcp://10.0.0.1:0", "tcp", "10.0.0.1:0", False),
        ("tcp://0.0.0.0:5555", "tcp", "0.0.0.0:5555", False),
        ("tcp://*:5555", "tcp", "*:5555", False),
        ("tcp://gpu.example:5555", "tcp", "gpu.example:5555", False),
        ("tcp://localhost.example:5555", "tcp", "localhost.example:5555", False),
        ("tcp://gpu.localhost:5555", "tcp", "gpu.localhost:5555", False),
        ("tcp://127.1:5555", "tcp", "127.1:5555", True),
        ("tcp://0x7F000001:5555", "tcp", "0x7F000001:5555", True),
        ("tcp://2130706433:5555", "tcp", "2130706433:5555", True),
        ("tcp://0127.0.0.1:5555", "tcp", "0127.0.0.1:5555", False),
        ("tcp://10.1:5555", "tcp", "10.1:5555", False),
        ("tcp://0:5555", "tcp", "0:5555", False),
        ("tcp://127.1.example:5555", "tcp", "127.1.example:5555", False),
        ("tcp://[::ffff:127.0.0.1]:5555", "tcp", "[::ffff:127.0.0.1]:5555", True),
        ("tcp://[::ffff:10.0.0.1]:5555", "tcp", "[::ffff:10.0.0.1]:5555", False),
        ("tcp://[fe80::1%eth0]:5555", "tcp", "[fe80::1%eth0]:5555", False),
    ],
)
def test_a_good_endpoint_is_parsed(text: str, scheme: str, address: str, is_loopback: bool) -> None:
    endpoint = parse_endpoint(text)
    assert (endpoint.scheme, endpoint.address) == (scheme, address)
    assert endpoint.is_loopback == is_loopback
    assert endpoint.is_abstract == (address == "@abstract")
    assert str(endpoint) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ipc",
        "ipc:",
        "ipc://",
        "ipc://@",
        "ipc://*",
        "ipc:///run/\0",
        "ipc:///run/\n",
        "ipc:///run/\udc80",
        f"ipc://{LONGEST}x",
        f"ipc:///{'ä' * 54}",
        "/run/tsqp.sock",
        "tcp://",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:",
        "tcp://:5555",
        "tcp://127.0.0.1:65536",
        "tcp://127.0.0.1:-1",
        "tcp://127.0.0.1:+1",
        "tcp://127.0.0.1:1_0",
        "tcp://127.0.0.1:٣",
        f"tcp://127.0.0.1:{'9' * 5000}",
        "tcp://::1:5555",
        "tcp://[::1:5555",
        "tcp://\udc80:5555",
        "tcp://127.0.0.1 example.org:5555",
        "tcp://[[::1]]:5555",
        "tcp://[::]:0;[2001:db8::1]:5555",
        "tcp://eth0;192.0.2.1:5555",
        "http://127.0.0.1:5555",
        "local://",
        "inproc://x",
        "TCP://127.0.0.1:5555",
    ],
    ids=lambda text: ascii(text)[:40],
)
def test_a_bad_endpoint_is_refused_with_the_form_to_use(text: str) -> None:
    with pytest.raises(WorkerUnavailable, match=r"ipc:///|tcp://127.0.0.1:5555|shorter") as caught:
        parse_endpoint(text)
    assert str(caught.value).encode()


def test_an_address_to_connect_from_is_refused_by_name() -> None:
    with pytest.raises(WorkerUnavailable, match="names one address, the worker's"):
        parse_endpoint("tcp://[::]:0;[2001:db8::1]:5555")


@pytest.mark.parametrize(
    "host",
    ["127.1", "0x7f.1", "017700000001", "2130706433", "0", "192.0.513", "[::1]", "[::ffff:7f00:1]"],
)
def test_an_address_is_what_a_connection_takes_it_for(host: str) -> None:
    name = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    ((*_, (numeric, *_)),) = socket.getaddrinfo(name, 1, family, socket.SOCK_STREAM)
    assert str(parse_endpoint(f"tcp://{host}:1").ip) == numeric.removeprefix("::ffff:")


@pytest.mark.parametrize("host", ["gpu.example", "localhost", "*", "127.0.0.1.", "1.2.3.4.5"])
def test_a_name_is_no_address(host: str) -> None:
    assert parse_endpoint(f"tcp://{host}:1").ip is None
