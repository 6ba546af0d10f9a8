"""Evidence of a confidential virtual machine: Linux's configfs-tsm, for TDX and SEV-SNP alike.

A report is a folder in configfs: 64 bytes are written to `inblob`, and `outblob` then gives the
quote over them (Linux 6.7 and newer, Documentation/ABI/testing/configfs-tsm-report).
"""

import errno
import logging
import secrets
import time
from pathlib import Path

from tsqp.errors import AttestationError
from tsqp.tee.attest.attributes import AttributeFiles
from tsqp.tee.attest.layout import cut_quote
from tsqp.tee.attest.provider import REPORT_DATA_BYTES, Quote

log = logging.getLogger("tsqp")

REPORTS = Path("/sys/kernel/config/tsm/report")
PLATFORMS = {"tdx_guest": "tdx", "sev_guest": "sev-snp"}
MAX_BLOB = 16 * 2**10  # as for `Evidence`
MAX_TEXT = 64
ATTEMPTS = 5
PAUSE_S = 0.05
# Errors of a moment: another process asks at the same time, or a signal came.
PASSING = (errno.EAGAIN, errno.EBUSY, errno.EEXIST, errno.EINTR)
_REASONS = {
    errno.EACCES: "this user may not: run as root, or give the user that folder",
    errno.EPERM: "this user may not: run as root, or give the user that folder",
    errno.ENODEV: "no module for this platform is loaded: load tdx_guest or sev-guest",
    errno.ENXIO: "no module for this platform is loaded: load tdx_guest or sev-guest",
    errno.ENOENT: "an attribute is missing: use Linux 6.7 or newer with tdx_guest or sev-guest",
    errno.EINVAL: "the kernel refused the report data",
    errno.EBUSY: "other processes kept it busy",
    errno.EAGAIN: "other processes changed the report meanwhile",
    errno.EEXIST: "its names were taken",
    errno.EINTR: "signals kept interrupting it",
    errno.ETIMEDOUT: "the host did not answer in time",
}


class ConfigfsTsm:
    """Quotes of the virtual machine that this process runs in.

    Args:
        reports: the folder in which reports are made.
    """

    platform = "tdx or sev-snp"

    def __init__(self, reports: Path = REPORTS, files: AttributeFiles | None = None) -> None:
        self._reports = reports
        self._files = files or AttributeFiles()

    def quote(self, report_data: bytes) -> Quote:
        """See `Provider.quote`."""
        assert len(report_data) == REPORT_DATA_BYTES
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(PAUSE_S)
            try:
                found = self._try(report_data)
            except OSError as error:
                if error.errno not in PASSING:
                    raise self._failed(error.errno) from None
                reason = error.errno
                continue
            if found is not None:
                return found
            reason = errno.EAGAIN
        raise self._failed(reason)

    def _try(self, report_data: bytes) -> Quote | None:
        """One report in a folder of its own; None if somebody else wrote to it."""
        report = self._reports / f"tsqp-{secrets.token_hex(8)}"
        self._files.make(report)
        try:
            return self._ask(report, report_data)
        finally:
            try:
                self._files.remove(report)
            except OSError as error:
                log.warning("cannot remove %s (%s)", report, error.strerror)

    def _ask(self, report: Path, report_data: bytes) -> Quote | None:
        name = self._text(report / "provider")
        if name not in PLATFORMS:
            raise AttestationError(
                f"The kernel's provider of reports is not one of {' and '.join(PLATFORMS)}: this "
                "platform is not supported."
            )
        platform = PLATFORMS[name]
        before = self._generation(report)
        self._files.write(report / "inblob", report_data)
        outblob = self._blob(report / "outblob")
        try:
            auxblob = self._blob(report / "auxblob")
        except FileNotFoundError:  # TDX has none
            auxblob = b""
        # Each write to the folder counts one. After any but ours, the blobs may be of another
        # question, or of two different ones.
        if self._generation(report) != before + 1:
            return None
        quote, held = cut_quote(platform, outblob)
        if held != report_data:
            raise AttestationError("The kernel's quote does not hold the report data asked for.")
        return Quote(platform, quote, auxblob)

    def _blob(self, path: Path) -> bytes:
        found = self._files.read(path, MAX_BLOB)
        if len(found) > MAX_BLOB:
            raise AttestationError(f"The kernel's {path.name} has more than {MAX_BLOB} bytes.")
        return found

    def _text(self, path: Path) -> str:
        return self._files.read(path, MAX_TEXT)[:MAX_TEXT].decode("ascii", "replace").strip()

    def _generation(self, report: Path) -> int:
        text = self._text(report / "generation")
        if not text.isdecimal():
            raise AttestationError("The kernel's generation of a report is not a number.")
        return int(text)

    def _failed(self, number: int | None) -> AttestationError:
        reason = _REASONS.get(number or 0, f"error {number}")
        return AttestationError(f"The kernel gave no report in {self._reports}; {reason}.")
