"""Collateral: what makers of platforms publish about them, read from files and folders.

For SGX and TDX it is Intel's, as JSON that dcap-qvl writes. For SEV-SNP it is certificates and
lists of revoked ones, in PEM or DER. Nothing is fetched from the network.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from tsqp.client.x509_files import Material
from tsqp.errors import AttestationError, printable_path

MAX_FILE = 2**20  # bytes
MAX_FILES = 1000
_SUFFIXES = (".json", ".pem", ".der", ".crt", ".cer", ".crl")


@dataclass(frozen=True, slots=True)
class IntelCollateral:
    """One file of Intel's collateral. Its fields are not verified yet.

    Attributes:
        text: the file.
        platform: sgx or tdx.
        fmspc: the kind of processor, 12 hexadecimal digits.
        issued: when the oldest of the TCB information, the identity of the quoting enclave, and the
            list of revoked processor keys was issued. The root's list is made once a year.
    """

    text: str
    platform: str
    fmspc: str
    issued: datetime

    @classmethod
    def parse(cls, text: str) -> "IntelCollateral":
        """Read a file. Raises ValueError, KeyError or TypeError if it is something else."""
        outer = json.loads(text)
        tcb_info = json.loads(outer["tcb_info"])
        qe_identity = json.loads(outer["qe_identity"])
        revoked = x509.load_der_x509_crl(bytes.fromhex(outer["pck_crl"]))
        dates = _time(tcb_info["issueDate"]), _time(qe_identity["issueDate"])
        issued = min(*dates, revoked.last_update_utc)
        platform = {"SGX": "sgx", "TDX": "tdx"}[tcb_info["id"]]
        return cls(text, platform, str(tcb_info["fmspc"]).upper(), issued)


@dataclass(frozen=True, slots=True)
class Collateral:
    """All collateral that was given."""

    intel: list[IntelCollateral] = field(default_factory=list)
    amd: Material = field(default_factory=Material)

    def for_quote(self, platform: str, fmspc: str) -> IntelCollateral:
        """The newest collateral for a kind of processor.

        Raises:
            AttestationError: there is none.
        """
        fitting = [e for e in self.intel if (e.platform, e.fmspc) == (platform, fmspc.upper())]
        if not fitting:
            raise AttestationError(
                f"there is no collateral for {platform} on processors {fmspc}: fetch it with "
                "`tsqp collateral`, and give it with --collateral"
            )
        return max(fitting, key=lambda each: each.issued)


def read_collateral(paths: Iterable[Path]) -> Collateral:
    """Read files, and all files of folders that have the ending of collateral.

    Raises:
        AttestationError: a file cannot be read, is longer than 1 MiB or is not collateral.
    """
    collateral = Collateral()
    for path in _files(paths):
        data = read_limited(path, MAX_FILE)
        name = printable_path(path)
        if not data.lstrip().startswith(b"{"):
            collateral.amd.add(data, name)
            continue
        try:
            collateral.intel.append(IntelCollateral.parse(data.decode()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise AttestationError(f"{name} is not collateral as dcap-qvl writes it.") from None
    return collateral


def read_limited(path: Path, limit: int) -> bytes:
    """A file of at most `limit` bytes.

    Raises:
        AttestationError: it cannot be read, or is longer.
    """
    name = printable_path(path)
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as exc:
        raise AttestationError(f"{name} cannot be read: {exc.strerror}.") from None
    if len(data) > limit:
        raise AttestationError(f"{name} has more than {limit:,} bytes.")
    return data


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        found = sorted(each for each in path.iterdir() if each.suffix in _SUFFIXES)
        if len(found) > MAX_FILES:
            raise AttestationError(f"{printable_path(path)} has more than {MAX_FILES:,} files.")
        yield from found


def _time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)
