"""The Kubernetes objects fit their schemas, fit together, and give only the rights needed."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer.main
import yaml

from tsqp.cli import app
from tsqp.model.shard import parse_shard

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
KUBERNETES = "1.35"
SETS = ("a", "b")

Object = dict[str, Any]


def read(name: str) -> list[Object]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def one(name: str, kind: str) -> Object:
    [found] = [each for each in read(name) if each["kind"] == kind]
    return found


def files() -> dict[str, list[Object]]:
    """The objects of each file, without kustomize's own files."""
    paths = sorted(FOLDER.rglob("*.yaml"))
    names = [str(path.relative_to(FOLDER)) for path in paths if path.stem != "kustomization"]
    return {name: read(name) for name in names}


def options_of(command: str) -> set[str]:
    group = typer.main.get_command(app)
    parameters = group.commands[command].params  # type: ignore[attr-defined]
    return {option for each in parameters for option in each.opts}


def pod_of(workload: Object) -> Object:
    spec: Object = workload["spec"]["template"]["spec"]
    return spec


def values(arguments: list[str], option: str) -> list[str]:
    return [arguments[i + 1] for i, each in enumerate(arguments) if each == option]


@pytest.fixture
def workers() -> Object:
    return one("worker-set/statefulset.yaml", "StatefulSet")


@pytest.fixture
def server() -> Object:
    return one("serve.yaml", "Deployment")


def test_the_objects_fit_their_schemas() -> None:
    kinds = {each["kind"] for found in files().values() for each in found}
    assert kinds == {"Deployment", "NetworkPolicy", "PodDisruptionBudget", "Service", "StatefulSet"}
    for found in files().values():
        for each in found:
            kubernetes_validate.validate(each, KUBERNETES, strict=True)


