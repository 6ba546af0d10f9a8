"""The doctor finds what is wrong, and only that; with real workers, real sockets, real mounts."""

import os
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from liars import LyingWorker
from lies import Order
from protocol_helpers import Commands, Main, socket_endpoint
from test_without_shared_memory import MISSING, inside, may_mount

from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.doctor import machine_checks as machine
from tsqp.doctor.check import Check, Wrong, run_check
from tsqp.doctor.diagnose import examine as examine_all
from tsqp.doctor.diagnose import print_checks
from tsqp.doctor.greeting_checks import Unnamed, greeting_checks
from tsqp.doctor.session_checks import Target, session_checks
from tsqp.errors import RemoteError
from tsqp.gpu.backends.cpu import CpuBackend
from tsqp.gpu.worker_weights import load_integers
from tsqp.tee.crypto.freivalds import FailureLimit
from tsqp.wire.keys import write_key_pair

MODES = ("pad", "open")


def failures(checks: list[Check]) -> dict[str, str]:
    """What is wrong, by the name of the check."""
    assert checks
    return {check.name: check.found for check in checks if check.state == "bad"}


def examine(worker: str, model: str = "random:tiny") -> list[Check]:
    return list(session_checks(Target(model, worker, dtype="float32", threads=1)))


def test_a_machine_and_a_worker_that_are_well(commands: Commands, tiny_worker: str) -> None:
    result = commands.run(
        "doctor", "random:tiny", "--worker", tiny_worker, "--threads", 1, "--json"
    )
    assert result.status == 0, result.stderr
    assert result.json["well"]
    names = [check["name"] for check in result.json["checks"] if check["state"] == "ok"]
    assert {"processor", "shared memory", "TEE", "int8 products", "tcp alone"} <= set(names)
    assert {f"{mode}: {step}" for mode in MODES for step in ("handshake", "product")} <= set(names)
    assert {"pad: lattice masks", "open: embedding", "open: attention"} <= set(names)
    assert result.stderr.count("✓") == len(names)


def test_each_of_several_workers_is_checked(
    commands: Commands, tiny_worker: str, gives_up_soon: None
) -> None:
    targets = [
        Target("random:tiny", worker, dtype="float32", threads=1)
        for worker in (tiny_worker, "inproc", commands.ipc())
    ]
    checks = list(examine_all(1, targets))
    names = [check.name for check in checks if check.state == "ok"]
    assert {"1. pad: product", "2. pad: product", "1. open: product"} <= set(names)
    assert list(failures(checks)) == ["3. reach the worker"]


def test_each_worker_has_a_key_or_none(main: Main, tiny_worker: str) -> None:
    result = main("doctor", "--worker", tiny_worker, "--worker-key", "a", "--worker-key", "b")
    assert result.status == 2
    assert "There are 2 --worker-key for 1 --worker" in result.error


@pytest.mark.skipif(not may_mount(), reason="needs the right to mount")
def test_sealed_memory_needs_no_dev_shm(commands: Commands) -> None:
    result = commands.run("doctor", "--json", "--threads", 1, before=inside(MISSING))
    found = {c["name"]: c["found"] for c in result.json["checks"] if c["state"] == "ok"}
    assert found["shared memory"] == "sealed memory"


def test_without_sealed_memory_a_folder_that_is_missing_or_tiny_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(Wrong, match="There is no"):
        machine.shared_memory(tmp_path / "absent")
    monkeypatch.setattr(os, "statvfs", lambda folder: SimpleNamespace(f_bavail=1024, f_frsize=4096))
    with pytest.raises(Wrong, match="has 4 MiB free"):
        machine.shared_memory(tmp_path)


def test_a_worker_that_is_down(commands: Commands, gives_up_soon: None) -> None:
    [(name, found)] = failures(examine(commands.ipc())).items()
    assert name == "reach the worker"
    assert f"ipc://{commands.folder}" in found


def test_a_worker_with_another_model(tiny_worker: str) -> None:
    found = failures(examine(tiny_worker, "random:tiny:7"))
    assert list(found) == [f"{mode}: handshake" for mode in MODES]
    assert all("other weights" in each for each in found.values())


def test_a_worker_whose_tensors_go_through_the_socket(commands: Commands) -> None:
    worker = commands.worker("random:tiny", "tcp://127.0.0.1:0", "--no-shm")
    found = failures(examine(worker.stderr.split(" at ")[1].split(": ")[0]))
    assert list(found) == [f"{mode}: transport" for mode in MODES]
    assert all("go through the socket" in each for each in found.values())


def test_a_worker_that_serves_one_mode(commands: Commands) -> None:
    endpoint = commands.ipc()
    commands.worker("random:tiny", endpoint, "--serve", "private")
    checks = examine(endpoint)
    assert failures(checks) == {}
    assert [check.name for check in checks if check.state == "skipped"] == ["open: handshake"]


def test_a_lying_worker(liar: LyingWorker, limit: FailureLimit) -> None:
    liar.order(Order("one bit flipped"))
    found = failures(examine(liar.endpoint))
    assert "returned a wrong product for group qkv of layer 0" in found["pad: product"]


