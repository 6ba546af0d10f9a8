"""Policies are read strictly: nothing in one is ignored, and nothing important may be missing."""

from pathlib import Path

import pytest

from tsqp.client.policy import read_policy
from tsqp.errors import AttestationError

HASH, LONG = "ab" * 32, "ab" * 48
FULL = f"""
platforms = ["sgx", "tdx", "sev-snp"]
model_digest = ["sha256:{HASH}"]
privacy = ["pad", "shares"]
field = ["wide"]
version = ["0.1.0"]
accepted_statuses = ["UpToDate", "SWHardeningNeeded"]
accepted_advisories = ["INTEL-SA-00615"]
max_collateral_age_days = 30
collateral = ["collateral"]

[sgx]
mr_signer = ["{HASH}"]
product_id = 1
min_svn = 3
min_tcb_evaluation = 17
min_tcb_date = 2024-03-13

[tdx]
mr_td = ["{LONG}"]
rtmr0 = ["{LONG}"]
rtmr1 = ["{LONG}"]
rtmr2 = ["{LONG}"]

[sev-snp]
measurement = ["{LONG}"]
min_tcb = {{ boot_loader = 3, snp = 8, microcode = 115 }}
ark = "ark.pem"

[configuration.options]
threads = 2
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "policy.toml"
    path.write_text(text)
    return path


def test_a_full_policy_is_read(tmp_path: Path) -> None:
    policy = read_policy(write(tmp_path, FULL))
    assert policy.privacy == ("pad", "shares")
    assert policy.sev_snp.min_tcb is not None
    assert policy.sev_snp.min_tcb.microcode == 115
    assert policy.configuration == {"options": {"threads": 2}}


def test_paths_are_relative_to_the_policy(tmp_path: Path) -> None:
    policy = read_policy(write(tmp_path, FULL))
    assert policy.sev_snp.ark == str(tmp_path / "ark.pem")
    assert policy.collateral == (str(tmp_path / "collateral"),)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('platform = ["sgx"]', "There is no such key as platform; there are accepted_advisories"),
        (f'[sgx]\nmrenclave = ["{HASH}"]', "no such key as sgx.mrenclave; there are min_svn"),
        ("[sev-snp]\nmin_tcb = { fmc = 1 }", "no such key as sev-snp.min_tcb.fmc"),
        ("allow_debug = true", "no such key as allow_debug"),
        ("[sev-snp]\nallow_debug = true", "no such key as sev-snp.allow_debug"),
        ('platforms = ["nitro"]', "platforms takes sgx, tdx, sev-snp"),
        ('platforms = ["simulated"]', "platforms takes sgx, tdx, sev-snp"),
        ("platforms = []", "platforms is empty"),
        ('platforms = "sgx"', "platforms: Expected `array`"),
        ('privacy = ["none"]', "privacy takes tee, open, pad, shares"),
        ('field = ["narrow"]', "field takes wide, compact, lattice"),
        ('accepted_statuses = ["Revoked"]', "accepted_statuses takes UpToDate"),
        ('model_digest = ["abc"]', "model_digest must be sha256:"),
        ('[sgx]\nmr_enclave = ["ab"]', "sgx.mr_enclave must have 64 hexadecimal digits"),
        (f'[sgx]\nmr_enclave = ["{HASH.upper()}"]', "the letters in lower case"),
        (f'[sgx]\nmr_signer = ["{HASH}"]', "sgx.mr_signer accepts everything of that signer"),
        ("[sgx]\nmin_svn = 3", "sgx.product_id and sgx.min_svn need sgx.mr_signer"),
        ("[sev-snp]\nmax_vmpl = 4", "sev-snp.max_vmpl must be from 0 to 3"),
        ("max_collateral_age_days = -1", "max_collateral_age_days must be 0 or more"),
        ("any_measurement = 1", "any_measurement: Expected `bool`"),
        ("any_measurement =", "is not valid TOML"),
        ("any_measurement = true\nany_measurement = false", "is not valid TOML"),
    ],
)
def test_a_wrong_policy_is_refused_with_a_sentence(tmp_path: Path, text: str, says: str) -> None:
    given = text if "platforms" in text else 'platforms = ["sgx"]\n' + text
    if "any_measurement" not in text:
        given = "any_measurement = true\n" + given
    with pytest.raises(AttestationError) as caught:
        read_policy(write(tmp_path, given))
    assert says in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("platform", "missing"),
    [
        ("sgx", "mr_enclave"),
        ("tdx", "mr_td, rtmr0, rtmr1, rtmr2"),
        ("sev-snp", "measurement"),
    ],
)
def test_a_policy_without_measurement_must_say_so(
    tmp_path: Path, platform: str, missing: str
) -> None:
    text = f'platforms = ["{platform}"]\n'
    with pytest.raises(AttestationError, match=f"has no {missing} for {platform}"):
        read_policy(write(tmp_path, text))
    assert read_policy(write(tmp_path, text + "any_measurement = true")).any_measurement


@pytest.mark.parametrize("missing", ["mr_td", "rtmr0", "rtmr1", "rtmr2"])
def test_a_policy_for_tdx_needs_every_register_that_measures_code(
    tmp_path: Path, missing: str
) -> None:
    text = FULL.replace(f'{missing} = ["{LONG}"]\n', "")
    with pytest.raises(AttestationError, match=f"has no {missing} for tdx"):
        read_policy(write(tmp_path, text))
    assert read_policy(write(tmp_path, "any_measurement = true\n" + text)).any_measurement


def test_the_simulated_platform_needs_a_measurement_too(tmp_path: Path) -> None:
    text = "platforms = []\nallow_simulated = true\n"
    with pytest.raises(AttestationError, match="has no measurement for sev-snp"):
        read_policy(write(tmp_path, text))
    read_policy(write(tmp_path, text + "any_measurement = true"))


def test_a_policy_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.toml", tmp_path):
        with pytest.raises(AttestationError, match="cannot be read"):
            read_policy(path)
    with pytest.raises(AttestationError, match="has more than"):
        read_policy(write(tmp_path, "#" * 300_000))
    (tmp_path / "policy.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(AttestationError, match="not valid TOML"):
        read_policy(tmp_path / "policy.toml")
