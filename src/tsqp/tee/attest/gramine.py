"""Evidence of an SGX enclave: Gramine's /dev/attestation."""

import threading
from pathlib import Path

from tsqp.errors import AttestationError
from tsqp.tee.attest.attributes import AttributeFiles
from tsqp.tee.attest.layout import cut_quote
from tsqp.tee.attest.provider import REPORT_DATA_BYTES, Quote

DEVICE = Path("/dev/attestation")
MAX_QUOTE = 16 * 2**10  # as for `Evidence`
MAX_TEXT = 64
ATTEMPTS = 5
_LOCK = threading.Lock()  # Gramine has one `user_report_data` for the whole process


class Gramine:
    """Quotes of the enclave that this process is.

    Args:
        device: Gramine's folder of attributes.
    """

    platform = "sgx"

    def __init__(self, device: Path = DEVICE, files: AttributeFiles | None = None) -> None:
        self._device = device
        self._files = files or AttributeFiles()

    def quote(self, report_data: bytes) -> Quote:
        """See `Provider.quote`."""
        assert len(report_data) == REPORT_DATA_BYTES
        try:
            with _LOCK:
                return self._quote(report_data)
        except OSError as error:
            raise AttestationError(
                f"Gramine gave no quote at {self._device} ({error.strerror}): check that the "
                "quoting service of the platform (AESM, QCNL) runs."
            ) from None

    def _quote(self, report_data: bytes) -> Quote:
        kind = self._files.read(self._device / "attestation_type", MAX_TEXT)[:MAX_TEXT].strip()
        if kind != b"dcap":
            raise AttestationError(
                'Gramine runs without DCAP attestation: set sgx.remote_attestation = "dcap" in '
                "the manifest, and run with gramine-sgx."
            )
        for _ in range(ATTEMPTS):
            self._files.write(self._device / "user_report_data", report_data)
            found = self._files.read(self._device / "quote", MAX_QUOTE)
            quote, held = cut_quote(self.platform, found)
            # Code that does not know our lock may have written other report data meanwhile.
            if held == report_data:
                return Quote(self.platform, quote)
        raise AttestationError(
            "Gramine's quotes do not hold the report data asked for; other code of this process "
            f"writes to {self._device}."
        )
