"""The choice of a platform, the layout of quotes, and the simulated platform."""

from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from fake_platforms import fake_intel_quote

from tsqp.api.simulated_root import SIMULATED_ARK
from tsqp.errors import AttestationError
from tsqp.tee.attest.choose import choose_provider
from tsqp.tee.attest.configfs import ConfigfsTsm
from tsqp.tee.attest.gramine import Gramine
from tsqp.tee.attest.layout import cut_quote
from tsqp.tee.attest.simulated import WARNING, Simulated

DATA = bytes(range(64))


def sample(name: str) -> bytes:
    """A real quote, from the folder of shared data beside the checkout."""
    for parent in Path(__file__).resolve().parents:
        file = parent / "shared" / "data" / "attestation" / name
        if file.exists():
            return file.read_bytes()
    pytest.skip("the samples of quotes are not on this machine")


def test_without_a_platform_the_error_says_what_was_looked_for(tmp_path: Path) -> None:
    device, reports = tmp_path / "attestation", tmp_path / "report"
    with pytest.raises(AttestationError) as caught:
        choose_provider("auto", device=device, reports=reports)
    for part in (str(device), str(reports), "--attest simulated"):
        assert part in str(caught.value)


def test_the_platform_is_the_one_that_is_there(tmp_path: Path) -> None:
    device, reports = tmp_path / "attestation", tmp_path / "report"
    places = {"device": device, "reports": reports, "swaps": tmp_path / "swaps"}
    reports.mkdir()
    assert isinstance(choose_provider("auto", **places), ConfigfsTsm)
    device.mkdir()
    assert isinstance(choose_provider("auto", **places), Gramine)


def test_a_virtual_machine_that_swaps_to_a_disk_is_refused(tmp_path: Path) -> None:
    swaps, reports = tmp_path / "swaps", tmp_path / "report"
    reports.mkdir()
    head = "Filename\tType\tSize\tUsed\tPriority\n"
    for lines, is_refused in (
        ("", False),
        ("/dev/zram0 partition 1024 0 -2\n", False),
        ("/dev/zram0 partition 1024 0 -2\n/dev/vda3 partition 1024 0 -3\n", True),
        ("/swapfile file 1024 0 -2\n", True),
    ):
        swaps.write_text(head + lines)
        arguments = {"device": tmp_path / "none", "reports": reports, "swaps": swaps}
        if is_refused:
            with pytest.raises(AttestationError, match="swaps to a disk"):
                choose_provider("auto", **arguments)
        else:
            assert isinstance(choose_provider("auto", **arguments), ConfigfsTsm)
        assert isinstance(choose_provider("simulated", **arguments), Simulated)


def test_no_environment_variable_moves_the_platform(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(choose_provider.__code__.co_filename).parent
    for file in source.glob("*.py"):
        assert "environ" not in file.read_text(), file
        assert "getenv" not in file.read_text(), file


@pytest.mark.parametrize(
    ("name", "platform", "begin"),
    [
        ("sgx_quote", "sgx", b"Hello, world!"),
        ("tdx_quote", "tdx", bytes.fromhex("9a9d48e7")),
        ("tdx_quote_outdated", "tdx", b""),
    ],
)
def test_report_data_of_real_quotes_is_found(name: str, platform: str, begin: bytes) -> None:
    quote = sample(name)
    cut, data = cut_quote(platform, quote + bytes(100))
    assert cut == quote[: len(cut)]
    assert not quote[len(cut) :].strip(b"\0")
    assert data.startswith(begin)
    assert len(data) == 64


def test_report_data_of_a_real_snp_report_is_found() -> None:
    report = bytes.fromhex(sample("snp_report_milan.hex").decode())
    assert cut_quote("sev-snp", report) == (report, report[0x50:0x90])


@pytest.mark.parametrize(("version", "tee"), [(3, 0), (4, 0), (4, 0x81), (5, 0), (5, 0x81)])
def test_report_data_is_found_in_every_version(version: int, tee: int) -> None:
    platform = "tdx" if tee else "sgx"
    quote = fake_intel_quote(DATA, version, tee)
    assert cut_quote(platform, quote + bytes(9)) == (quote, DATA)
    with pytest.raises(AttestationError):
        cut_quote("sgx" if tee else "tdx", quote)
    for length in range(len(quote)):
        with pytest.raises(AttestationError):
            cut_quote(platform, quote[:length])


def test_a_simulated_report_has_the_form_of_a_real_one_and_its_chain_signs_it() -> None:
    found = Simulated().quote(DATA)
    assert found.platform == "simulated"
    assert cut_quote("sev-snp", found.quote) == (found.quote, DATA)
    table = [found.certificates[at : at + 24] for at in range(0, 96, 24)]
    assert table[3] == bytes(24)
    parts = [
        found.certificates[begin : begin + length]
        for entry in table[:3]
        for begin, length in [
            (int.from_bytes(entry[16:20], "little"), int.from_bytes(entry[20:], "little"))
        ]
    ]
    ark, ask, vcek = (x509.load_der_x509_certificate(part) for part in parts)
    for issuer, certificate in ((ark, ark), (ark, ask), (ask, vcek)):
        certificate.verify_directly_issued_by(issuer)
        assert WARNING in certificate.subject.rfc4514_string().replace("\\", "")
    assert ark.fingerprint(hashes.SHA256()).hex() == SIMULATED_ARK
    r, s = (int.from_bytes(found.quote[at : at + 72], "little") for at in (0x2A0, 0x2A0 + 72))
    key = vcek.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    key.verify(encode_dss_signature(r, s), found.quote[:0x2A0], ec.ECDSA(hashes.SHA384()))
    levels = {each.oid.dotted_string: each.value.value for each in vcek.extensions}
    assert levels["1.3.6.1.4.1.3704.1.4"] == found.quote[0x1A0:0x1E0]
    for number, place in ((1, 0), (2, 1), (3, 6), (8, 7)):  # of each level in the TCB
        level = levels[f"1.3.6.1.4.1.3704.1.3.{number}"]
        assert level == bytes([2, 1, found.quote[0x180 + place]])
