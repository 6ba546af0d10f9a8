"""Linux's configfs-tsm, as a fake kernel has it."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_platforms import TABLE, FakeTsm, fake_snp_report, fake_tdx_quote

from tsqp.errors import AttestationError
from tsqp.tee.attest.attributes import AttributeFiles
from tsqp.tee.attest.configfs import ATTEMPTS, PASSING, ConfigfsTsm

ROOT = Path("/fake/tsm/report")
DATA = bytes(range(64))
STEPS = [
    ("make", ""),
    ("read", "provider"),
    ("read", "generation"),
    ("write", "inblob"),
    ("read", "outblob"),
    ("read", "auxblob"),
]
NUMBERS = [
    errno.ENODEV, errno.EBUSY, errno.EINTR, errno.EWOULDBLOCK, errno.EINVAL, errno.ENXIO,
    errno.EACCES, errno.EPERM, errno.ETIMEDOUT, errno.EIO, errno.ENOMEM, errno.EEXIST,
    errno.ENOENT,
]  # fmt: skip


def refusal(fake: FakeTsm) -> str:
    """The sentence of a quote that fails; nothing may be left of it."""
    with pytest.raises(AttestationError) as caught:
        ConfigfsTsm(ROOT, fake).quote(DATA)
    assert fake.entries == {}
    sentence = str(caught.value)
    assert re.fullmatch(r"[A-Z][^\n]*[a-z0-9)]\.", sentence), sentence
    assert not re.search(r"[a-z]\. [A-Z]", sentence), sentence
    return sentence


@pytest.mark.parametrize(
    ("provider", "platform", "certificates"),
    [(b"sev_guest\n", "sev-snp", TABLE), (b"tdx_guest\n", "tdx", b"")],
)
def test_a_quote_holds_the_report_data(provider: bytes, platform: str, certificates: bytes) -> None:
    fake = FakeTsm(provider)
    quote = ConfigfsTsm(ROOT, fake).quote(DATA)
    assert (quote.platform, quote.certificates) == (platform, certificates)
    assert quote.quote == (fake_tdx_quote if platform == "tdx" else fake_snp_report)(DATA)
    assert fake.entries == {}


def test_the_report_data_is_written_once_as_64_bytes() -> None:
    fake = FakeTsm()
    ConfigfsTsm(ROOT, fake).quote(DATA)
    assert fake.written == [DATA]


def test_padding_after_a_tdx_quote_is_cut_off() -> None:
    fake = FakeTsm(b"tdx_guest\n")
    fake.make_blob = lambda data: fake_tdx_quote(data) + bytes(1000)
    assert ConfigfsTsm(ROOT, fake).quote(DATA).quote == fake_tdx_quote(DATA)


@pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.get)
@pytest.mark.parametrize("step", STEPS, ids=" ".join)
def test_every_error_at_every_step_is_one_sentence_and_leaves_no_folder(
    step: tuple[str, str], number: int
) -> None:
    fake = FakeTsm()
    fake.fail(*step, number)
    if (step, number) == (("read", "auxblob"), errno.ENOENT):  # as on TDX: there is none
        assert ConfigfsTsm(ROOT, fake).quote(DATA).certificates == b""
        return
    refusal(fake)
    tries = ATTEMPTS if number in PASSING else 1
    assert fake.done.count(("make", "")) == tries
    assert fake.done.count(("remove", "")) == (0 if step[0] == "make" else tries)


@pytest.mark.parametrize("number", PASSING, ids=errno.errorcode.get)
@pytest.mark.parametrize("step", STEPS, ids=" ".join)
def test_an_error_of_a_moment_is_tried_again_in_another_folder(
    step: tuple[str, str], number: int
) -> None:
    fake = FakeTsm()
    fake.fail(*step, number, times=ATTEMPTS - 1)
    assert ConfigfsTsm(ROOT, fake).quote(DATA).quote == fake_snp_report(DATA)
    assert fake.entries == {}


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.EACCES, "run as root"),
        (errno.ENXIO, "load tdx_guest or sev-guest"),
        (errno.ENODEV, "load tdx_guest or sev-guest"),
        (errno.EBUSY, "busy"),
    ],
)
def test_an_error_says_what_to_do(number: int, reason: str) -> None:
    fake = FakeTsm()
    fake.fail("make", "", number)
    assert reason in refusal(fake)


def test_a_blob_is_discarded_if_somebody_else_wrote_meanwhile() -> None:
    fake, blobs = FakeTsm(), []

    def disturb_once(folder: Path) -> None:
        if not blobs:
            fake.ask(folder, DATA)  # the same question, so that only the generation shows it
        blobs.append(folder)

    fake.meanwhile = disturb_once
    assert ConfigfsTsm(ROOT, fake).quote(DATA).quote == fake_snp_report(DATA)
    assert len(set(blobs)) == 2
    assert fake.entries == {}


def test_endless_disturbance_ends_in_an_error() -> None:
    fake = FakeTsm()
    fake.meanwhile = lambda folder: fake.ask(folder, DATA)
    assert "other processes changed the report" in refusal(fake)
    assert len(fake.written) == ATTEMPTS


def test_a_write_that_was_lost_is_noticed() -> None:
    fake = FakeTsm()

    def lose(folder: Path) -> None:
        fake.entries[folder] = (0, DATA)

    fake.meanwhile = lose
    refusal(fake)


def test_a_quote_over_other_report_data_is_refused() -> None:
    fake = FakeTsm()
    fake.make_blob = lambda data: fake_snp_report(data[:-1] + b"\0")
    assert "does not hold the report data" in refusal(fake)


@pytest.mark.parametrize("provider", [b"arm_cca_guest\n", b"", b"\xff" * 100, b"sev_guest2"])
def test_an_unknown_platform_is_refused(provider: bytes) -> None:
    assert "not supported" in refusal(FakeTsm(provider))


@pytest.mark.parametrize(
    "blob", [b"", bytes(1183), bytes(1184) + b"x", b"\1" * 1184 + b"\0\1", bytes(2**20)]
)
def test_a_blob_of_a_wrong_length_is_refused(blob: bytes) -> None:
    fake = FakeTsm()
    fake.make_blob = lambda data: blob
    refusal(fake)


def test_a_folder_that_cannot_be_removed_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeTsm()
    fake.fail("remove", "", errno.EBUSY)
    assert ConfigfsTsm(ROOT, fake).quote(DATA).quote == fake_snp_report(DATA)
    assert "cannot remove" in caplog.text


def test_two_processes_at_once_get_their_own_quotes(tmp_path: Path) -> None:
    code = """if True:
        import sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        from fake_platforms import FakeTsmOnDisk, fake_snp_report
        from tsqp.tee.attest.configfs import ConfigfsTsm
        provider = ConfigfsTsm(Path(sys.argv[2]), FakeTsmOnDisk())
        data = sys.argv[3].encode() * 64
        found = {provider.quote(data).quote for _ in range(100)}
        assert found == {fake_snp_report(data)}
        """
    arguments = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)]
    processes = [subprocess.Popen([*arguments, each]) for each in "ab"]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert list(tmp_path.iterdir()) == []


def test_an_attribute_is_written_by_one_call_and_never_created(tmp_path: Path) -> None:
    files = AttributeFiles()
    with pytest.raises(FileNotFoundError):
        files.write(tmp_path / "absent", DATA)
    reader, writer = os.pipe()
    files.write(Path(f"/proc/self/fd/{writer}"), DATA)
    assert os.read(reader, 1000) == DATA
    os.close(reader)
    os.close(writer)


def test_a_long_attribute_is_not_read_to_its_end() -> None:
    assert 101 <= len(AttributeFiles().read(Path("/dev/zero"), 100)) <= 202
