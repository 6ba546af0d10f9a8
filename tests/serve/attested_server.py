"""A server with attested TLS, in a process of its own, and what a client sees of it."""

import http.client
import socket
import ssl
from dataclasses import dataclass

from cryptography import x509
from protocol_helpers import Commands
from serve_client import DEADLINE_S, Server
from serve_process import begin

from tsqp.api.claims import Claims
from tsqp.api.evidence import EXTENSION_OID, Evidence


def trusting_context() -> ssl.SSLContext:
    """TLS that takes every certificate, as a client does that verifies evidence instead."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


@dataclass
class AttestedServer(Server):
    """As `Server`, by TLS."""

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPSConnection(
            "127.0.0.1", self.port, timeout=DEADLINE_S, context=trusting_context()
        )

    def certificate(self) -> x509.Certificate:
        """What the server presents to a new connection."""
        with (
            socket.create_connection(("127.0.0.1", self.port), DEADLINE_S) as raw,
            trusting_context().wrap_socket(raw) as tls,
        ):
            der = tls.getpeercert(binary_form=True)
        assert der is not None
        return x509.load_der_x509_certificate(der)

    def extension(self) -> Evidence:
        """The evidence in that certificate."""
        oid = x509.ObjectIdentifier(EXTENSION_OID)
        value = self.certificate().extensions.get_extension_for_oid(oid).value.public_bytes()
        return Evidence.from_extension(value, "simulated")

    def evidence(self, nonce: bytes) -> Evidence:
        """Fresh evidence, asked for without an API key."""
        path = f"/.well-known/tsqp-attestation?nonce={nonce.hex()}"
        reply = self.ask(path, headers={"Authorization": ""})
        assert reply.status == 200, reply
        return Evidence.from_json(reply.body)

    def claims(self) -> Claims:
        return Claims.decode(self.evidence(bytes(32)).claims)


def begin_attested(commands: Commands, *arguments: object) -> AttestedServer:
    """Start a server, and wait until it presents its evidence."""
    running, server = begin(commands, *arguments)
    running.says("attested by ")
    return AttestedServer(server.port, log=server.log)