@pytest.mark.parametrize(
    ("group", "what"), [("attention_scores", "Q·Kᵀ"), ("weighted_values", "P·V")]
)
def test_a_worker_whose_attention_is_wrong(group: str, what: str, liar: LyingWorker) -> None:
    liar.order(Order("not a number", 0, group))
    found = failures(examine(liar.endpoint))
    assert list(found) == ["open: attention"]
    assert found["open: attention"].startswith(f"{what} is off by nan of its size")


def test_what_a_failing_worker_says_of_itself_is_shown(
    liar: LyingWorker, capsys: pytest.CaptureFixture[str]
) -> None:
    liar.order(Order("fails"))
    checks = [each for each in examine(liar.endpoint) if each.name == "pad: product"]
    assert [check.state for check in checks] == ["bad"]
    assert not print_checks(checks, json_output=False)
    shown = capsys.readouterr().out
    assert "✗ pad: product" in shown
    assert "Traceback (most recent call last)" in shown
    assert "RuntimeError: this worker has better things to do" in shown


def test_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    [check] = [
        run_check(name, check)
        for name, check in machine.machine_checks(threads=10_000)
        if name == "threads"
    ]
    assert check.state == "bad"
    assert f"share {machine.cores()} cores" in check.found


def test_threads_that_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    check = run_check("threads", lambda: machine.threads_fit(1))
    assert "OMP_WAIT_POLICY is active" in check.found


@pytest.mark.parametrize("kind", ["Gramine, attestation dcap", "Intel TDX guest", "none: "])
def test_the_kind_of_tee_is_named(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attestation, device = tmp_path / "attestation_type", tmp_path / "tdx_guest"
    monkeypatch.setattr(machine, "GRAMINE", attestation)
    monkeypatch.setattr(machine, "TEE_DEVICES", {"Intel TDX": device})
    if kind.startswith("Gramine"):
        attestation.write_text("dcap\n")
    if kind.startswith("Intel"):
        device.touch()
    check = run_check("TEE", machine.tee)
    assert check.state == "ok"
    assert check.found.startswith(kind)


def test_products_that_are_not_exact_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "fast_product_is_exact", lambda: False)
    check = run_check("int8 products", machine.int8_products)
    assert check.state == "bad"
    assert check.found.startswith("torch._int_mm is not exact on this processor")


def test_a_check_that_breaks_shows_why() -> None:
    check = run_check("odd", lambda: str(1 // 0))
    assert check.state == "bad"
    assert "ZeroDivisionError" in check.traceback


def test_a_remote_failure_shows_the_remote_traceback() -> None:
    def fail() -> str:
        raise RemoteError("The worker failed: no.", "their traceback")

    assert run_check("remote", fail).traceback == "their traceback"


def test_a_worker_without_its_model_is_asked_what_it_serves(tiny_worker: str) -> None:
    checks = {check.name: check for check in greeting_checks(Unnamed(tiny_worker))}
    assert failures(list(checks.values())) == {}
    assert checks["reach the worker"].found == f"{tiny_worker}, not encrypted"
    with closing(open_checkpoint("random:tiny")) as checkpoint:
        digest = load_integers(checkpoint, CpuBackend()).digest
    said = f"it says int8 weights {digest[:12]}…, in protocol version 3"
    assert checks["pad: what is served"].found == said
    assert checks["open: what is served"].found.startswith("it says float32 weights ")
    assert checks["weights and products"].state == "skipped"
    assert "add MODEL" in checks["weights and products"].found


def test_a_worker_without_its_model_that_serves_one_mode_or_has_a_key(commands: Commands) -> None:
    _, public, _ = write_key_pair(commands.folder / "keys")
    secret = commands.folder / "keys" / "worker.key"
    running = commands.worker(
        "random:tiny", "tcp://127.0.0.1:0", "--serve", "private", "--keyfile", secret
    )
    endpoint = socket_endpoint(running.stderr)
    states = {c.name: c.state for c in greeting_checks(Unnamed(endpoint, str(public)))}
    assert states.pop("reach the worker") == states.pop("pad: what is served") == "ok"
    assert set(states.values()) == {"skipped"}
    [wrong] = failures(list(greeting_checks(Unnamed(endpoint)))).values()
    assert "accepts only encrypted links" in wrong


def test_a_worker_without_its_model_that_is_down(commands: Commands, gives_up_soon: None) -> None:
    [(name, found)] = failures(list(greeting_checks(Unnamed(commands.ipc())))).items()
    assert name == "reach the worker"
    assert f"ipc://{commands.folder}" in found
    [found] = failures(list(greeting_checks(Unnamed("local")))).values()
    assert "give MODEL too" in found


def test_the_command_takes_a_worker_without_its_model(
    main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(
        "tsqp.doctor.diagnose.examine", lambda threads, target, **_: asked.append(target) or []
    )
    assert main("doctor", "--worker", "ipc:///nowhere", env={"TSQP_MODEL": ""}).status == 0
    assert asked == [[Unnamed("ipc:///nowhere")]]


def test_cores_are_those_that_this_process_may_use() -> None:
    assert 1 <= machine.cores() <= (os.cpu_count() or 1)


def test_a_model_without_its_worker_is_said_to_be_passed_over(
    main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsqp.doctor.diagnose.examine", lambda threads, target, **_: [])
    result = main("doctor", "random:tiny")
    assert result.status == 0
    assert "random:tiny was not checked: give the --worker that serves it" in result.stderr
