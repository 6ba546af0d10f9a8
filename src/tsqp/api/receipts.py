"""Receipts: what a server signs about one request and its response.

A receipt is a JSON Web Signature in compact form (RFC 7515), with ES256 and this payload:

    {"configuration": HEX, "field": …, "id": HEX, "key": BASE64, "model_digest": "sha256:…",
     "path": "/v1/…", "platform": …, "privacy": …, "request": HEX, "response": HEX, "status": 200,
     "time": SECONDS, "version": …}

`request` and `response` are the SHA-256 of the bodies, byte by byte as they arrived and were sent.
`key` is the SubjectPublicKeyInfo of the key that signs, in DER. It is worth something only if
evidence attests its hash.
"""

import base64
import binascii
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from tsqp.errors import AttestationError

HEADER = "X-TSQP-Receipt"
ID_HEADER = "X-TSQP-Receipt-Id"
COMMENT = b": tsqp-receipt "  # begins the last line of a stream of events
MAX_RECEIPT = 8192
# One header only: what a receipt says of algorithms is never followed.
_PROTECTED = base64.urlsafe_b64encode(b'{"alg":"ES256","typ":"tsqp-receipt"}').rstrip(b"=").decode()
_FORM = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_HEX = re.compile(r"[0-9a-f]{64}")
_ID = re.compile(r"[0-9a-f]{32}")
_NUMBERS = {"status": 1000, "time": 2**37}  # each is below that
SIGNATURE_BYTES = 64  # r and s, big-endian


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What was asked and answered, by hashes, and by which server.

    Attributes:
        id: of the receipt.
        request, response: SHA-256 of the bodies, in hexadecimal digits.
        status: of the response.
        path: of the endpoint.
        time: when the response ended, in seconds since 1970 by the server's clock.
        model_digest, privacy, field, version, configuration: as in `Claims`; the last one in
            hexadecimal digits.
        platform: as in `Evidence`.
        key: the public key that signs, in base64.
    """

    id: str
    request: str
    response: str
    status: int
    path: str
    time: int
    model_digest: str
    privacy: str
    field: str | None
    version: str
    configuration: str
    platform: str
    key: str

    @property
    def public_key(self) -> bytes:
        """The key that signs, a SubjectPublicKeyInfo in DER."""
        return base64.b64decode(self.key)

    def sign(self, sign: Callable[[bytes], bytes]) -> str:
        """The signed receipt.

        Args:
            sign: makes a signature of 64 bytes: r and s of ECDSA on P-256 with SHA-256.
        """
        payload = json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()
        signed = f"{_PROTECTED}.{_encode(payload)}"
        return f"{signed}.{_encode(sign(signed.encode()))}"


@dataclass(frozen=True, slots=True)
class SignedReceipt:
    """A receipt as it was read, whose signature nobody has checked yet.

    Attributes:
        signed: the bytes that are signed.
        signature: r and s.
    """

    receipt: Receipt
    signed: bytes
    signature: bytes


def read_receipt(text: str) -> SignedReceipt:
    """Read a receipt. Its signature is not checked here.

    Raises:
        AttestationError: it is not a receipt, or not in the one form that servers write.
    """
    text = text.strip()
    if len(text) > MAX_RECEIPT or not _FORM.fullmatch(text):
        raise AttestationError("This is not a receipt: it must be three parts with dots between.")
    protected, payload, signature = text.split(".")
    if protected != _PROTECTED:
        raise AttestationError("This is not a receipt of TSQP: its header is another one.")
    try:
        found = json.loads(_decode(payload))
        raw = _decode(signature)
    except (ValueError, RecursionError):
        raise AttestationError("This receipt is damaged: its parts cannot be read.") from None
    if len(raw) != SIGNATURE_BYTES:
        raise AttestationError("The signature of this receipt has a wrong length.")
    receipt = _checked(found)
    if receipt.sign(lambda _: raw) != text:  # one form only, so a receipt has one text
        raise AttestationError("This receipt is not in the form that servers write.")
    return SignedReceipt(receipt, f"{protected}.{payload}".encode(), raw)


def split_stream(body: bytes) -> tuple[bytes, str | None]:
    """A stream of events without the receipt at its end, and that receipt, if it has one."""
    place = body.rfind(COMMENT)
    if place < 0 or (place and body[place - 1 : place] != b"\n"):
        return body, None
    line = body[place + len(COMMENT) :]
    if line.count(b"\n") != 2 or not line.endswith(b"\n\n"):
        return body, None
    return body[:place], line.decode("ascii", "replace").strip()


def _checked(found: Any) -> Receipt:
    names = {each.name for each in fields(Receipt)}
    if not isinstance(found, dict) or found.keys() != names:
        raise AttestationError("The fields of this receipt are not those of this version.")
    for name, value in found.items():
        if name == "field" and value is None:
            continue
        limit = _NUMBERS.get(name)
        is_right = type(value) is str if limit is None else _is_number(value, limit)
        if not is_right:
            raise AttestationError(f"The field {name} of this receipt has a wrong type or size.")
    shapes = {"request": _HEX, "response": _HEX, "configuration": _HEX, "id": _ID}
    for name, shape in shapes.items():
        if not shape.fullmatch(found[name]):
            raise AttestationError(f"The field {name} of this receipt has a wrong form.")
    try:
        base64.b64decode(found["key"], validate=True)
    except (binascii.Error, ValueError):
        raise AttestationError("The field key of this receipt has a wrong form.") from None
    return Receipt(**found)


def _is_number(value: object, limit: int) -> bool:
    return type(value) is int and 0 <= value < limit


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
