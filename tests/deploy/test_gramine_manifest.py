"""The manifest of the enclave holds nothing but known keys with known values."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer.main
from gramine_manifests import (
    BAD,
    BROKER,
    GRAMINE,
    RUNTIME,
    changed,
    checker,
    render,
    signed,
    written,
)

from tsqp.cli import app


def command_options(command: str) -> set[str]:
    group = typer.main.get_command(app)
    parameters = group.commands[command].params  # type: ignore[attr-defined]
    return {name for each in parameters for name in each.opts if name.startswith("--")}


def run_check(path: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, GRAMINE / "check-manifest", path], capture_output=True, text=True
    )


@pytest.mark.parametrize("command", ["serve", "generate"])
@pytest.mark.parametrize("edmm", ["true", "false"])
def test_the_rendered_manifest_is_accepted(command: str, edmm: str) -> None:
    assert checker().faults(tomllib.loads(render(command, edmm=edmm))) == []


@pytest.mark.parametrize("privacy", ["pad", "tee"])
def test_a_manifest_that_fetches_secrets_is_accepted_in_each_form(privacy: str) -> None:
    manifest = tomllib.loads(render(privacy=privacy, **BROKER))
    argv = manifest["loader"]["argv"]
    assert argv[argv.index("--fetch-model-key") + 1] == "model"
    assert ("--worker" in argv, "allowed_files" in manifest["sgx"]) == (
        (True, True) if privacy == "pad" else (False, False)
    )
    check = checker().faults
    assert check(manifest) == check(written(manifest)) == check(signed(manifest), signed=True) == []


def test_memory_is_shared_with_a_worker_only() -> None:
    manifest = tomllib.loads(render(privacy="tee"))
    manifest["sgx"]["allowed_files"] = ["dev:/dev/shm/tsqp"]
    assert len(checker().faults(manifest)) == 1
    del manifest["sgx"]["allowed_files"]
    manifest["fs"]["mounts"].append(
        {"path": "/dev/shm", "type": "untrusted_shm", "uri": "dev:/dev/shm"}
    )
    assert len(checker().faults(manifest)) == 1


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_a_weaker_manifest_is_refused_in_one_sentence(change: object) -> None:
    sentences = checker().faults(changed(change))  # type: ignore[arg-type]
    assert len(sentences) >= 1
    assert all(re.fullmatch(r"\S.*\.", sentence) for sentence in sentences)


@pytest.mark.parametrize("key", ["sgx.debug", "loader.argv", "sgx.trusted_files"])
def test_a_missing_key_is_named(key: str) -> None:
    table, name = key.split(".")
    assert checker().faults(changed(lambda manifest: manifest[table].pop(name))) == [
        f"{key} is missing."
    ]


def test_every_trusted_file_is_there_or_belongs_to_gramine() -> None:
    manifest = tomllib.loads(render())
    paths = [uri.removeprefix("file:") for uri in manifest["sgx"]["trusted_files"]]
    assert len(paths) >= 6
    for path in paths:
        if not path.startswith(str(Path(RUNTIME).parents[1])):
            assert Path(path).exists(), path
            assert Path(path).is_dir() == path.endswith("/"), path


@pytest.mark.parametrize("command", ["serve", "generate"])
def test_the_command_has_every_option_of_the_manifest(command: str) -> None:
    argv = tomllib.loads(render(command, **BROKER))["loader"]["argv"]
    options = {each for each in argv[5:] if each.startswith("--")}
    assert len(options) >= 8
    assert options <= command_options(command)


def test_every_option_that_the_check_lets_through_exists() -> None:
    known = command_options("serve") | command_options("generate")
    assert checker().OPTIONS.keys() <= known


def test_the_program_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "tsqp.manifest"
    path.write_text(render())
    assert (run_check(path).returncode, run_check(path).stderr) == (0, "")
    path.write_text(render().replace("sgx.debug = false", "sgx.debug = true"))
    done = run_check(path)
    assert (done.returncode, done.stderr) == (1, "error: sgx.debug must be False.\n")


def test_a_signed_manifest_needs_a_hash_of_every_file(tmp_path: Path) -> None:
    path = tmp_path / "tsqp.manifest.sgx"
    path.write_text(render())
    done = run_check(path)
    assert done.returncode == 1
    assert "error: sgx.trusted_files has a file without its hash.\n" in done.stderr
    for forget in (
        lambda found: found["sgx"]["trusted_files"][-1].pop("sha256"),
        lambda found: found["loader"]["entrypoint"].pop("sha256"),
    ):
        manifest = signed(tomllib.loads(render()))
        assert checker().faults(manifest, signed=True) == []
        forget(manifest)
        assert len(checker().faults(manifest, signed=True)) == 1


@pytest.mark.parametrize("content", [b"not = toml = at all", b"\xff"])
def test_a_file_that_cannot_be_read_is_a_failure(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tsqp.manifest"
    path.write_bytes(content)
    assert run_check(path).returncode == 2
    assert run_check(tmp_path / "absent").returncode == 2


def test_the_template_needs_every_variable_that_the_makefile_gives() -> None:
    template = (GRAMINE / "tsqp.manifest.template").read_text()
    used = set(re.findall(r"\{[{%][^}%]*?\b([a-z_]+)\b(?!\()[^}%]*[}%]\}", template))
    given = set(re.findall(r"-D([a-z_]+)=", (GRAMINE / "Makefile").read_text()))
    assert given >= {"entrypoint", "model_digest", "enclave_size"}
    for name in given:
        assert re.search(rf"\b{name}\b", template), name
    assert used - {"gramine", "if", "else", "endif", "int"} <= given


@pytest.mark.parametrize(
    ("model", "field", "size"),
    [
        pytest.param("random:llama-3.2-1b", "wide", "16G", marks=pytest.mark.slow),
        pytest.param("random:tiny", "wide", "16G", marks=pytest.mark.slow),
        ("random:llama-3.2-1b", "lattice", "32G"),
    ],
)
def test_the_enclave_is_a_power_of_two_that_holds_the_model(
    model: str, field: str, size: str
) -> None:
    done = subprocess.run(
        [sys.executable, GRAMINE / "enclave-size", model, "--field", field],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{size}\n"
