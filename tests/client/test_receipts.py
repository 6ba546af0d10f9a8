"""Receipts as a client checks them, and everything that is not one."""

import base64
import hashlib
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from tsqp.api.claims import Claims
from tsqp.api.receipts import COMMENT, MAX_RECEIPT, Receipt, read_receipt, split_stream
from tsqp.client.receipts import check_claims, check_receipt
from tsqp.errors import AttestationError

REQUEST, RESPONSE = b'{"prompt": "a"}', b'{"text": "b"}'
KEY = ec.generate_private_key(ec.SECP256R1())


def public(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


DIGEST = hashlib.sha256(public(KEY)).digest()
CLAIMS = Claims(
    public_key=DIGEST, nonce=b"", model_digest=f"sha256:{'1' * 64}", privacy="pad", field="wide",
    version="0.1.0", configuration=b"\2" * 32,
)  # fmt: skip


def receipt(**changed: Any) -> Receipt:
    fields: dict[str, Any] = {
        "id": "0" * 32,
        "request": hashlib.sha256(REQUEST).hexdigest(),
        "response": hashlib.sha256(RESPONSE).hexdigest(),
        "status": 200,
        "path": "/v1/completions",
        "time": 1_795_000_000,
        "model_digest": CLAIMS.model_digest,
        "privacy": CLAIMS.privacy,
        "field": CLAIMS.field,
        "version": CLAIMS.version,
        "configuration": CLAIMS.configuration.hex(),
        "platform": "sgx",
        "key": base64.b64encode(public(KEY)).decode(),
    }
    return Receipt(**fields | changed)


def sign(data: bytes, key: ec.EllipticCurvePrivateKey = KEY) -> bytes:
    numbers = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
    return b"".join(number.to_bytes(32, "big") for number in numbers)


def check(text: str, request: bytes = REQUEST, response: bytes = RESPONSE) -> Receipt:
    return check_receipt(text, request=request, response=response, key=DIGEST)


VALID = receipt().sign(sign)


def test_a_receipt_is_valid_for_its_request_and_response() -> None:
    assert check(VALID) == receipt()
    assert check(VALID + "\n") == receipt()
    check_claims(receipt(), CLAIMS, "sgx")


@pytest.mark.parametrize("place", range(len(REQUEST)))
def test_one_changed_byte_of_the_request_is_noticed(place: int) -> None:
    changed = bytearray(REQUEST)
    changed[place] ^= 1
    with pytest.raises(AttestationError, match="another request"):
        check(VALID, request=bytes(changed))


@pytest.mark.parametrize("place", range(len(RESPONSE)))
def test_one_changed_byte_of_the_response_is_noticed(place: int) -> None:
    changed = bytearray(RESPONSE)
    changed[place] ^= 1
    with pytest.raises(AttestationError, match="another response"):
        check(VALID, response=bytes(changed))


def test_one_changed_character_of_the_receipt_is_noticed() -> None:
    for place in range(len(VALID)):
        other = "B" if VALID[place] != "B" else "C"
        with pytest.raises(AttestationError):
            check(VALID[:place] + other + VALID[place + 1 :])


def test_a_receipt_that_is_cut_or_longer_is_refused() -> None:
    for text in (*(VALID[:end] for end in range(len(VALID))), VALID + "A", "A" + VALID, VALID * 2):
        with pytest.raises(AttestationError):
            check(text)


@given(st.text(max_size=200) | st.lists(st.text("AZaz09-_", max_size=40)).map(".".join))
def test_no_text_is_a_receipt_by_chance(text: str) -> None:
    with pytest.raises(AttestationError):
        check(text)


def test_a_receipt_of_another_key_is_refused() -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    key = base64.b64encode(public(other)).decode()
    with pytest.raises(AttestationError, match="another key"):
        check(receipt(key=key).sign(lambda data: sign(data, other)))
    with pytest.raises(AttestationError, match="signature is wrong"):
        check(receipt().sign(lambda data: sign(data, other)))


def test_a_key_of_another_kind_is_refused() -> None:
    other = ec.generate_private_key(ec.SECP384R1())
    for key in (public(other), b"", b"not a key"):
        text = receipt(key=base64.b64encode(key).decode()).sign(lambda _: bytes(64))
        with pytest.raises(AttestationError, match="not a key of ECDSA"):
            check_receipt(
                text, request=REQUEST, response=RESPONSE, key=hashlib.sha256(key).digest()
            )


@pytest.mark.parametrize("signature", [bytes(64), b"\xff" * 64, bytes(63), b""])
def test_a_signature_of_a_wrong_form_is_refused(signature: bytes) -> None:
    with pytest.raises(AttestationError):
        check(receipt().sign(lambda _: signature))


@pytest.mark.parametrize("header", ['{"alg":"none"}', '{"alg":"HS256","typ":"tsqp-receipt"}', "{}"])
def test_no_other_algorithm_is_followed(header: str) -> None:
    _, payload, signature = VALID.split(".")
    protected = base64.urlsafe_b64encode(header.encode()).rstrip(b"=").decode()
    for end in (signature, ""):
        with pytest.raises(AttestationError):
            check(f"{protected}.{payload}.{end}")


@pytest.mark.parametrize(
    "wrong",
    [
        {"status": "200"}, {"status": True}, {"status": -1}, {"time": 2**60}, {"time": 1.5},
        {"request": "A" * 64}, {"response": ""}, {"id": 1}, {"key": "?"}, {"path": None},
        {"configuration": "00"}, {"privacy": 1}, {"field": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_field_of_a_wrong_form_is_refused_though_it_is_signed(wrong: dict[str, Any]) -> None:
    with pytest.raises(AttestationError):
        check(receipt(**wrong).sign(sign))


def test_missing_and_unknown_fields_are_refused_though_they_are_signed() -> None:
    protected, payload, _ = VALID.split(".")
    fields = json.loads(base64.urlsafe_b64decode(payload + "=="))
    for changed in (fields | {"more": 1}, {k: v for k, v in fields.items() if k != "time"}, [], 1):
        raw = json.dumps(changed, sort_keys=True, separators=(",", ":")).encode()
        signed = f"{protected}.{base64.urlsafe_b64encode(raw).rstrip(b'=').decode()}"
        signature = base64.urlsafe_b64encode(sign(signed.encode())).rstrip(b"=").decode()
        with pytest.raises(AttestationError, match="fields of this receipt"):
            check(f"{signed}.{signature}")


def test_a_long_receipt_is_not_read() -> None:
    with pytest.raises(AttestationError):
        read_receipt(receipt(path="a" * MAX_RECEIPT).sign(sign))


@pytest.mark.parametrize(
    "changed",
    [
        {"model_digest": f"sha256:{'2' * 64}"}, {"privacy": "open"}, {"field": None},
        {"version": "0"}, {"configuration": "03" * 32}, {"platform": "tdx"},
    ],
    ids=str,
)  # fmt: skip
def test_a_receipt_that_differs_from_the_evidence_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(AttestationError, match="differ in"):
        check_claims(receipt(**changed), CLAIMS, "sgx")


def test_the_receipt_at_the_end_of_a_stream_is_split_off() -> None:
    stream = b"data: 1\n\ndata: [DONE]\n\n"
    assert split_stream(stream + COMMENT + b"a.b.c\n\n") == (stream, "a.b.c")
    for body in (stream, b"", b'{"text": ": tsqp-receipt a"}', COMMENT + b"a\n\ndata: more\n\n"):
        assert split_stream(body) == (body, None)
    within = b'data: "' + COMMENT + b'a"\n\n'
    assert split_stream(within) == (within, None)
