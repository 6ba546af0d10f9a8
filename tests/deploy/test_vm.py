"""The image of the confidential virtual machine, and the lines that start it."""

import configparser
import json
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import typer.main
from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

from tsqp.cli import app

DEPLOY = Path(__file__).parents[2] / "deploy"
VM = DEPLOY / "vm"
IMAGE_PYTHON, GLIBC_MINOR = "3.13", 41  # of Debian 13
SHELLS = {"/usr/bin/sh", "/usr/bin/bash", "/usr/bin/dash", "/usr/lib/systemd/systemd-sulogin-shell"}
SECTIONS = {  # of mkosi.conf, with the settings that are used
    "Distribution": {"Distribution", "Release", "Architecture"},
    "Output": {"ImageId", "Format", "ManifestFormat", "SplitArtifacts", "Seed"},
    "Content": {
        "SourceDateEpoch", "Bootable", "Bootloader", "UnifiedKernelImages", "WithDocs",
        "CleanPackageMetadata", "Packages", "ExtraTrees", "RemovePackages", "RemoveFiles",
        "KernelModulesInitrdInclude", "KernelCommandLine",
    },
}  # fmt: skip
REMOTE_ACCESS = ("ssh", "telnet", "agent", "cloud-init", "sudo", "curl", "wget")


