"""`tsqp verify`, as a user runs it."""

import json
from pathlib import Path

import pytest
from attested_stub import AttestedStub, make_evidence, policy_file
from protocol_helpers import Commands
from samples import amd_files, folder

TIME = "2025-07-04T00:00:00Z"


def quote(name: str) -> tuple[object, ...]:
    collateral = folder() / f"{name}_collateral.json"
    return "verify", "--quote", folder() / name, "--collateral", collateral, "--at", TIME


@pytest.mark.parametrize("name", ["sgx_quote", "tdx_quote"])
def test_quotes_are_verified_at_a_stated_time(commands: Commands, name: str) -> None:
    result = commands.run(*quote(name))
    assert result.status == 0
    assert result.stdout.splitlines()[-1] == f"Accepted at {TIME}."
    assert "No --policy was given" in result.stderr


def test_json_is_the_last_line_of_standard_output(commands: Commands) -> None:
    result = commands.run(*quote("tdx_quote"), "--json")
    assert result.json["accepted"] is True
    assert "mr_td" in {check["name"] for check in result.json["checks"]}
    assert "Accepted" in result.stderr


def test_what_is_not_valid_now_is_refused(commands: Commands) -> None:
    assert commands.run(*quote("tdx_quote_outdated")).status == 1
    assert commands.run(*quote("sgx_quote")[:-2]).status == 1
    result = commands.run(*quote("sgx_quote")[:-2], "--at", "1999-01-01", "--json")
    assert (result.status, result.json["accepted"]) == (1, False)


def test_reports_of_amd_are_verified(commands: Commands) -> None:
    given = [each for path in amd_files() for each in ("--collateral", path)]
    report = ("verify", "--at", TIME, *given, "--quote")
    assert commands.run(*report, folder() / "snp_report_milan.hex").status == 0
    result = commands.run(*report, folder() / "snp_report_debug.bin")
    assert result.status == 1
    assert "FAIL  debug" in result.stdout


def test_collateral_may_be_a_folder_that_the_policy_names(
    commands: Commands, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    for name in ("sgx", "tdx"):
        found = folder() / f"{name}_quote_collateral.json"
        (cache / found.name).symlink_to(found)
    policy = policy_file(
        tmp_path,
        'platforms = ["sgx", "tdx"]\nany_measurement = true\ncollateral = ["cache"]\n',
    )
    arguments = ("verify", "--policy", policy, "--at", TIME, "--quote")
    assert commands.run(*arguments, folder() / "tdx_quote").status == 0
    refused = commands.run(*arguments, folder() / "sgx_quote")
    assert refused.status == 1
    assert "ConfigurationAndSWHardeningNeeded; accepted are UpToDate" in refused.stdout


def test_files_that_are_no_evidence_are_errors(commands: Commands, tmp_path: Path) -> None:
    file = tmp_path / "file"
    for content, says in (
        (b"\xff" * 10_000_000, "has more than 65,536 bytes"),
        ((folder() / "sgx_quote").read_bytes()[:500], "is not a quote of SGX or TDX"),
        (b"", "is not a quote of SGX or TDX"),
        (b"{}", "must be an object with platform"),
    ):
        file.write_bytes(content)
        assert says in commands.fails("verify", "--quote", file)
    (tmp_path / "bad.json").write_text("{}")
    told = commands.fails("verify", "--quote", folder() / "sgx_quote", "--collateral", tmp_path)
    assert "is not collateral" in told


def test_a_server_is_verified_and_its_evidence_kept(commands: Commands, tmp_path: Path) -> None:
    policy, kept = policy_file(tmp_path), tmp_path / "evidence.json"
    with AttestedStub() as stub:
        found = commands.run("verify", stub.url, "--policy", policy, "--save", kept, "--json")
        assert found.status == 0
        assert found.json["note"] == "simulated: proves nothing"
        assert json.loads(kept.read_bytes())["platform"] == "simulated"
        again = commands.run("verify", "--quote", kept, "--policy", policy)
        assert (again.status, "simulated: proves nothing" in again.stdout) == (0, True)
        assert commands.run("verify", "--quote", kept).status == 1  # by default
        stub.answer = lambda key, nonce: make_evidence(key, nonce, privacy="open").to_json()
        refused = commands.run("verify", stub.url, "--policy", policy)
        assert refused.status == 1
        assert "FAIL  privacy" in refused.stdout


def test_wrong_usage_is_said_in_a_sentence(commands: Commands, tmp_path: Path) -> None:
    file = tmp_path / "file"
    for arguments, says in (
        ((), "Give the URL of a server or the file of a --quote"),
        (("https://host", "--quote", file), "and not both"),
        (("https://host",), "give --policy FILE"),
        (("https://host", "--at", TIME), "--at needs --quote"),
        (("http://host", "--policy", policy_file(tmp_path)), "Plain HTTP is refused"),
        (("--quote", file, "--save", file), "--save needs a URL"),
        (("--quote", file, "--at", "yesterday"), "--at must be a time"),
    ):
        result = commands.run("verify", *arguments)
        assert (result.status, result.stdout) == (2, "")
        assert says in result.stderr
