"""The systemd units are valid, run commands that exist, and keep what hardens them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import typer.main

from tsqp.cli import app

DEPLOY = Path(__file__).parents[2] / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
REQUIRED = {
    "NoNewPrivileges": "yes",
    "PrivateTmp": "yes",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "ProtectProc": "invisible",
    "ProtectKernelModules": "yes",
    "ProtectKernelLogs": "yes",
    "RestrictNamespaces": "yes",
    "RestrictSUIDSGID": "yes",
    "LockPersonality": "yes",
    "SystemCallArchitectures": "native",
    "SystemCallFilter": "@system-service",
    "User": "tsqp",
    "UMask": "0077",
    "LimitCORE": "0",
}
MOST_EXPOSED = 25  # as `systemd-analyze security` rates a unit, in tenths: at most 100

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)
each_unit = pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)


def settings(unit: Path) -> dict[str, list[str]]:
    """The values of each setting, in order."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        name, separator, value = line.partition("=")
        if separator and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def runnable(unit: Path, folder: Path) -> Path:
    """A copy whose programs are there."""
    copy = folder / unit.name
    text = re.sub(r"^ExecStart=\S+", r"ExecStart=/bin/true", unit.read_text(), flags=re.M)
    copy.write_text(text)
    return copy


def analyze(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["systemd-analyze", *map(str, arguments)], capture_output=True, text=True, timeout=60
    )


def test_there_are_units() -> None:
    assert [unit.stem for unit in UNITS] == ["tsqp-serve", "tsqp-worker"]


@needs_systemd
@each_unit
def test_systemd_finds_nothing_wrong(unit: Path, tmp_path: Path) -> None:
    done = analyze("verify", "--man=no", runnable(unit, tmp_path))
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@needs_systemd
def test_systemd_finds_a_misspelt_setting(tmp_path: Path) -> None:
    copy = runnable(UNITS[0], tmp_path)
    copy.write_text(copy.read_text().replace("ProtectHome=", "ProtectHomes="))
    assert "Unknown key" in analyze("verify", "--man=no", copy).stderr


@needs_systemd
@each_unit
def test_systemd_rates_it_as_little_exposed(unit: Path) -> None:
    done = analyze("security", "--offline=yes", f"--threshold={MOST_EXPOSED}", unit)
    assert done.returncode == 0, done.stdout[-200:]


@each_unit
def test_it_keeps_what_hardens_it(unit: Path) -> None:
    found = settings(unit)
    assert {name: found[name][0] for name in REQUIRED} == REQUIRED
    assert set(found["RestrictAddressFamilies"][0].split()) <= {
        "AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK",
    }  # fmt: skip


def test_a_worker_has_no_capability_and_few_devices() -> None:
    found = settings(DEPLOY / "systemd" / "tsqp-worker.service")
    assert found["CapabilityBoundingSet"] == found["AmbientCapabilities"] == [""]
    assert found["DevicePolicy"] == ["closed"]
    assert all("nvidia" in device for device in found["DeviceAllow"])


def test_a_server_is_started_until_the_network_and_its_workers_are_there() -> None:
    found = settings(DEPLOY / "systemd" / "tsqp-serve.service")
    names = ("After", "Wants", "Restart", "StartLimitIntervalSec")
    assert [found[name] for name in names] == [
        ["network-online.target"], ["network-online.target"], ["always"], ["0"],
    ]  # fmt: skip


@each_unit
def test_its_command_has_these_options(unit: Path) -> None:
    words = settings(unit)["ExecStart"][0].split()
    group = typer.main.get_command(app)
    name = next(word for word in words if word in ("serve", "worker"))
    command = group.commands[name]  # type: ignore[attr-defined]
    known = {opt for each in (*command.params, *group.params) for opt in each.opts}
    options = {word for word in words if word.startswith("--")}
    assert options
    assert options <= known
