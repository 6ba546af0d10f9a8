"""The worker's container file passes its linter, and its Kubernetes objects fit their schemas."""

import copy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer.main
import yaml

from tsqp.cli import app

DEPLOY = Path(__file__).parents[2] / "deploy"
CONTAINERFILE = DEPLOY / "worker" / "Containerfile"
HADOLINT = Path(sys.executable).with_name("hadolint")
KUBERNETES = "1.35"
PORT = 5555

Object = dict[str, Any]


def objects() -> dict[str, Object]:
    text = (DEPLOY / "kubernetes" / "worker.yaml").read_text()
    return {each["kind"]: each for each in yaml.safe_load_all(text)}


def worker_options() -> set[str]:
    parameters = typer.main.get_command(app).commands["worker"].params  # type: ignore[attr-defined]
    return {option for each in parameters for option in each.opts}


def instructions() -> list[tuple[str, str]]:
    text = CONTAINERFILE.read_text().replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and line[0] != "#"]
    return [(name, rest.strip()) for name, rest in lines]


@pytest.fixture
def pod() -> Object:
    spec: Object = objects()["StatefulSet"]["spec"]["template"]["spec"]
    return spec


def test_the_linter_finds_nothing_wrong() -> None:
    done = subprocess.run(
        [HADOLINT, "--no-color", CONTAINERFILE], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_linter_finds_a_fault(tmp_path: Path) -> None:
    bad = tmp_path / "Containerfile"
    bad.write_text(CONTAINERFILE.read_text() + "RUN cd /tmp && apt-get install curl\n")
    done = subprocess.run([HADOLINT, bad], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "DL3015" in done.stdout


def test_the_container_has_no_root_and_runs_the_worker() -> None:
    found = instructions()
    assert [rest for name, rest in found if name == "USER"] == ["10001:10001"]
    [entry] = [rest for name, rest in found if name == "ENTRYPOINT"]
    assert entry == '["/opt/tsqp/bin/tsqp", "worker", "--serve", "private"]'
    assert ("EXPOSE", str(PORT)) in found


def test_what_the_container_copies_is_there() -> None:
    sources = [
        source
        for name, rest in instructions()
        if name == "COPY" and "--from" not in rest
        for source in shlex.split(rest)[:-1]
    ]
    assert len(sources) >= 5
    assert all((DEPLOY.parent / source).exists() for source in sources)


def test_the_objects_fit_their_schemas() -> None:
    found = objects()
    assert set(found) == {"StatefulSet", "Service", "NetworkPolicy"}
    for each in found.values():
        kubernetes_validate.validate(each, KUBERNETES, strict=True)


BAD: dict[str, Callable[[Object], object]] = {
    "a misspelt field": lambda pod: pod["containers"][0].update(argz=[]),
    "a number as text": lambda pod: pod["securityContext"].update(runAsUser="10001"),
    "a probe without a port": lambda pod: pod["containers"][0]["startupProbe"].update(tcpSocket={}),
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_the_schemas_refuse(change: Callable[[Object], object]) -> None:
    bad = copy.deepcopy(objects()["StatefulSet"])
    change(bad["spec"]["template"]["spec"])
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(bad, KUBERNETES, strict=True)


def test_the_pod_may_do_nothing_but_serve(pod: Object) -> None:
    [container] = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert not any("hostPath" in volume for volume in pod["volumes"])


def test_the_worker_has_these_options_and_a_key(pod: Object) -> None:
    arguments = pod["containers"][0]["args"]
    options = {each for each in arguments if each.startswith("--")}
    assert {"--listen", "--keyfile"} <= options <= worker_options()
    key = Path(arguments[arguments.index("--keyfile") + 1])
    [mount] = [m for m in pod["containers"][0]["volumeMounts"] if m["name"] == "key"]
    assert key.parent == Path(mount["mountPath"]) and mount["readOnly"] is True


def test_the_parts_name_each_other() -> None:
    found = objects()
    labels = found["StatefulSet"]["spec"]["template"]["metadata"]["labels"]
    assert found["StatefulSet"]["spec"]["selector"]["matchLabels"] == labels
    assert found["Service"]["spec"]["selector"] == labels
    assert found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    assert found["StatefulSet"]["spec"]["serviceName"] == found["Service"]["metadata"]["name"]


def test_only_the_trusted_side_reaches_a_worker_and_a_worker_reaches_nobody() -> None:
    policy = objects()["NetworkPolicy"]["spec"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert policy["egress"] == []
    [rule] = policy["ingress"]
    assert rule["from"] and rule["ports"] == [{"protocol": "TCP", "port": PORT}]
