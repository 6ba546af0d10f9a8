"""Evidence of a platform, in the two forms in which it travels.

In a certificate it is an extension: the CCC/Gramine format of attested TLS. At
/.well-known/tsqp-attestation it is a JSON object with binary fields in base64.
"""

import base64
import binascii
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from tsqp.api.cbor import decode_canonical, encode_canonical
from tsqp.api.claims import MAX_CLAIMS
from tsqp.errors import AttestationError

PLATFORMS = ("sgx", "tdx", "sev-snp", "simulated")
PATH = "/.well-known/tsqp-attestation"
EXTENSION_OID = "2.23.133.5.4.9"
MAX_JSON = 64 * 1024  # bytes
MAX_QUOTE = 16 * 1024  # bytes
MAX_CERTIFICATES = 16 * 1024  # bytes
MAX_EXTENSION = MAX_QUOTE + MAX_CLAIMS + 64  # bytes

_TAG = bytes.fromhex("d9ea60")  # CBOR's tag 60000
_REQUIRED = {"platform", "quote", "claims", "certificates"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a platform gives for one set of claims. Nothing in it is verified yet.

    Attributes:
        platform: sgx, tdx, sev-snp or simulated.
        quote: a quote of SGX or TDX, or a report of SEV-SNP (1,184 bytes); at most 16 KiB.
        claims: encoded `Claims`, at most 4,096 bytes.
        certificates: of SEV-SNP, the table of certificates in GHCB's format; otherwise empty.
        configuration: the configuration whose hash is in the claims, as a JSON object; None where
            the evidence came without it.

    Raises:
        AttestationError: a value has another type or is too long.
    """

    platform: str
    quote: bytes
    claims: bytes
    certificates: bytes = b""
    configuration: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.platform not in PLATFORMS:
            raise AttestationError(
                f"The evidence is of an unknown platform; known are {', '.join(PLATFORMS)}."
            )
        for name, value, limit in (
            ("quote", self.quote, MAX_QUOTE),
            ("claims", self.claims, MAX_CLAIMS),
            ("certificates", self.certificates, MAX_CERTIFICATES),
        ):
            if not isinstance(value, bytes) or len(value) > limit:
                raise AttestationError(
                    f'"{name}" of the evidence must have at most {limit:,} bytes.'
                )
        if not isinstance(self.configuration, dict | None):
            raise AttestationError('"configuration" of the evidence must be an object.')

    def to_json(self) -> bytes:
        """The body of GET /.well-known/tsqp-attestation.

        Raises:
            AttestationError: it would have more than 64 KiB.
        """
        fields: dict[str, Any] = {
            "platform": self.platform,
            "quote": base64.b64encode(self.quote).decode(),
            "claims": base64.b64encode(self.claims).decode(),
            "certificates": base64.b64encode(self.certificates).decode(),
        }
        if self.configuration is not None:
            fields["configuration"] = self.configuration
        body = canonical_json(fields)
        if len(body) > MAX_JSON:
            raise AttestationError(f"The evidence has more than {MAX_JSON:,} bytes.")
        return body

    @classmethod
    def from_json(cls, data: bytes) -> "Evidence":
        """Read what `to_json` wrote.

        Raises:
            AttestationError: it has more than 64 KiB, is not such an object, or has a missing,
                unknown or wrong field.
        """
        if len(data) > MAX_JSON:
            raise AttestationError(f"The evidence has more than {MAX_JSON:,} bytes.")
        try:
            fields = json.loads(data, object_pairs_hook=_without_duplicates)
        except (ValueError, RecursionError):
            raise AttestationError("The evidence is not valid JSON.") from None
        if not isinstance(fields, dict) or set(fields) - {"configuration"} != _REQUIRED:
            raise AttestationError(
                "The evidence must be an object with platform, quote, claims and certificates, "
                "and perhaps configuration."
            )
        return cls(
            platform=fields["platform"] if isinstance(fields["platform"], str) else "",
            quote=_from_base64(fields["quote"], "quote"),
            claims=_from_base64(fields["claims"], "claims"),
            certificates=_from_base64(fields["certificates"], "certificates"),
            configuration=fields.get("configuration"),
        )

    def to_extension(self) -> bytes:
        """The value of the certificate extension 2.23.133.5.4.9, without `certificates`."""
        return _TAG + encode_canonical([self.quote, self.claims])

    @classmethod
    def from_extension(cls, data: bytes, platform: str) -> "Evidence":
        """Read what `to_extension` wrote.

        Args:
            platform: what the reader takes it for: the format does not name it.

        Raises:
            AttestationError: it is not tag 60000 with a quote and claims in CBOR.
        """
        if data[: len(_TAG)] != _TAG:
            raise AttestationError("The certificate's evidence has another format.")
        value = decode_canonical(
            data[len(_TAG) :], MAX_EXTENSION - len(_TAG), "The certificate's evidence"
        )
        if not isinstance(value, list) or len(value) != 2:
            raise AttestationError("The certificate's evidence must be a quote and claims.")
        quote, claims = value
        return cls(platform=platform, quote=quote, claims=claims)


def canonical_json(value: object) -> bytes:
    """JSON in UTF-8 with sorted keys and no spaces, so that equal values have equal bytes.

    Raises:
        AttestationError: the value is not JSON; it may hold NaN or a lone surrogate.
    """
    try:
        text = json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
        return text.encode()
    except (ValueError, TypeError, RecursionError):
        raise AttestationError("The configuration is not valid JSON.") from None


def configuration_digest(configuration: dict[str, Any]) -> bytes:
    """The 32 bytes that claims hold of a configuration: SHA-256 of its canonical JSON."""
    return hashlib.sha256(canonical_json(configuration)).digest()


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name occurs twice")
    return entries


def _from_base64(text: object, name: str) -> bytes:
    try:
        if isinstance(text, str):
            return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        pass
    raise AttestationError(f'"{name}" of the evidence must be base64.')