BAD: dict[str, Callable[[Object], object]] = {
    "a misspelt field": lambda pod: pod["containers"][0].update(argz=[]),
    "a number as text": lambda pod: pod["securityContext"].update(runAsUser="10001"),
    "a probe without a port": lambda pod: pod["containers"][0]["readinessProbe"].update(
        tcpSocket={}
    ),
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_the_schemas_refuse(change: Callable[[Object], object], workers: Object) -> None:
    bad = copy.deepcopy(workers)
    change(pod_of(bad))
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(bad, KUBERNETES, strict=True)


def test_kustomize_takes_every_file_once() -> None:
    [top] = read("kustomization.yaml")
    assert sorted(top["resources"]) == [
        "serve.yaml", "worker-set-a", "worker-set-b", "workers.yaml",
    ]  # fmt: skip
    for each in SETS:
        [overlay] = read(f"worker-set-{each}/kustomization.yaml")
        assert overlay["nameSuffix"] == f"-{each}"
        assert overlay["resources"] == ["../worker-set"]
        [labels] = overlay["labels"]
        # In the selector too, or one set would take the pods of the other for its own.
        assert labels["pairs"] == {"tsqp/replica": each} and labels["includeSelectors"] is True
    [base] = read("worker-set/kustomization.yaml")
    assert base["resources"] == ["statefulset.yaml"]
    images = {pod_of(one(*where))["containers"][0]["image"] for where in WORKLOADS}
    assert {each["name"] for each in top["images"]} == images


WORKLOADS = (("worker-set/statefulset.yaml", "StatefulSet"), ("serve.yaml", "Deployment"))


@pytest.mark.parametrize("where", WORKLOADS, ids=["worker", "server"])
def test_a_pod_may_do_nothing_but_serve(where: tuple[str, str]) -> None:
    pod = pod_of(one(*where))
    [container] = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert not any("hostPath" in volume for volume in pod["volumes"])


def test_each_worker_holds_the_shard_of_its_ordinal(workers: Object) -> None:
    spec = workers["spec"]
    [container] = pod_of(workers)["containers"]
    [shard] = values(container["args"], "--shard")
    [ordinal] = [each for each in container["env"] if each["name"] == "ORDINAL"]
    field = ordinal["valueFrom"]["fieldRef"]["fieldPath"]
    assert field == "metadata.labels['apps.kubernetes.io/pod-index']"
    first, count = spec["ordinals"]["start"], spec["replicas"]
    held = [
        parse_shard(shard.replace("$(ORDINAL)", str(number)))
        for number in range(first, first + count)
    ]
    assert [(each.number, each.count) for each in held] == [
        (number, count) for number in range(1, count + 1)
    ]


def test_each_worker_sees_its_own_key_and_no_other(workers: Object) -> None:
    [container] = pod_of(workers)["containers"]
    mounts = [mount for mount in container["volumeMounts"] if mount["name"] == "keys"]
    assert {mount["mountPath"]: mount["subPathExpr"] for mount in mounts} == {
        "/run/secrets/tsqp/worker.key": "$(POD).key",
        "/run/secrets/tsqp/worker.pub": "$(POD).pub",
    }
    assert all(mount["readOnly"] is True for mount in mounts)
    assert values(container["args"], "--keyfile") == ["/run/secrets/tsqp/worker.key"]
    [volume] = [each for each in pod_of(workers)["volumes"] if each["name"] == "keys"]
    assert volume["secret"]["defaultMode"] == 0o400


def test_commands_have_these_options(workers: Object, server: Object) -> None:
    [worker], [serve] = pod_of(workers)["containers"], pod_of(server)["containers"]
    probe = worker["startupProbe"]["exec"]["command"]
    for command, words in (("worker", worker["args"]), ("serve", serve["args"]), ("doctor", probe)):
        options = {each for each in words if each.startswith("--")}
        assert options and options <= options_of(command)


def test_a_worker_is_ready_once_a_client_with_its_key_gets_an_answer(workers: Object) -> None:
    [container] = pod_of(workers)["containers"]
    probe = container["startupProbe"]["exec"]["command"]
    assert probe[1:3] == ["doctor", "--only-workers"]
    [port] = container["ports"]
    assert values(probe, "--worker") == [f"tcp://127.0.0.1:{port['containerPort']}"]
    assert values(probe, "--worker-key") == ["/run/secrets/tsqp/worker.pub"]


def test_the_server_knows_every_worker_by_name_and_by_a_key_of_its_own(
    server: Object, workers: Object
) -> None:
    [container] = pod_of(server)["containers"]
    numbers = range(1, workers["spec"]["replicas"] + 1)
    pods = [f"tsqp-worker-{each}-{number}" for each in SETS for number in numbers]
    service = workers["spec"]["serviceName"]
    assert one("workers.yaml", "Service")["metadata"]["name"] == service
    expected = [f"tcp://{pod}.{service}:5555" for pod in pods]
    assert values(container["args"], "--worker") == expected
    assert len(set(values(container["args"], "--worker-key"))) == len(pods)


def test_the_server_runs_in_a_confidential_machine_with_masks_and_tls(server: Object) -> None:
    pod = pod_of(server)
    assert pod["runtimeClassName"] in {"kata-qemu-snp", "kata-qemu-tdx"}
    arguments = pod["containers"][0]["args"]
    assert values(arguments, "--privacy") == ["pad"] and values(arguments, "--expect-model")
    assert values(arguments, "--ssl-certfile") and values(arguments, "--ssl-keyfile")
    assert pod["volumes"][-1]["emptyDir"]["medium"] == "Memory"


def test_only_the_trusted_side_reaches_a_worker_and_a_worker_reaches_nobody(
    workers: Object, server: Object
) -> None:
    policy = one("workers.yaml", "NetworkPolicy")["spec"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert policy["egress"] == []
    [rule] = policy["ingress"]
    [origin] = rule["from"]
    labels = server["spec"]["template"]["metadata"]["labels"]
    assert origin == {"podSelector": {"matchLabels": labels}}
    assert rule["ports"] == [{"protocol": "TCP", "port": 5555}]
    assert policy["podSelector"]["matchLabels"] == workers["spec"]["selector"]["matchLabels"]


def test_a_drained_node_takes_one_worker_at_a_time(workers: Object) -> None:
    budget = one("workers.yaml", "PodDisruptionBudget")["spec"]
    assert budget["maxUnavailable"] == 1
    # Of both sets together: the label of a set is not part of it.
    assert budget["selector"]["matchLabels"] == workers["spec"]["selector"]["matchLabels"]
