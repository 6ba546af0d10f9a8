"""The measured configuration: nothing that matters is left out, and nothing secret is in it."""

import dataclasses
import importlib
import os
from pathlib import Path
from typing import Any

import pytest

from tsqp import __version__
from tsqp.api.evidence import canonical_json, configuration_digest
from tsqp.checkpoint.model_key import ModelKey
from tsqp.cli import app, with_options
from tsqp.errors import UsageError
from tsqp.runtime.environment import keep_known, measured_variables
from tsqp.runtime.installed_code import code_digest, installed_code
from tsqp.runtime.options import Options
from tsqp.serve import configuration
from tsqp.serve.configuration import MAX_BYTES, effective_configuration
from tsqp.serve.options import ServeOptions
from tsqp.wire.keys import write_key_pair

ENVIRONMENT = {"HOME": "/home/a"}
# Another value of each option, with what else it needs. A new option needs a line here.
OPTIONS: dict[str, dict[str, Any]] = {
    "privacy": {"privacy": "open", "worker": "local"},
    "worker": {"worker": "tcp://10.0.0.1:5555"},
    "worker_key": {"worker": "tcp://10.0.0.1:5555", "worker_key": "KEY"},
    "workers_file": {"worker": None, "workers_file": "FILE"},
    "attention": {"privacy": "open", "worker": "local", "attention": "gpu"},
    "fuse": {"privacy": "open", "worker": "local", "fuse": "layer"},
    "field": {"field": "compact"},
    "fixed_point": {"privacy": "tee", "worker": None, "fixed_point": True},
    "pad_memory": {"pad_memory": 1},
    "kv_memory": {"kv_memory": 1},
    "dtype": {"dtype": "float16"},
    "threads": {"threads": 1},
    "device": {"device": "cpu"},
    "prefill_chunk": {"prefill_chunk": 1},
    "timeout": {"timeout": 1.0},
    "shm": {"shm": False},
    "insecure": {"insecure": True},
    "insecure_same_host": {"insecure_same_host": True},
    "microbatches": {"microbatches": 2},
    "expect_model": {"expect_model": f"sha256:{'0' * 64}"},
    "model_key_file": {"model_key_file": "model.key"},
    "model_key": {"worker": "ipc:///a", "model_key": ModelKey(bytes(32))},
    "hints": {"field": "lattice", "hints": "worker"},
    "rpc_log": {"rpc_log": "calls.jsonl"},
    "shm_name": {"worker": "ipc:///tmp/a", "shm_name": "tsqp"},
}
BROKER = {
    "attest": "simulated", "broker_url": "https://192.0.2.1:1", "broker_key": "ab" * 32,
    "fetch_api_keys": "keys",
}  # fmt: skip
SERVED: dict[str, dict[str, Any]] = {
    "host": {"host": "0.0.0.0"},
    "port": {"port": 1},
    "uds": {"uds": Path("a")},
    "api_keys": {"api_keys": ["a"]},
    "served_model_names": {"served_model_names": ["a"]},
    "max_model_len": {"max_model_len": 100},
    "max_num_seqs": {"max_num_seqs": 1},
    "max_num_queued_reqs": {"max_num_queued_reqs": 1},
    "ssl_certfile": {"ssl_certfile": Path(__file__), "ssl_keyfile": Path(__file__)},
    "ssl_keyfile": {"ssl_certfile": Path(__file__), "ssl_keyfile": Path(__file__)},
    "attest": {"attest": "simulated"},
    "broker_url": BROKER,
    "broker_key": BROKER,
    "fetch_model_key": BROKER | {"fetch_model_key": "model"},
    "fetch_api_keys": BROKER,
    "receipts": {"attest": "simulated", "receipts": True},
    "root_path": {"root_path": "/a"},
    "tool_call_parser": {"tool_call_parser": "hermes"},
    "shutdown_timeout": {"shutdown_timeout": 1.0},
    "show_worker_view": {"show_worker_view": True},
    "max_body_bytes": {"max_body_bytes": 1},
    "body_timeout": {"body_timeout": 1.0},
    "max_connections": {"max_connections": 500},
    "header_timeout": {"header_timeout": 1.0},
    "send_timeout": {"send_timeout": 1.0},
}


@pytest.fixture(autouse=True)
def quick_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """All files are hashed once only, in the tests of the code itself."""
    monkeypatch.setattr(configuration, "installed_code", lambda: {"sha256": "of the code"})


