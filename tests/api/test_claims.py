"""Claims and evidence: what one side writes the other reads, and nothing else is accepted."""

import dataclasses
import hashlib
import json

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqp.api.cbor import decode_canonical
from tsqp.api.claims import PRIVACY_MODES, Claims, report_data
from tsqp.api.evidence import MAX_JSON, Evidence, configuration_digest
from tsqp.errors import AttestationError

CLAIMS = Claims(
    public_key=b"k" * 32,
    nonce=b"n" * 32,
    model_digest="sha256:" + "0a" * 32,
    privacy="pad",
    field="wide",
    version="0.1.0",
    configuration=b"c" * 32,
)
EVIDENCE = Evidence(
    platform="sgx", quote=b"quote", claims=CLAIMS.encode(), configuration={"port": 8000, "b": "é"}
)


def test_claims_are_read_as_they_were_written() -> None:
    for claims in (CLAIMS, dataclasses.replace(CLAIMS, nonce=b"", field=None, privacy="tee")):
        assert Claims.decode(claims.encode()) == claims


def test_claims_have_the_interoperable_outer_form() -> None:
    outer = cbor2.loads(CLAIMS.encode())
    assert set(outer) == {"pubkey-hash", "nonce", "tsqp"}
    assert cbor2.loads(outer["pubkey-hash"]) == [1, b"k" * 32]
    assert report_data(CLAIMS.encode()) == hashlib.sha256(CLAIMS.encode()).digest() + bytes(32)


def test_the_privacy_modes_of_claims_are_those_of_the_options() -> None:
    from tsqp.runtime import options

    assert set(PRIVACY_MODES) == set(options.PRIVACY_MODES)


@pytest.mark.parametrize(
    "change",
    [
        {"public_key": b"k" * 31},
        {"public_key": "k" * 32},
        {"nonce": b"n" * 15},
        {"nonce": b"n" * 65},
        {"nonce": "n" * 32},
        {"model_digest": "0a" * 32},
        {"model_digest": "sha256:" + "0A" * 32},
        {"model_digest": "sha256:" + "0a" * 32 + "\n"},
        {"privacy": "none"},
        {"privacy": ["pad"]},
        {"field": "narrow"},
        {"version": ""},
        {"version": "1.0 beta"},
        {"version": "v" * 129},
        {"configuration": b""},
    ],
)
def test_malformed_claims_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(AttestationError):
        dataclasses.replace(CLAIMS, **change)


def test_claims_with_an_unknown_or_missing_entry_are_refused() -> None:
    outer = cbor2.loads(CLAIMS.encode())
    inner = outer["tsqp"]
    for wrong in (
        outer | {"more": 1},
        {name: value for name, value in outer.items() if name != "nonce"},
        outer | {"tsqp": inner | {"more": 1}},
        outer | {"tsqp": {n: v for n, v in inner.items() if n != "field"}},
        outer | {"tsqp": []},
        outer | {"pubkey-hash": b"k" * 32},
        outer | {"pubkey-hash": cbor2.dumps([7, b"k" * 32])},
        outer | {"pubkey-hash": cbor2.dumps([True, b"k" * 32])},
        outer | {"pubkey-hash": cbor2.dumps([1, b"k" * 31])},
        [outer],
    ):
        with pytest.raises(AttestationError):
            Claims.decode(cbor2.dumps(wrong, canonical=True))


def test_claims_in_another_form_than_the_canonical_are_refused() -> None:
    encoded = CLAIMS.encode()
    swapped = cbor2.dumps(dict(reversed(list(cbor2.loads(encoded).items()))))
    for wrong in (encoded + b"\0", encoded[:-1], b"", swapped, b"\x01" * 5000):
        with pytest.raises(AttestationError):
            Claims.decode(wrong)


@pytest.mark.parametrize("tag", [0, 1, 2, 25, 28, 29, 30, 35, 36, 256, 258, 43000, 55799, 2**40])
def test_no_tag_is_decoded(tag: int) -> None:
    for content in (0, "a", b"a", [], [1, 2]):
        with pytest.raises(AttestationError):
            decode_canonical(cbor2.dumps(cbor2.CBORTag(tag, content)), 100, "It")


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_with_our_error(data: bytes) -> None:
    for read in (
        Claims.decode,
        Evidence.from_json,
        lambda data: Evidence.from_extension(b"\xd9\xea\x60" + data, "sgx"),
    ):
        with pytest.raises(AttestationError):
            read(data)


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(AttestationError):
        Claims.decode(b"\x81" * 4000)
    with pytest.raises(AttestationError):
        Evidence.from_json(b"[" * MAX_JSON)


def test_evidence_is_read_as_it_was_written() -> None:
    assert Evidence.from_json(EVIDENCE.to_json()) == EVIDENCE
    certified = Evidence.from_extension(EVIDENCE.to_extension(), "sgx")
    assert (certified.quote, certified.claims) == (EVIDENCE.quote, EVIDENCE.claims)


def test_the_extension_is_tag_60000_with_quote_and_claims() -> None:
    tag = cbor2.loads(EVIDENCE.to_extension())
    assert (tag.tag, list(tag.value)) == (60000, [EVIDENCE.quote, EVIDENCE.claims])


@pytest.mark.parametrize(
    "change",
    [
        {"platform": "nitro"},
        {"platform": 1},
        {"platform": ["sgx"]},
        {"quote": "not base64!"},
        {"quote": 5},
        {"quote": "QUJD" * 6000},
        {"claims": "QUJD" * 2000},
        {"configuration": []},
        {"more": 1},
    ],
)
def test_malformed_evidence_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(AttestationError):
        Evidence.from_json(json.dumps(json.loads(EVIDENCE.to_json()) | change).encode())


def test_evidence_that_is_too_long_is_refused_before_it_is_read() -> None:
    with pytest.raises(AttestationError, match="more than 65,536 bytes"):
        Evidence.from_json(b" " * 10_000_000)


def test_a_name_that_occurs_twice_is_refused() -> None:
    body = EVIDENCE.to_json().replace(b'"b":', b'"port":1,"b":')
    with pytest.raises(AttestationError):
        Evidence.from_json(body)


def test_a_configuration_has_one_digest_whatever_the_order_of_its_settings() -> None:
    assert configuration_digest({"b": 1, "a": "é"}) == configuration_digest({"a": "é", "b": 1})
    expected = hashlib.sha256('{"a":"é","b":1}'.encode()).digest()
    assert configuration_digest({"b": 1, "a": "é"}) == expected
    for wrong in ({"a": float("nan")}, {"a": "\ud800"}):
        with pytest.raises(AttestationError):
            configuration_digest(wrong)
