"""The manifest of the enclave, rendered as gramine-manifest does it, and bad copies of it."""

import copy
import importlib.machinery
import importlib.util
import sysconfig
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2

GRAMINE = Path(__file__).parents[2] / "deploy" / "gramine"
LIBOS, RUNTIME = "/gramine/libsysdb.so", "/gramine/runtime/glibc"
DIGEST = "sha256:" + "ab" * 32
PYTHON = str(Path(sysconfig.get_config_var("BINDIR")) / f"python{sysconfig.get_python_version()}")

Manifest = dict[str, Any]


class Gramine:
    """The object `gramine` of templates."""

    libos = LIBOS

    @staticmethod
    def runtimedir() -> str:
        return RUNTIME


def render(command: str = "serve", **changes: str) -> str:
    """A manifest for this machine. Undefined names are an error, as in gramine-manifest."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    values = {
        "command": command,
        "entrypoint": PYTHON,
        "stdlib": sysconfig.get_path("stdlib"),
        "arch_libdir": f"/lib/{sysconfig.get_config_var('MULTIARCH')}",
        "site": str(Path(__file__).parents[2] / "src"),
        "model": str(Path(__file__)),
        "model_path": "/model.gguf",
        "model_digest": DIGEST,
        "privacy": "pad",
        "field": "wide",
        "worker": "tcp://127.0.0.1:5555",
        "shm_name": "tsqp",
        "port": "8443",
        "threads": "8",
        "pad_memory": "2",
        "kv_memory": "4",
        "edmm": "true",
        "enclave_size": "16G",
        "broker": "",
        "broker_key": "",
        "model_key_secret": "",
        "api_keys_secret": "",
    }
    template = environment.from_string((GRAMINE / "tsqp.manifest.template").read_text())
    return template.render(gramine=Gramine(), **(values | changes))


BROKER = {
    "broker": "https://192.0.2.8:8002", "broker_key": "cd" * 32, "model_key_secret": "model",
    "api_keys_secret": "api-keys",
}  # fmt: skip


def written(manifest: Manifest) -> Manifest:
    """What gramine-manifest 1.9 writes: all defaults, and files as tables."""
    features = {"avx": "unspecified", "avx512": "unspecified", "amx": "unspecified",
                "mpx": "disabled", "pkru": "disabled"}  # fmt: skip
    defaults = {"isvprodid": 0, "isvsvn": 0, "enable_stats": False, "cpu_features": features}
    manifest = copy.deepcopy(manifest)
    manifest["sgx"] = {**defaults, **manifest["sgx"]}
    manifest["sgx"]["trusted_files"] = [{"uri": uri} for uri in manifest["sgx"]["trusted_files"]]
    return manifest


def signed(manifest: Manifest) -> Manifest:
    """What gramine-sgx-sign 1.9 writes: each file of a folder with its hash, here of one."""
    manifest = written(manifest)
    for file in manifest["sgx"]["trusted_files"]:
        file["uri"] += "a" if file["uri"].endswith("/") else ""
        file["sha256"] = "0" * 64
    manifest["loader"]["entrypoint"]["sha256"] = "0" * 64
    return manifest


@cache
def checker() -> ModuleType:
    """The program `check-manifest`, as a module."""
    loader = importlib.machinery.SourceFileLoader("check_manifest", str(GRAMINE / "check-manifest"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def changed(change: Callable[[Manifest], object]) -> Manifest:
    """A good manifest after a change."""
    manifest = copy.deepcopy(tomllib.loads(render()))
    change(manifest)
    return manifest


def set_option(manifest: Manifest, option: str, value: str) -> None:
    argv = manifest["loader"]["argv"]
    argv[argv.index(option) + 1] = value


def drop_option(manifest: Manifest, option: str) -> None:
    place = manifest["loader"]["argv"].index(option)
    del manifest["loader"]["argv"][place : place + 2]


SEGMENT = "dev:/dev/shm/tsqp"
BAD: dict[str, Callable[[Manifest], object]] = {
    "arguments of the host": lambda m: m["loader"].update(insecure__use_cmdline_argv=True),
    "arguments from a file": lambda m: m["loader"].update(argv_src_file="file:argv"),
    "the environment of the host": lambda m: m["loader"].update(insecure__use_host_env=True),
    "an environment from a file": lambda m: m["loader"].update(env_src_file="file:env"),
    "a variable of the host": lambda m: m["loader"]["env"].update(HOME={"passthrough": True}),
    "a preloaded library": lambda m: m["loader"]["env"].update(LD_PRELOAD="/tmp/x.so"),
    "a start file of Python": lambda m: m["loader"]["env"].update(PYTHONSTARTUP="/tmp/x.py"),
    "code from the tmpfs": lambda m: m["loader"]["env"].update(PYTHONPATH="/tmp"),
    "options in variables": lambda m: m["loader"]["env"].update(TSQP_PRIVACY="open"),
    "a cache": lambda m: m["loader"]["env"].update(TSQP_CACHE="/tmp"),
    "no address randomisation": lambda m: m["loader"].update(insecure__disable_aslr=True),
    "a verbose log": lambda m: m["loader"].update(log_level="debug"),
    "a log file": lambda m: m["loader"].update(log_file="log"),
    "another program": lambda m: m["loader"]["argv"].__setitem__(slice(1, 5), ["/tmp/x.py"]),
    "another first argument": lambda m: m["loader"]["argv"].__setitem__(0, "/tmp/python"),
    "another command": lambda m: m["loader"]["argv"].__setitem__(5, "worker"),
    "no arguments": lambda m: m["loader"].pop("argv"),
    "no privacy": lambda m: set_option(m, "--privacy", "open"),
    "privacy that is taken back": lambda m: m["loader"]["argv"].append("--privacy=open"),
    "an option twice": lambda m: m["loader"]["argv"].extend(["--privacy", "pad"]),
    "a name to resolve": lambda m: set_option(m, "--worker", "tcp://worker:5555"),
    "a worker by ipc": lambda m: set_option(m, "--worker", "ipc:///run/tsqp.sock"),
    "a worker in a mode without": lambda m: set_option(m, "--privacy", "tee"),
    "a broker by name": lambda m: m["loader"]["argv"].extend(
        ["--broker-url", "https://broker:8002", "--broker-key", "ab" * 32]
    ),
    "any broker": lambda m: m["loader"]["argv"].extend(["--broker-url", "https://192.0.2.8:8002"]),
    "a secret of nobody": lambda m: m["loader"]["argv"].extend(["--fetch-model-key", "model"]),
    "a key in a file": lambda m: m["loader"]["argv"].extend(["--model-key-file", "/tmp/key"]),
    "memory protection keys": lambda m: m["sgx"].update(cpu_features={"pkru": "required"}),
    "no shared memory": lambda m: m["sgx"].pop("allowed_files"),
    "a worker in the enclave": lambda m: set_option(m, "--worker", "local"),
    "any model": lambda m: drop_option(m, "--expect-model"),
    "no evidence": lambda m: drop_option(m, "--attest"),
    "simulated evidence": lambda m: set_option(m, "--attest", "simulated"),
    "an insecure link": lambda m: m["loader"]["argv"].append("--insecure"),
    "tracebacks": lambda m: m["loader"]["argv"].append("--debug"),
    "a prompt in the arguments": lambda m: m["loader"]["argv"].extend(["--prompt", "secret"]),
    "a debug enclave": lambda m: m["sgx"].update(debug=True),
    "debug, written as a number": lambda m: m["sgx"].update(debug=0),
    "debug not stated": lambda m: m["sgx"].pop("debug"),
    "unknown files": lambda m: m["sgx"].update(file_check_policy="allow_all_but_log"),
    "host threads": lambda m: m["sgx"].update(insecure__rpc_thread_num=4),
    "no attestation": lambda m: m["sgx"].update(remote_attestation="none"),
    "statistics": lambda m: m["sgx"].update(enable_stats=True),
    "a profile": lambda m: m["sgx"].update(profile={"enable": "all"}),
    "hints about memory": lambda m: m["sgx"].update(use_exinfo=False),
    "too few threads": lambda m: m["sgx"].update(max_threads=1),
    "a size that is none": lambda m: m["sgx"].update(enclave_size="-1G"),
    "code that the host may change": lambda m: m["sgx"]["allowed_files"].append("file:/opt/tsqp/"),
    "all shared memory": lambda m: m["sgx"].update(allowed_files=["dev:/dev/shm"]),
    "shared memory of others": lambda m: m["sgx"].update(allowed_files=["dev:/dev/shm/other"]),
    "another name on each side": lambda m: m["sgx"].update(allowed_files=[SEGMENT + "-2"]),
    "a device": lambda m: m["sgx"].update(allowed_files=["dev:/dev/nvidia0"]),
    "a folder above": lambda m: m["sgx"].update(allowed_files=[SEGMENT + "/../x"]),
    "everything as trusted": lambda m: m["sgx"]["trusted_files"].append("file:/"),
    "a relative file": lambda m: m["sgx"]["trusted_files"].append("file:code/"),
    "a hash that is none": lambda m: m["sgx"]["trusted_files"].append(
        {"uri": "file:/x", "sha256": "ab"}
    ),
    "no trusted files": lambda m: m["sgx"].update(trusted_files=[]),
    "a mount without hashes": lambda m: m["fs"]["mounts"].append(
        {"path": "/data", "uri": "file:/data"}
    ),
    "the root of the host": lambda m: m["fs"]["mounts"].append({"path": "/", "uri": "file:/"}),
    "another root": lambda m: m["fs"].update(root={"type": "chroot", "uri": "file:/"}),
    "a key in the manifest": lambda m: m["fs"].update(insecure__keys={"default": "ab" * 16}),
    "shared memory elsewhere": lambda m: m["fs"]["mounts"].append(
        {"path": "/shm", "type": "untrusted_shm", "uri": "dev:/dev/shm"}
    ),
    "an encrypted mount": lambda m: m["fs"]["mounts"].append(
        {"path": "/e", "type": "encrypted", "uri": "file:/e", "key_name": "_sgx_mrsigner"}
    ),
    "subprocesses": lambda m: m["sys"].update(disallow_subprocesses=False),
    "subprocesses by default": lambda m: m["sys"].pop("disallow_subprocesses"),
    "host events": lambda m: m["sys"].update(insecure__allow_eventfd=True),
    "device controls": lambda m: m["sys"].update(allowed_ioctls=[{"request_code": 1}]),
    "names from the host": lambda m: m["sys"].update(enable_extra_runtime_domain_names_conf=True),
    "an option of tomorrow": lambda m: m["sys"].update(experimental__enable_flock=True),
    "an unknown table": lambda m: m.update(new={}),
}  # fmt: skip