def configure(
    options: dict[str, Any] | None = None,
    served: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:
    given = {"worker": "local"} | (options or {})
    return effective_configuration(
        Options(**given), ServeOptions(**(served or {})), environment or ENVIRONMENT
    )


def test_the_same_options_have_the_same_hash() -> None:
    assert configuration_digest(configure()) == configuration_digest(configure())


def test_every_option_has_a_line_here() -> None:
    assert OPTIONS.keys() == {each.name for each in dataclasses.fields(Options) if each.init}
    assert SERVED.keys() == {each.name for each in dataclasses.fields(ServeOptions)}


@pytest.mark.parametrize("name", OPTIONS)
def test_another_value_of_an_option_of_the_run_changes_the_hash(name: str, tmp_path: Path) -> None:
    given = dict(OPTIONS[name])
    if given.get("worker_key") == "KEY":
        given["worker_key"] = write_key_pair(tmp_path)[2]
    if given.get("workers_file") == "FILE":
        given["workers_file"] = tmp_path / "workers"
        given["workers_file"].write_text("a ipc:///a\n")
    base = {key: value for key, value in given.items() if key == "worker" and key != name}
    if name == "fixed_point":
        base["privacy"] = "tee"
    if name == "workers_file":
        base["worker"] = "ipc:///a"  # the same link
    assert configuration_digest(configure(given)) != configuration_digest(configure(base))


@pytest.mark.parametrize("name", SERVED)
def test_another_value_of_an_option_of_the_server_changes_the_hash(name: str) -> None:
    assert configuration_digest(configure(served=SERVED[name])) != configuration_digest(configure())


def test_the_address_of_a_worker_and_the_api_keys_are_not_shown() -> None:
    text = canonical_json(
        configure({"worker": "tcp://10.1.2.3:5555"}, {"api_keys": ["a-weak-key"]})
    ).decode()
    assert "10.1.2.3" not in text and "weak" not in text
    one, two = (configure(served={"api_keys": [key]}) for key in ("a", "b"))
    assert one == two  # no hash of a key, from which it could be guessed


@pytest.mark.parametrize(
    "name",
    ["LD_PRELOAD", "PYTHONPATH", "OMP_NUM_THREADS", "HOME", "MKL_CBWR", "GLIBC_TUNABLES",
     "TSQP_CACHE", "LC_ALL", "CUDA_VISIBLE_DEVICES"],
)  # fmt: skip
def test_a_variable_that_libraries_read_is_kept_and_measured(name: str) -> None:
    environment = {name: "one"}
    assert keep_known(environment) == 0
    assert measured_variables(environment) == {name: "one"}
    assert configure(environment={name: "one"}) != configure(environment={name: "two"})


def test_an_unknown_variable_is_removed_and_an_option_is_kept_but_not_shown() -> None:
    environment = {"AWS_SECRET": "a", "TSQP_API_KEY": "b", "SSL_CERT_FILE": "c", "PATH": "d"}
    assert keep_known(environment) == 2
    assert environment == {"TSQP_API_KEY": "b", "PATH": "d"}
    assert measured_variables(environment) == {"PATH": "d"}


@pytest.mark.parametrize("flags", [[], ["--attest", "simulated"]])
def test_an_attested_server_removes_them_before_its_options_load_libraries(
    flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def note(**_: Any) -> Options:
        seen.append("MY_VARIABLE" in os.environ)
        raise UsageError("This is enough.")

    monkeypatch.setattr(os, "environ", {**os.environ, "MY_VARIABLE": "a"})
    monkeypatch.setattr(with_options, "Options", note)
    monkeypatch.setattr(importlib.import_module("tsqp.cli.app"), "harden_process", lambda: True)
    with pytest.raises(UsageError, match="enough"):
        app(["serve", "model", "--privacy", "tee", *flags], standalone_mode=False)
    assert seen == [not flags]


@pytest.mark.parametrize(
    "change", [{"broker_key": "cd" * 32}, {"fetch_api_keys": "b"}, {"fetch_model_key": "m"}]
)
def test_another_broker_or_secret_changes_the_hash_and_its_address_does_not(
    change: dict[str, str],
) -> None:
    moved = configure(served=BROKER | {"broker_url": "https://192.0.2.9:1"})
    assert moved == configure(served=BROKER) != configure(served=BROKER | change)


def test_a_variable_that_is_not_unicode_is_measured() -> None:
    one, two = ({"PATH": f"/\udc80{end}"} for end in "ab")
    assert configuration_digest(configure(environment=one)) != configuration_digest(
        configure(environment=two)
    )


def test_a_configuration_that_evidence_cannot_hold_is_refused() -> None:
    with pytest.raises(UsageError, match="shorten environment variables"):
        configure(environment={"PATH": "a" * MAX_BYTES})


def test_a_changed_file_changes_the_digest_of_the_code(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.py").write_text("one")
    (tmp_path / "b.js").write_text("two")
    seen = {code_digest(tmp_path)}
    for change in (
        lambda: (tmp_path / "sub" / "a.py").write_text("One"),
        lambda: (tmp_path / "b.js").write_text("Two"),
        lambda: (tmp_path / "b.js").rename(tmp_path / "c.js"),
        lambda: (tmp_path / "sub" / "d").write_text(""),
    ):
        change()
        seen.add(code_digest(tmp_path))
    assert len(seen) == 5
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.pyc").write_text("bytes")
    assert code_digest(tmp_path) in seen


def test_versions_of_what_runs_are_in_it() -> None:
    import torch

    code = installed_code()
    assert code["packages"]["torch"] == torch.__version__
    assert code["packages"]["tsqp"] == __version__
    assert len(code["sha256"]) == 64
