"""A TLS server of our own, which gives evidence and writes down every byte that it can read."""

import hashlib
import json
import socket
import ssl
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from ipaddress import ip_address
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from fake_platform import CONFIGURATION, DIGEST, name_of

from tsqp.api.claims import Claims, report_data
from tsqp.api.evidence import PATH, Evidence, configuration_digest
from tsqp.client.policy import Policy
from tsqp.tee.attest.simulated import Simulated

PROMPT = "a canary in a prompt"
POLICY = Policy(platforms=(), allow_simulated=True, any_measurement=True, privacy=("pad",))
POLICY_FILE = 'platforms = []\nallow_simulated = true\nany_measurement = true\nprivacy = ["pad"]\n'


@dataclass
class Identity:
    """A TLS key with a certificate, perhaps of an authority."""

    authority: "Identity | None" = None
    key: ec.EllipticCurvePrivateKey = field(
        default_factory=lambda: ec.generate_private_key(ec.SECP256R1())
    )

    def __post_init__(self) -> None:
        now = datetime.now(UTC)
        issuer = self if self.authority is None else self.authority
        names = x509.SubjectAlternativeName(
            [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
        )
        is_ca = self.authority is None
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(name_of("authority" if is_ca else "server"))
            .issuer_name(name_of("authority"))
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(names, False)
            .add_extension(x509.BasicConstraints(is_ca, None), True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()), False
            )
            .sign(issuer.key, hashes.SHA256())
        )

    @property
    def hash(self) -> bytes:
        """What claims hold of the key."""
        form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
        return hashlib.sha256(self.key.public_key().public_bytes(*form)).digest()

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    def context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        form = Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        with tempfile.NamedTemporaryFile() as file:
            file.write(self.pem + self.key.private_bytes(*form))
            file.flush()
            context.load_cert_chain(file.name)
        return context


def make_evidence(public_key: bytes, nonce: bytes, **changes: Any) -> Evidence:
    """Evidence of the simulated platform."""
    honest: dict[str, Any] = {
        "public_key": public_key,
        "nonce": nonce,
        "model_digest": DIGEST,
        "privacy": "pad",
        "field": "wide",
        "version": "0.1.0",
        "configuration": configuration_digest(CONFIGURATION),
    }
    claims = Claims(**(honest | changes)).encode()
    made = Simulated().quote(report_data(claims))
    return Evidence(
        platform="simulated",
        quote=made.quote,
        claims=claims,
        certificates=made.certificates,
        configuration=CONFIGURATION,
    )


class AttestedStub:
    """The server.

    Attributes:
        identity: its TLS key; a new one counts for new connections.
        answer: makes the body of evidence of a key hash and a nonce.
        status, headers: of the answer with evidence.
        received: all that clients sent, decrypted, except for questions for evidence.
        asked: how often evidence was asked for.
        streaming: set by a test to let a stream go on.
        hung_up: set when a client ends a connection in the middle of a stream.
    """

    def __init__(self, identity: Identity | None = None, port: int = 0) -> None:
        self.identity = identity or Identity()
        self.answer: Callable[[bytes, bytes], bytes] = lambda key, nonce: make_evidence(
            key, nonce
        ).to_json()
        self.status, self.headers = 200, {"Content-Type": "application/json"}
        self.received: list[bytes] = []
        self.asked = 0
        self.open: list[ssl.SSLSocket] = []
        self.streaming, self.hung_up = threading.Event(), threading.Event()
        stub = self

        class Handler(_Handler):
            owner = stub

        class Listener(ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True

            def finish_request(self, request: Any, client_address: Any) -> None:
                try:
                    request.settimeout(30)
                    with stub.identity.context().wrap_socket(request, server_side=True) as tls:
                        stub.open.append(tls)
                        super().finish_request(tls, client_address)
                except OSError:  # a client that refuses the key hangs up
                    pass

        self._listener = Listener(("127.0.0.1", port), Handler)
        self.port = self._listener.server_address[1]
        threading.Thread(target=self._listener.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def close(self) -> None:
        self.streaming.set()
        self._listener.shutdown()
        self._listener.server_close()
        for connection in self.open:
            with suppress(OSError):  # it has ended
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> "AttestedStub":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Handler(BaseHTTPRequestHandler):
    owner: AttestedStub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path != PATH:
            self._note(b"")
            return self._say(200, {"Content-Type": "application/json"}, b'{"data": []}')
        self.owner.asked += 1
        nonce = bytes.fromhex(parse_qs(url.query)["nonce"][0])
        body = self.owner.answer(self.owner.identity.hash, nonce)
        return self._say(self.owner.status, self.owner.headers, body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._note(body)
        if b'"stream"' in body:
            return self._stream()
        echoed = {"path": self.path, "headers": dict(self.headers), "body": body.decode()}
        return self._say(
            200, {"Content-Type": "application/json", "X-Own": "yes"}, json.dumps(echoed).encode()
        )

    def _stream(self) -> None:
        """Send an event, wait for the test, and send the end; notice a client that hangs up."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._chunk(b"data: first\n\n")
        try:
            while not self.owner.streaming.wait(0.05):
                self._chunk(b": still there\n\n")
        except OSError:
            self.owner.hung_up.set()
            return
        self._chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _note(self, body: bytes) -> None:
        head = f"{self.requestline}\n{self.headers}".encode()
        self.owner.received.append(head + body)

    def _say(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def policy_file(folder: Path, text: str = POLICY_FILE) -> Path:
    path = folder / "policy.toml"
    path.write_text(text)
    return path


def changed_policy(**demands: object) -> Policy:
    return msgspec.structs.replace(POLICY, **demands)
