"""Fetches a secret from a key broker, which gives it to this process because of its evidence."""

import hashlib
import http.client
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tsqp import __version__
from tsqp.api.claims import Claims, report_data
from tsqp.api.evidence import Evidence, configuration_digest
from tsqp.api.key_release import (
    MAX_REQUEST,
    NO_MODEL,
    NONCE_BYTES,
    NONCE_PATH,
    RELEASE_PATH,
    SUITE,
    ReleaseRequest,
    binding,
    broker_address,
    check_name,
    decode_secret,
)
from tsqp.checkpoint.secret_file import write_new_file
from tsqp.client.attested_tls import KeyChanged, pinned_context
from tsqp.errors import AttestationError, UsageError, printable_path
from tsqp.runtime.environment import measured_variables
from tsqp.runtime.installed_code import installed_code
from tsqp.tee.attest.provider import Provider

TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Asker:
    """What a process that asks for a secret says about itself. Its platform attests this.

    Attributes:
        configuration: settings that the broker's policy may demand.
        model_digest: of the only model that the process accepts; zeros if there is no such demand.
        privacy, field: as in `Claims`.
    """

    configuration: Mapping[str, Any]
    model_digest: str = NO_MODEL
    privacy: str = "tee"
    field: str | None = None


def fetch_secret(url: str, name: str, key: bytes, provider: Provider, asker: Asker) -> bytes:
    """The secret of this name.

    Args:
        url: of the broker, https://HOST:PORT.
        key: SHA-256 of the broker's TLS key. Nothing is sent to anybody else, so that nobody can
            put a secret of their own in the place of the broker's.

    Raises:
        UsageError: the URL is wrong.
        AttestationError: the broker cannot be reached or refuses, or there is no evidence.
    """
    check_name(name)
    host, port = broker_address(url)
    connection = http.client.HTTPSConnection(
        host, port, timeout=TIMEOUT_S, context=pinned_context(key)
    )
    try:
        nonce = _nonce(_post(connection, NONCE_PATH, b""))
        private = X25519PrivateKey.generate()
        form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
        public = private.public_key().public_bytes(*form)
        evidence = _evidence(provider, public, nonce, asker)
        request = ReleaseRequest(name=name, public_key=public, evidence=evidence)
        ciphertext = decode_secret(_post(connection, RELEASE_PATH, request.to_json()))
        return SUITE.decrypt(ciphertext, private, info=binding(name, evidence.claims))
    except KeyChanged:
        raise AttestationError(
            "The broker's TLS key is not that of --broker-key; nothing was sent."
        ) from None
    except (OSError, http.client.HTTPException) as error:
        raise AttestationError(
            f"The broker cannot be reached, or its answer not be read ({type(error).__name__})."
        ) from None
    except (InvalidTag, ValueError):
        raise AttestationError("The broker's answer is not encrypted to this process.") from None
    finally:
        connection.close()


def write_secret(path: Path, secret: bytes) -> None:
    """Write a secret to a new file that only this user may read.

    Raises:
        UsageError: the file exists, or cannot be written.
    """
    try:
        write_new_file(path, secret)
    except OSError as error:
        raise UsageError(f"Cannot write {printable_path(path)}: {error.strerror}.") from None


def configuration_of_fetch(settings: Mapping[str, str]) -> dict[str, Any]:
    """The measured configuration of `tsqp keys fetch` with these settings."""
    return {
        "command": "keys fetch",
        "options": dict(settings),
        "environment": measured_variables(os.environ),
        "code": installed_code(),
    }


def _evidence(provider: Provider, public: bytes, nonce: bytes, asker: Asker) -> Evidence:
    configuration = dict(asker.configuration)
    claims = Claims(
        public_key=hashlib.sha256(public).digest(),
        nonce=nonce,
        model_digest=asker.model_digest,
        privacy=asker.privacy,
        field=asker.field,
        version=__version__,
        configuration=configuration_digest(configuration),
    ).encode()
    quote = provider.quote(report_data(claims))
    return Evidence(
        platform=quote.platform,
        quote=quote.quote,
        claims=claims,
        certificates=quote.certificates,
        configuration=configuration,
    )


def _post(connection: http.client.HTTPSConnection, path: str, body: bytes) -> bytes:
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    found = response.read(MAX_REQUEST + 1)
    if response.status == 403:
        raise AttestationError("The broker refuses; its log has the reason.")
    if response.status != 200 or len(found) > MAX_REQUEST:
        raise AttestationError(f"The broker gave no answer: status {response.status}.")
    return found


def _nonce(body: bytes) -> bytes:
    try:
        nonce = bytes.fromhex(json.loads(body)["nonce"])
    except (ValueError, TypeError, KeyError, RecursionError):
        nonce = b""
    if len(nonce) != NONCE_BYTES:
        raise AttestationError("The broker's nonce cannot be read.")
    return nonce
