"""What a user demands of a server, read from a TOML file.

A policy that leaves something out does not demand it, and every verdict says so. The exception is
the measurement of the code: a policy without all of it must say `any_measurement = true`. Guests
and enclaves that can be debugged are always refused; no policy can allow them.
"""

import re
import tomllib
from datetime import date
from pathlib import Path
from typing import Any

import msgspec

from tsqp.api.claims import FIELDS, PRIVACY_MODES
from tsqp.api.evidence import PLATFORMS
from tsqp.client.text import printable
from tsqp.errors import AttestationError, printable_path

MAX_POLICY = 256 * 1024  # bytes
# Of SGX and TDX. "Revoked" is not among them: it is always refused.
STATUSES = (
    "UpToDate", "SWHardeningNeeded", "ConfigurationNeeded", "ConfigurationAndSWHardeningNeeded",
    "OutOfDate", "OutOfDateConfigurationNeeded", "TDRelaunchAdvised",
    "TDRelaunchAdvisedConfigurationNeeded",
)  # fmt: skip
# Those in which the platform has all published updates.
CURRENT_STATUSES = STATUSES[:4]

_HEX = re.compile(r"([0-9a-f]{2})+\Z", re.ASCII)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z", re.ASCII)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*?)`( - at `\$\.?(.*)`)?\Z", re.DOTALL)


def _check_hex(name: str, values: tuple[str, ...], length: int) -> None:
    for value in values:
        if not _HEX.match(value) or len(value) != 2 * length:
            raise ValueError(
                f"{name} must have {2 * length} hexadecimal digits, the letters in lower case."
            )


def _check_among(name: str, values: tuple[str, ...], known: tuple[str, ...]) -> None:
    if not set(values) <= set(known):
        raise ValueError(f"{name} takes {', '.join(known)}.")


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the file, whose keys are the attributes' names."""

    @property
    def missing_measurements(self) -> tuple[str, ...]:
        """Keys without which code that the user did not choose would be accepted."""
        return ()


class SgxPolicy(Table, frozen=True):
    """Demands on an SGX enclave.

    Attributes:
        mr_enclave: accepted hashes of the enclave; hexadecimal digits.
        mr_signer: accepted signers of enclaves, with `product_id` and `min_svn`.
        product_id: number of the product that the signer gave.
        min_svn: smallest accepted security version of that product.
        min_tcb_evaluation: smallest number of Intel's TCB evaluation.
        min_tcb_date: the platform's TCB level must be of this day or a later one.
    """

    mr_enclave: tuple[str, ...] = ()
    mr_signer: tuple[str, ...] = ()
    product_id: int | None = None
    min_svn: int | None = None
    min_tcb_evaluation: int | None = None
    min_tcb_date: date | None = None

    def __post_init__(self) -> None:
        _check_hex("sgx.mr_enclave", self.mr_enclave, 32)
        _check_hex("sgx.mr_signer", self.mr_signer, 32)
        if self.mr_signer and (self.product_id is None or self.min_svn is None):
            raise ValueError(
                "sgx.mr_signer accepts everything of that signer: add sgx.product_id and "
                "sgx.min_svn."
            )
        if not self.mr_signer and (self.product_id is not None or self.min_svn is not None):
            raise ValueError("sgx.product_id and sgx.min_svn need sgx.mr_signer.")

    @property
    def missing_measurements(self) -> tuple[str, ...]:
        return () if self.mr_enclave or self.mr_signer else ("mr_enclave",)


