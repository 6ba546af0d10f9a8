"""What `tsqp cluster up` starts, and the file that it writes, without Ray."""

from pathlib import Path

import pytest
import typer.main

from tsqp.cli import app
from tsqp.cluster.connection import connected
from tsqp.cluster.plan import Plan, check_name
from tsqp.cluster.workers_file import records, replace
from tsqp.errors import ClusterError, UsageError, WorkerUnavailable
from tsqp.wire.keys import write_key_pair


def plan(shards: int = 2, replicas: int = 2, keys: Path | None = None) -> Plan:
    return Plan("random:tiny", shards, replicas, ("--threads", "1"), keys, "CPU")


def test_each_shard_has_its_replicas_each_with_a_key_of_its_own(tmp_path: Path) -> None:
    workers = plan(keys=tmp_path).workers()
    assert [*workers] == [
        "shard1-replica1",
        "shard1-replica2",
        "shard2-replica1",
        "shard2-replica2",
    ]
    assert workers["shard2-replica1"] == (
        *("random:tiny", "--threads", "1", "--shard", "2/2"),
        *("--keyfile", f"{tmp_path}/shard2-replica1/worker.key"),
    )


def test_a_whole_model_is_no_shard_and_a_link_without_keys_says_so() -> None:
    expected = ("random:tiny", "--threads", "1", "--insecure")
    assert plan(shards=1, replicas=1).workers() == {"shard1-replica1": expected}


def test_workers_get_options_that_they_have(tmp_path: Path) -> None:
    worker = typer.main.get_command(app).commands["worker"]  # type: ignore[attr-defined]
    known = {option for each in worker.params for option in each.opts}
    for keys in (None, tmp_path):
        for arguments in plan(keys=keys).workers().values():
            assert {each for each in arguments if each.startswith("--")} <= known


@pytest.mark.parametrize(("shards", "replicas"), [(0, 1), (65, 1), (1, 0), (64, 17)])
def test_too_many_workers_or_none_are_refused(shards: int, replicas: int) -> None:
    with pytest.raises(UsageError):
        plan(shards, replicas)


@pytest.mark.parametrize("name", ["", "a b", "../x", "-x", "x" * 64, "a\n"])
def test_a_name_that_ray_may_not_take_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        check_name(name)


def test_public_keys_are_the_operators(tmp_path: Path) -> None:
    expected = {name: write_key_pair(tmp_path / name)[2] for name in plan().workers()}
    assert plan(keys=tmp_path).public_keys() == expected


def test_two_workers_with_one_key_are_refused(tmp_path: Path) -> None:
    for name in plan().workers():
        write_key_pair(tmp_path / name)
    text = (tmp_path / "shard1-replica1" / "worker.pub").read_text()
    (tmp_path / "shard2-replica2" / "worker.pub").write_text(text)
    with pytest.raises(UsageError, match="same key"):
        plan(keys=tmp_path).public_keys()


def test_a_worker_without_a_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"shard1-replica1/worker\.pub"):
        plan(keys=tmp_path).public_keys()


def test_a_record_has_name_endpoint_and_key() -> None:
    endpoints = {"a": "tcp://192.0.2.7:5555", "b": "tcp://[2001:db8::7]:5556"}
    text = records(endpoints, {"a": "A" * 40, "b": "B" * 40})
    assert text == (f"a tcp://192.0.2.7:5555 {'A' * 40}\nb tcp://[2001:db8::7]:5556 {'B' * 40}\n")
    assert records({"a": "tcp://192.0.2.7:5555"}, {}) == "a tcp://192.0.2.7:5555\n"


@pytest.mark.parametrize("endpoint", ["", "tcp://h:1\nx tcp://h:2", "http://h:1", "tcp://h:1 k"])
def test_an_endpoint_cannot_add_a_record(endpoint: str) -> None:
    with pytest.raises(WorkerUnavailable):
        records({"a": endpoint}, {})


def test_the_file_is_replaced_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "workers"
    replace(path, "old\n")
    with path.open() as reader:
        replace(path, "new\n")
        assert reader.read() == "old\n"  # of the file that was there, which nobody changed
    assert path.read_text() == "new\n"
    assert [each.name for each in tmp_path.iterdir()] == ["workers"]


def test_ray_that_nobody_reaches_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(ClusterError, match=r"at 127\.0\.0\.1:1 "), connected("127.0.0.1:1", "x"):
        pass


def test_ray_without_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(UsageError, match="RAY_AUTH_MODE"), connected("auto", "x"):
        pass