def read(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(path.read_text())
    return parser


def words(section: str, name: str) -> list[str]:
    return read(VM / "mkosi.conf")[section][name].split()


def launch(kind: str, **environment: str) -> list[str]:
    """The command that `launch` would run."""
    import shlex

    done = subprocess.run(
        [VM / "launch", kind, "tsqp.efi", "tsqp.raw"],
        env={"PATH": os.environ["PATH"], "DRY_RUN": "1"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return shlex.split(done.stdout)


def values(command: list[str], option: str) -> list[str]:
    return [command[place + 1] for place, each in enumerate(command) if each == option]


def test_the_recipe_has_known_settings_only() -> None:
    recipe = read(VM / "mkosi.conf")
    assert {name: set(recipe[name]) for name in recipe.sections()} == SECTIONS


def test_the_image_has_no_shell_and_no_remote_access() -> None:
    assert set(words("Content", "RemoveFiles")) >= SHELLS
    packages = words("Content", "Packages")
    assert len(packages) >= 5
    assert not [each for each in packages if any(word in each for word in REMOTE_ACCESS)]
    assert words("Content", "RemovePackages") == ["apt"]


def test_nothing_offers_a_console_when_the_start_fails() -> None:
    line = words("Content", "KernelCommandLine")
    for unit in ("emergency", "rescue", "debug-shell"):
        assert {f"systemd.mask={unit}.service", f"rd.systemd.mask={unit}.service"} <= set(line)
    assert "systemd.getty_auto=no" in line
    assert not [each for each in line if each.startswith(("init=", "console=", "rd.break"))]


def test_the_root_is_read_only_and_verified() -> None:
    root = read(VM / "mkosi.repart" / "10-root.conf")["Partition"]
    tree = read(VM / "mkosi.repart" / "20-root-verity.conf")["Partition"]
    assert (root["Type"], root["Format"], root["Verity"]) == ("root", "erofs", "data")
    assert (tree["Type"], tree["Verity"]) == ("root-verity", "hash")
    assert root["VerityMatchKey"] == tree["VerityMatchKey"]
    assert "systemd.verity_root_options=panic-on-corruption" in words(
        "Content", "KernelCommandLine"
    )


def test_nothing_is_taken_from_partitions_or_tables_that_the_host_adds() -> None:
    line = words("Content", "KernelCommandLine")
    wanted = {"systemd.gpt_auto": "no", "systemd.swap": "no", "systemd.import_credentials": "no"}
    settings = [each.partition("=")[::2] for each in line]
    for name, value in wanted.items():
        assert [found for key, found in settings if key.removeprefix("rd.") == name] == [value]
    assert "noresume" in line
    assert not {"root", "resume", "systemd.image_policy"} & {key for key, _ in settings}


def test_the_image_holds_the_code_the_model_and_the_unit() -> None:
    trees = dict(each.split(":") for each in words("Content", "ExtraTrees"))
    unit = (DEPLOY / "systemd" / "tsqp-serve.service").read_text()
    assert trees["build/site"] == "/opt/tsqp" and "PYTHONPATH=/opt/tsqp" in unit
    assert f"TSQP_MODEL={trees['build/model']}" in unit
    assert (VM / "../systemd/tsqp-serve.service").exists()
    for source in trees:
        assert source.startswith("build/") or (VM / source).exists()


def test_only_the_server_and_the_network_start() -> None:
    folder = VM / "mkosi.extra/usr/lib/systemd/system-preset"
    [preset] = folder.iterdir()
    assert preset.read_text().splitlines() == [
        "enable tsqp-serve.service", "enable systemd-networkd.service",
        "enable systemd-networkd-wait-online.service", "disable *",
    ]  # fmt: skip


def test_every_setting_of_the_server_is_an_option() -> None:
    text = (VM / "mkosi.extra/etc/tsqp/serve.toml").read_text()
    settings = tomllib.loads(re.sub(r"^# ([a-z-]+ = )", r"\1", text, flags=re.M))
    parameters = typer.main.get_command(app).commands["serve"].params  # type: ignore[attr-defined]
    known = {option.removeprefix("--") for each in parameters for option in each.opts}
    own = settings.pop("serve")
    assert {"broker-url", "broker-key", "fetch-api-keys", "fetch-model-key"} <= own.keys()
    assert set(settings) | set(own) <= known
    assert settings["privacy"] == "pad"
    assert re.fullmatch("sha256:[0-9a-f]{64}", settings["expect-model"])


def test_each_wheel_of_the_lock_file_has_a_hash_and_the_version_that_is_tested() -> None:
    text = (DEPLOY / "requirements.lock").read_text()
    pinned = dict(
        line.lower().replace("_", "-").split("==")
        for line in (DEPLOY.parent / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(lines) >= 40
    for line in lines:
        found = re.fullmatch(r"(\S+)==(\S+) --hash=sha256:[0-9a-f]{64}  # \S+\.whl", line)
        assert found is not None, line
        name, version = found[1].replace("_", "-"), found[2].partition("+")[0]
        assert pinned[name] == version, line
    assert "torch==" in text and "nvidia" not in text


def test_each_wheel_of_the_lock_file_is_for_the_python_of_the_image() -> None:
    text = (DEPLOY / "requirements.lock").read_text()
    assert f"for Python {IMAGE_PYTHON} on x86_64." in text
    abi = f"cp{IMAGE_PYTHON.replace('.', '')}"
    version = tuple(map(int, IMAGE_PYTHON.split(".")))
    places = [f"manylinux_2_{minor}_x86_64" for minor in range(5, GLIBC_MINOR + 1)]
    places += ["manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64"]
    fitting = {
        *cpython_tags(version, [abi], places), *compatible_tags(version, abi, places),
    }  # fmt: skip
    wheels = re.findall(r"# (\S+\.whl)$", text, flags=re.M)
    assert len(wheels) >= 40
    for wheel in wheels:
        name, number, _, tags = parse_wheel_filename(wheel)
        assert f"{name}=={number} --hash" in text
        assert tags & fitting, wheel
        assert name != "torch" or str(number) == "2.13.0+cpu"


def test_the_lock_file_has_every_package_that_the_server_needs() -> None:
    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["serve"]]
    names = {re.split(r"[^A-Za-z0-9_-]", each)[0].lower() for each in needed}
    text = (DEPLOY / "requirements.lock").read_text()
    assert names <= set(re.findall(r"^([^#=]+)==", text, flags=re.M)), "run deploy/lock"


def test_wheels_are_those_of_the_python_in_the_image() -> None:
    assert read(VM / "mkosi.conf")["Distribution"]["Release"] == "trixie"
    assert f"IMAGE_PYTHON := {IMAGE_PYTHON}\n" in (VM / "Makefile").read_text()
    done = subprocess.run(
        ["make", "-C", VM, "site", "PYTHON=false"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert f"PYTHON must be Python {IMAGE_PYTHON}" in done.stderr


def test_snp_measures_the_kernel_and_forbids_debugging() -> None:
    command = launch("snp", FIRMWARE="OVMF.fd")
    [guest] = [each for each in values(command, "-object") if each.startswith("sev-snp-guest")]
    fields = dict(each.partition("=")[::2] for each in guest.split(",")[1:])
    assert fields["kernel-hashes"] == "on"
    assert int(fields["policy"], 0) & 0x80000 == 0  # DEBUG
    assert int(fields["policy"], 0) & 0x40000 == 0  # MIGRATE_MA
    assert values(command, "-kernel") == ["tsqp.efi"]


def test_tdx_names_the_service_that_makes_quotes() -> None:
    command = launch("tdx", FIRMWARE="OVMF.fd", QUOTES="4055")
    [guest] = [each for each in values(command, "-object") if each.startswith("{")]
    decoded = json.loads(guest)
    assert decoded["qom-type"] == "tdx-guest"
    assert decoded["quote-generation-socket"]["port"] == "4055"
    assert "attributes" not in decoded  # such as debugging


@pytest.mark.parametrize("kind", ["snp", "tdx"])
def test_a_machine_is_confidential_and_its_disk_read_only(kind: str) -> None:
    command = launch(kind, FIRMWARE="OVMF.fd")
    [machine] = values(command, "-machine")
    assert "confidential-guest-support=cc" in machine.split(",")
    assert any(re.search(r"\bid\W{1,3}cc\b", each) for each in values(command, "-object"))
    assert all("readonly=on" in each for each in values(command, "-drive"))
    # The command line is in the kernel file, and nothing else comes from the host.
    assert not {"-append", "-initrd", "-fw_cfg", "-smbios", "-virtfs", "-monitor"} & set(command)
    assert not any("ivshmem" in each for each in command)


def test_shared_memory_is_a_file_of_the_host() -> None:
    command = launch("snp", FIRMWARE="OVMF.fd", IVSHMEM="/dev/shm/tsqp-vm", IVSHMEM_SIZE="64M")
    assert "memory-backend-file,id=shm,size=64M,share=on,mem-path=/dev/shm/tsqp-vm" in values(
        command, "-object"
    )
    assert "ivshmem-plain,memdev=shm" in values(command, "-device")


@pytest.mark.parametrize("arguments", [[], ["sev", "a", "b"], ["snp", "a"]])
def test_wrong_usage_is_refused(arguments: list[str]) -> None:
    done = subprocess.run([VM / "launch", *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "usage: launch snp|tdx KERNEL IMAGE\n")


def test_firmware_is_needed() -> None:
    done = subprocess.run(
        [VM / "launch", "snp", "a", "b"],
        env={"PATH": os.environ["PATH"], "DRY_RUN": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "FIRMWARE is needed" in done.stderr