class TdxPolicy(Table, frozen=True):
    """Demands on a TDX guest.

    Attributes:
        mr_td, rtmr0 to rtmr3, mr_config_id: accepted values; hexadecimal digits.
        min_tcb_evaluation, min_tcb_date: as for SGX.
        allow_migration: accept guests that may be moved to another machine.
    """

    mr_td: tuple[str, ...] = ()
    rtmr0: tuple[str, ...] = ()
    rtmr1: tuple[str, ...] = ()
    rtmr2: tuple[str, ...] = ()
    rtmr3: tuple[str, ...] = ()
    mr_config_id: tuple[str, ...] = ()
    min_tcb_evaluation: int | None = None
    min_tcb_date: date | None = None
    allow_migration: bool = False

    def __post_init__(self) -> None:
        for name in ("mr_td", "rtmr0", "rtmr1", "rtmr2", "rtmr3", "mr_config_id"):
            _check_hex(f"tdx.{name}", getattr(self, name), 48)

    @property
    def missing_measurements(self) -> tuple[str, ...]:
        # mr_td covers the firmware only. rtmr0 has what the host gives to it, such as ACPI tables,
        # whose code the kernel runs; rtmr1 the kernel; rtmr2 its command line, which has the hash
        # of the root file system, and the initrd.
        return tuple(
            name for name in ("mr_td", "rtmr0", "rtmr1", "rtmr2") if not getattr(self, name)
        )


class MinTcb(Table, frozen=True):
    """Smallest accepted versions of the parts of an AMD platform."""

    boot_loader: int = 0
    tee: int = 0
    snp: int = 0
    microcode: int = 0


class SnpPolicy(Table, frozen=True):
    """Demands on an SEV-SNP guest.

    Attributes:
        measurement: accepted launch measurements; hexadecimal digits.
        host_data: accepted values of the data that the host gave at launch.
        min_guest_svn: smallest accepted security version of the guest.
        min_tcb: smallest accepted versions of the platform.
        max_vmpl: largest privilege level that may have asked for the report; 0 is the most
            privileged.
        allow_migration_agent: accept guests that a migration agent may move.
        require_crl: refuse without AMD's list of revoked certificates.
        ark: PEM or DER file of a root certificate that is trusted instead of the built-in one.
    """

    measurement: tuple[str, ...] = ()
    host_data: tuple[str, ...] = ()
    min_guest_svn: int | None = None
    min_tcb: MinTcb | None = None
    max_vmpl: int = 0
    allow_migration_agent: bool = False
    require_crl: bool = False
    ark: str | None = None

    def __post_init__(self) -> None:
        _check_hex("sev-snp.measurement", self.measurement, 48)
        _check_hex("sev-snp.host_data", self.host_data, 32)
        if not 0 <= self.max_vmpl <= 3:
            raise ValueError("sev-snp.max_vmpl must be from 0 to 3.")

    @property
    def missing_measurements(self) -> tuple[str, ...]:
        return () if self.measurement else ("measurement",)


