"""What a server claims about itself. The platform signs the hash of these claims.

The outer form is the interoperable one of attested TLS: a CBOR map with "pubkey-hash" and "nonce".
Ours is one more entry, "tsqp". Everything else that a verifier learns about the server hangs on it.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from tsqp.api.cbor import decode_canonical, encode_canonical
from tsqp.errors import AttestationError

PRIVACY_MODES = ("tee", "open", "pad", "shares")
FIELDS = ("wide", "compact", "lattice")
MAX_CLAIMS = 4096  # bytes
MIN_NONCE, MAX_NONCE = 16, 64  # bytes
REPORT_DATA = 64  # bytes
SHA256 = 1  # the number of the algorithm in IANA's registry of named information

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z", re.ASCII)
_VERSION = re.compile(r"[0-9A-Za-z.+_:-]{1,128}\Z", re.ASCII)
_NAMES = {"configuration", "field", "model-digest", "privacy", "version"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """The claims of one server, with one nonce.

    Attributes:
        public_key: SHA-256 of the TLS key, a SubjectPublicKeyInfo in DER.
        nonce: 16 to 64 bytes that the verifier chose; empty in a certificate.
        model_digest: "sha256:" and 64 hexadecimal digits; see `checkpoint.model_digest`.
        privacy: tee, open, pad or shares.
        field: wide, compact or lattice; None in modes that do not compute in a field.
        version: of the code, 1 to 128 letters, digits and . + _ : -
        configuration: SHA-256 of the whole effective configuration as canonical JSON.

    Raises:
        AttestationError: a value has another type, length or form.
    """

    public_key: bytes
    nonce: bytes
    model_digest: str
    privacy: str
    field: str | None
    version: str
    configuration: bytes

    def __post_init__(self) -> None:
        _check(_is_bytes(self.public_key, 32), "public key")
        _check(
            _is_bytes(self.nonce) and (not self.nonce or _is_nonce(self.nonce)),
            "nonce",
        )
        _check(_matches(_DIGEST, self.model_digest), "model digest")
        _check(self.privacy in PRIVACY_MODES, "privacy mode")
        _check(self.field is None or self.field in FIELDS, "field")
        _check(_matches(_VERSION, self.version), "version")
        _check(_is_bytes(self.configuration, 32), "configuration")

    def encode(self) -> bytes:
        """The claims as a canonical CBOR map."""
        return encode_canonical(
            {
                "pubkey-hash": encode_canonical([SHA256, self.public_key]),
                "nonce": self.nonce,
                "tsqp": {
                    "configuration": self.configuration,
                    "field": self.field,
                    "model-digest": self.model_digest,
                    "privacy": self.privacy,
                    "version": self.version,
                },
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> "Claims":
        """Read claims that `encode` wrote.

        Raises:
            AttestationError: they are longer than 4,096 bytes, not in the canonical form, or have a
                missing, unknown or wrong entry.
        """
        outer = _entries(
            decode_canonical(data, MAX_CLAIMS, "The attested claims"),
            {"pubkey-hash", "nonce", "tsqp"},
        )
        inner = _entries(outer["tsqp"], _NAMES)
        return cls(
            public_key=_key_hash(outer["pubkey-hash"]),
            nonce=outer["nonce"],
            model_digest=inner["model-digest"],
            privacy=inner["privacy"],
            field=inner["field"],
            version=inner["version"],
            configuration=inner["configuration"],
        )


def report_data(encoded: bytes) -> bytes:
    """The 64 bytes that a platform signs for encoded claims: their SHA-256, then zeros."""
    return hashlib.sha256(encoded).digest().ljust(REPORT_DATA, b"\0")


def _is_nonce(nonce: bytes) -> bool:
    return MIN_NONCE <= len(nonce) <= MAX_NONCE


def _is_bytes(value: object, length: int | None = None) -> bool:
    return isinstance(value, bytes) and length in (None, len(value))


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.match(value) is not None


def _check(is_right: bool, what: str) -> None:
    if not is_right:
        raise AttestationError(f"The {what} in the attested claims is malformed.")


def _entries(value: Any, names: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != names:
        raise AttestationError("The attested claims have a missing or unknown entry.")
    return value


def _key_hash(data: Any) -> bytes:
    """The hash in a hash entry of the interoperable format, which is CBOR within a byte string."""
    _check(_is_bytes(data), "public key")
    entry = decode_canonical(data, 64, "The public key in the attested claims")
    _check(isinstance(entry, list) and len(entry) == 2 and entry[0] == SHA256, "public key")
    _check(type(entry[0]) is int and _is_bytes(entry[1], 32), "public key")
    return bytes(entry[1])
