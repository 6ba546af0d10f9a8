"""What a TEE sends to a key broker, and how the secret comes back.

The TEE asks for a nonce, makes a key for this one request, and lets its platform attest both. The
broker encrypts the secret to that key (HPKE, RFC 9180: X25519, HKDF-SHA256, AES-256-GCM), so
that only the attested process can read it, whoever is between the two.
"""

import base64
import binascii
import hashlib
import json
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.serialization import load_der_public_key

from tsqp.api.evidence import MAX_JSON, Evidence
from tsqp.errors import AttestationError, UsageError

NONCE_PATH, RELEASE_PATH = "/v1/keys/nonce", "/v1/keys/release"
NONCE_BYTES = 32
MAX_SECRET = 64 * 2**10  # bytes
MAX_REQUEST = 2 * MAX_JSON  # bytes
NO_MODEL = f"sha256:{'0' * 64}"  # the model's digest in these claims: none is loaded yet
SUITE = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEY = re.compile(r"(?:sha256:)?([0-9a-fA-F]{64})")
_LABEL = b"tsqp key release 1"


def check_name(name: object) -> str:
    """The name of a secret. Raises AttestationError if it is none."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise AttestationError(
            "The name of a secret has 1 to 64 letters, digits and . _ - and begins with a letter "
            "or a digit."
        )
    return name


def broker_address(url: str) -> tuple[str, int | None]:
    """The host and port of a broker's URL. Raises UsageError if it is not https://HOST:PORT."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or url.rstrip("/") != f"https://{parts.netloc}" or "@" in parts.netloc:
        raise UsageError("The broker's URL must be https://HOST:PORT.")
    return host, port


def parse_broker_key(text: str) -> bytes:
    """The 32 bytes of --broker-key. Raises UsageError if they are not 64 hexadecimal digits."""
    found = _KEY.fullmatch(text)
    if found is None:
        raise UsageError("--broker-key must be 64 hexadecimal digits.")
    return bytes.fromhex(found[1])


def binding(name: str, claims: bytes) -> bytes:
    """What a ciphertext is bound to: it decrypts only as this secret, for these claims."""
    return b"\0".join((_LABEL, name.encode(), hashlib.sha256(claims).digest()))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseRequest:
    """A request for a secret.

    Attributes:
        name: of the secret.
        public_key: an X25519 key whose hash is in the claims; a SubjectPublicKeyInfo in DER.
        evidence: over claims with the broker's nonce.
    """

    name: str
    public_key: bytes
    evidence: Evidence

    @property
    def key(self) -> X25519PublicKey:
        """The key to encrypt to.

        Raises:
            AttestationError: it is of another kind.
        """
        try:
            key = load_der_public_key(self.public_key)
        except ValueError:
            key = None
        if not isinstance(key, X25519PublicKey):
            raise AttestationError("The key of the request is not an X25519 key.")
        return key

    def to_json(self) -> bytes:
        """The body of a request."""
        return json.dumps(
            {
                "name": self.name,
                "key": base64.b64encode(self.public_key).decode(),
                "evidence": base64.b64encode(self.evidence.to_json()).decode(),
            }
        ).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "ReleaseRequest":
        """Read what `to_json` wrote.

        Raises:
            AttestationError: it is something else.
        """
        wrong = AttestationError("The request must be an object with name, key and evidence.")
        if len(data) > MAX_REQUEST:
            raise wrong
        try:
            found = json.loads(data)
            if not isinstance(found, dict) or found.keys() != {"name", "key", "evidence"}:
                raise wrong
            key, evidence = (_from_base64(found[name]) for name in ("key", "evidence"))
        except (ValueError, RecursionError):
            raise wrong from None
        return cls(
            name=check_name(found["name"]), public_key=key, evidence=Evidence.from_json(evidence)
        )


def encode_secret(ciphertext: bytes) -> bytes:
    """The body of an answer."""
    return json.dumps({"secret": base64.b64encode(ciphertext).decode()}).encode()


def decode_secret(body: bytes) -> bytes:
    """The ciphertext in an answer.

    Raises:
        AttestationError: it is not an answer.
    """
    try:
        found = json.loads(body)
        if isinstance(found, dict) and found.keys() == {"secret"}:
            return _from_base64(found["secret"])
    except (ValueError, RecursionError):
        pass
    raise AttestationError("The broker's answer cannot be read.")


def _from_base64(text: object) -> bytes:
    if not isinstance(text, str):
        raise ValueError("not a text")
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError("not base64") from error