class Policy(Table, frozen=True, rename={"sev_snp": "sev-snp"}):
    """All demands.

    Attributes:
        platforms: accepted platforms: sgx, tdx, sev-snp.
        any_measurement: accept any code. Without it, each of `platforms` needs its measurements.
        allow_simulated: accept the simulated platform, which proves nothing.
        model_digest, privacy, field, version: accepted values of these claims.
        configuration: settings that the server must have; tables as in its configuration.
        accepted_statuses: of SGX and TDX, how up to date the platform must be.
        accepted_advisories: the only advisories of Intel that may apply.
        max_collateral_age_days: maximum age of what the platform's maker said about platforms.
        collateral: files and folders with it, relative to the policy's own folder.
        sgx, tdx, sev_snp: demands on one platform.
    """

    platforms: tuple[str, ...]
    any_measurement: bool = False
    allow_simulated: bool = False
    model_digest: tuple[str, ...] = ()
    privacy: tuple[str, ...] = ()
    field: tuple[str, ...] = ()
    version: tuple[str, ...] = ()
    configuration: dict[str, Any] = {}
    accepted_statuses: tuple[str, ...] = ("UpToDate",)
    accepted_advisories: tuple[str, ...] | None = None
    max_collateral_age_days: float | None = None
    collateral: tuple[str, ...] = ()
    sgx: SgxPolicy = msgspec.field(default_factory=SgxPolicy)
    tdx: TdxPolicy = msgspec.field(default_factory=TdxPolicy)
    sev_snp: SnpPolicy = msgspec.field(default_factory=SnpPolicy)

    def __post_init__(self) -> None:
        real = tuple(name for name in PLATFORMS if name != "simulated")
        _check_among("platforms", self.platforms, real)
        _check_among("privacy", self.privacy, PRIVACY_MODES)
        _check_among("field", self.field, FIELDS)
        _check_among("accepted_statuses", self.accepted_statuses, STATUSES)
        if not all(_DIGEST.match(digest) for digest in self.model_digest):
            raise ValueError(
                "model_digest must be sha256: and 64 hexadecimal digits, as `tsqp digest` prints "
                "them."
            )
        if not self.platforms and not self.allow_simulated:
            raise ValueError(f"platforms is empty: name some of {', '.join(real)}.")
        if self.max_collateral_age_days is not None and self.max_collateral_age_days < 0:
            raise ValueError("max_collateral_age_days must be 0 or more.")
        tables: dict[str, Table] = {"sgx": self.sgx, "tdx": self.tdx, "sev-snp": self.sev_snp}
        # The simulated platform makes reports of SEV-SNP.
        accepted = {*self.platforms, *(("sev-snp",) if self.allow_simulated else ())}
        for name in () if self.any_measurement else sorted(accepted):
            if missing := tables[name].missing_measurements:
                raise ValueError(
                    f"The policy has no {', '.join(missing)} for {name}, so it would accept code "
                    f"that you did not choose: add to [{name}], or set any_measurement = true."
                )


# For files without a policy. It demands a genuine platform that has all updates, and nothing else.
NO_DEMANDS = Policy(
    platforms=("sgx", "tdx", "sev-snp"), any_measurement=True, accepted_statuses=CURRENT_STATUSES
)


def read_policy(path: Path) -> Policy:
    """Read a policy. Paths in it become relative to the working directory.

    Raises:
        AttestationError: the file cannot be read, is not TOML, has an unknown key or a wrong value,
            or demands no measurement without saying so.
    """
    name = printable_path(path, "The policy")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_POLICY + 1)
    except OSError as exc:
        raise AttestationError(f"{name} cannot be read: {exc.strerror}.") from None
    if len(data) > MAX_POLICY:
        raise AttestationError(f"{name} has more than {MAX_POLICY:,} bytes.")
    try:
        policy = msgspec.convert(tomllib.loads(data.decode()), Policy)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise AttestationError(f"{name} is not valid TOML: {printable(str(exc))}.") from None
    except msgspec.ValidationError as exc:
        raise AttestationError(f"{name}: {_sentence(str(exc))}") from None
    snp, folder = policy.sev_snp, path.parent
    if snp.ark is not None:
        snp = msgspec.structs.replace(snp, ark=str(folder / snp.ark))
    collateral = tuple(str(folder / each) for each in policy.collateral)
    return msgspec.structs.replace(policy, sev_snp=snp, collateral=collateral)


_TABLES: dict[str, type[Table]] = {
    "sgx": SgxPolicy,
    "tdx": TdxPolicy,
    "sev-snp": SnpPolicy,
    "sev-snp.min_tcb": MinTcb,
}


def _sentence(message: str) -> str:
    if (unknown := _UNKNOWN.match(message)) is not None:
        place = unknown[3] or ""
        key = printable(f"{place}.{unknown[1]}" if place else unknown[1])
        kind = _TABLES.get(place, Policy)
        known = ", ".join(sorted(kind.__struct_encode_fields__))
        return f"There is no such key as {key}; there are {known}."
    message, _, place = message.partition(" - at `$")
    text = printable(message).rstrip(".")
    place = printable(place.rstrip("`").lstrip("."))
    return f"{place}: {text}." if place and not text.startswith(place) else f"{text}."
