"""Checks receipts against what was sent and received."""

import hashlib
import hmac

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import load_der_public_key

from tsqp.api.claims import Claims
from tsqp.api.receipts import Receipt, SignedReceipt, read_receipt
from tsqp.errors import AttestationError


def check_receipt(text: str, *, request: bytes, response: bytes, key: bytes) -> Receipt:
    """A receipt that this key signed, for exactly these bodies.

    Args:
        text: the receipt.
        request, response: the bodies as they were sent and received, without a receipt at the end.
        key: SHA-256 of the server's public key, from verified evidence.

    Raises:
        AttestationError: the receipt is damaged, of another key, or of other bodies.
    """
    read = read_receipt(text)
    receipt = read.receipt
    if not hmac.compare_digest(hashlib.sha256(receipt.public_key).digest(), key):
        raise AttestationError("The receipt is signed by another key than the attested one.")
    _check_signature(read)
    for what, body, expected in (
        ("request", request, receipt.request),
        ("response", response, receipt.response),
    ):
        if hashlib.sha256(body).hexdigest() != expected:
            raise AttestationError(
                f"The receipt is for another {what}: these {len(body)} bytes have another hash."
            )
    return receipt


def check_claims(receipt: Receipt, claims: Claims, platform: str) -> None:
    """Check that a receipt says the same of the server as its evidence.

    Args:
        claims, platform: of the evidence.

    Raises:
        AttestationError: it does not.
    """
    for name in ("model_digest", "privacy", "field", "version"):
        if getattr(receipt, name) != getattr(claims, name):
            raise AttestationError(f"The receipt and the evidence differ in {name}.")
    if receipt.platform != platform:
        raise AttestationError("The receipt and the evidence differ in platform.")
    if receipt.configuration != claims.configuration.hex():
        raise AttestationError("The receipt and the evidence differ in configuration.")


def _check_signature(read: SignedReceipt) -> None:
    try:
        key = load_der_public_key(read.receipt.public_key)
    except ValueError:
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise AttestationError("The receipt's key is not a key of ECDSA on P-256.")
    r, s = (int.from_bytes(half, "big") for half in (read.signature[:32], read.signature[32:]))
    try:
        key.verify(encode_dss_signature(r, s), read.signed, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise AttestationError("The receipt's signature is wrong: it was changed.") from None
