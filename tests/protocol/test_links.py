"""Keys and links from the command line: what gets through, and one sentence where nothing does."""

import json
import re
import signal
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from protocol_helpers import (
    DEADLINE_S,
    GIVES_UP_SOON,
    SHARED,
    Commands,
    Main,
    socket_endpoint,
    write_ids,
)

from tsqp import LLM, Options
from tsqp.errors import TSQPError, UsageError
from tsqp.wire.keys import write_key_pair
from tsqp.wire.zmq import new_key_pair

GENERATE = ["generate", "random:tiny", "--max-tokens", 4, "--ignore-eos", "--json"]
TCP = "tcp://127.0.0.1:0"


class Encrypted:
    """A worker process with a key of its own."""

    def __init__(self, commands: Commands, name: str, listen: str = TCP) -> None:
        folder = commands.folder / name
        self.secret_file, self.public_file, self.key = write_key_pair(folder)
        arguments = ["random:tiny", "--listen", listen, "--keyfile", self.secret_file]
        self.running = commands.start("worker", *arguments)

    @property
    def endpoint(self) -> str:
        return socket_endpoint(self.running.says("serving ").stderr)


@pytest.fixture(scope="session")
def two(shared_commands: Commands) -> list[Encrypted]:
    """Two workers with keys."""
    return [Encrypted(shared_commands, f"keys-{number}") for number in range(2)]


@pytest.fixture(scope="session")
def plain(shared_commands: Commands) -> str:
    """The endpoint of a worker without a key, on tcp."""
    return socket_endpoint(shared_commands.worker("random:tiny", TCP).stderr)


@pytest.fixture(scope="session")
def own_address() -> str:
    """An address of this machine that others could use."""
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family.name == "AF_INET" and not address.address.startswith("127."):
                return address.address
    pytest.skip("this machine has no address but its own loopback")


def right(main: Main, ids: Path) -> list[list[int]]:
    command = [*GENERATE, "--privacy", "tee", "--fixed-point", "--prompt-ids", ids]
    return main(*command).token_ids


@pytest.mark.parametrize("privacy", ["pad", "open"])
@pytest.mark.parametrize("as_file", [True, False], ids=["file", "text"])
def test_every_mode_takes_a_key_as_text_or_file(
    as_file: bool,
    privacy: str,
    two: list[Encrypted],
    main: Main,
    ids: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    key = two[0].public_file if as_file else two[0].key
    options = ["--privacy", privacy, "--worker", two[0].endpoint, "--worker-key", key]
    result = main(*GENERATE, *options, "--prompt-ids", ids)
    assert result.status == 0, result.stderr
    assert result.json["transport"] == SHARED
    assert f"worker at {two[0].endpoint} (encrypted link): transport {SHARED}" in caplog.text


def test_shares_over_encrypted_links_answer_as_the_reference_does(
    two: list[Encrypted], main: Main, ids: Path
) -> None:
    options = ["--privacy", "shares", "--insecure-same-host", "--prompt-ids", ids]
    for worker in two:
        options += ["--worker", worker.endpoint, "--worker-key", worker.public_file]
    for extra, transport in (([], SHARED), (["--no-shm"], "inline")):
        result = main(*GENERATE, *options, *extra)
        assert result.token_ids == right(main, ids)
        assert result.json["transport"] == transport
        assert f"transport {transport}: " in result.stderr
        assert result.json["rpc"]["calls_by_kind"].keys() == {"seed_product", "product"}


def test_shares_to_two_addresses_need_no_flag_and_share_no_memory(
    own_address: str, two: list[Encrypted], commands: Commands, main: Main, ids: Path
) -> None:
    reachable = Encrypted(commands, "reachable", f"tcp://{own_address}:0")  # needs no --insecure
    options = ["--privacy", "shares", "--prompt-ids", ids]
    for worker in (two[0], reachable):
        options += ["--worker", worker.endpoint, "--worker-key", worker.key]
    result = main(*GENERATE, *options)
    assert result.token_ids == right(main, ids)
    assert result.json["transport"] == "inline"
    assert result.json["transport_reason"] == "shares travel on encrypted links"
    opened = ["--privacy", "open", "--worker", reachable.endpoint, "--worker-key", reachable.key]
    assert main(*GENERATE, *opened, "--prompt-ids", ids).status == 0  # nor does open


def test_a_lost_worker_of_several_is_named(plain: str, commands: Commands) -> None:
    lost = commands.worker("random:tiny", TCP)
    endpoint = socket_endpoint(lost.stderr)
    long = write_ids(commands.folder / "long.json", *[[7] * 500] * 50)  # takes minutes
    running = commands.start(
        "generate", "random:tiny", "--privacy", "shares", "--insecure-same-host",
        "--worker", plain, "--worker", endpoint, "--prompt-ids", long, "--prefill-chunk", 1,
        env=GIVES_UP_SOON,
    )  # fmt: skip
    running.says(f"worker at {endpoint}").computes()
    lost.send(signal.SIGKILL)
    result = running.ends(DEADLINE_S)
    assert (result.status, result.stdout) == (1, "")
    assert result.error.startswith(f"The worker at {endpoint} is gone: the connection broke")


@pytest.mark.parametrize("privacy", ["pad", "open"])
def test_a_wrong_or_missing_key_is_one_sentence(
    privacy: str, two: list[Encrypted], plain: str, main: Main, ids: Path
) -> None:
    encrypted, other = two
    cases = [
        (encrypted.endpoint, ["--worker-key", other.key], "does not hold the secret key"),
        (encrypted.endpoint, [], "accepts only encrypted links; give its public key"),
        (plain, ["--worker-key", other.key], "does not encrypt, and a --worker-key was given"),
    ]
    for endpoint, keys, sentence in cases:
        command = [*GENERATE, "--privacy", privacy, "--worker", endpoint, *keys]
        result = main(*command, "--prompt-ids", ids)
        assert (result.status, result.stdout) == (1, "")
        assert f"The worker at {endpoint} {sentence}" in result.error


def test_keys_in_the_wrong_order_are_refused(two: list[Encrypted], main: Main, ids: Path) -> None:
    options = ["--privacy", "shares", "--insecure-same-host", "--prompt-ids", ids]
    for worker, other in zip(two, reversed(two), strict=True):
        options += ["--worker", worker.endpoint, "--worker-key", other.key]
    result = main(*GENERATE, *options)
    assert result.status == 1
    assert f"The worker at {two[0].endpoint} does not hold the secret key" in result.error


def test_the_worker_shows_its_public_key_and_never_the_secret_one(two: list[Encrypted]) -> None:
    for worker in two:
        assert worker.endpoint
        assert (
            f"accepting only encrypted links; public key: {worker.key}\n" in worker.running.stderr
        )
        secret = worker.secret_file.read_text().split()[-1]
        assert secret not in worker.running.stderr + worker.running.stdout


# Settings


def test_keys_come_from_variables_and_from_the_file(
    commands: Commands, two: list[Encrypted], main: Main, ids: Path, tmp_path: Path
) -> None:
    endpoints = " ".join(worker.endpoint for worker in two)
    keys = " ".join(worker.key for worker in two)
    command = [*GENERATE, "--privacy", "shares", "--insecure-same-host", "--prompt-ids", ids]
    expected = right(main, ids)
    by_variable = main(*command, env={"TSQP_WORKER": endpoints, "TSQP_WORKER_KEY": keys})
    assert by_variable.token_ids == expected
    settings = tmp_path / "settings.toml"
    settings.write_text(
        f"worker = {json.dumps([worker.endpoint for worker in two])}\n"
        f"worker-key = {json.dumps([str(worker.public_file) for worker in two])}\n"
        "insecure-same-host = true\n"
    )
    command.remove("--insecure-same-host")
    assert main("--config", settings, *command).token_ids == expected
    missing = {"TSQP_KEYFILE": str(tmp_path / "none.key")}
    result = main("worker", "random:tiny", "--listen", commands.ipc(), env=missing)
    assert (result.status, result.stdout) == (2, "")
    assert f"Cannot read a key from {tmp_path / 'none.key'}" in result.error


def test_tee_passes_over_a_key_that_is_a_setting(main: Main, ids: Path) -> None:
    command = [*GENERATE, "--privacy", "tee", "--prompt-ids", ids]
    assert main(*command, env={"TSQP_WORKER_KEY": "nonsense"}).status == 0
    result = main(*command, "--worker-key", "nonsense")
    assert result.status == 2
    assert "has no --worker and no --worker-key" in result.error


def test_a_local_worker_is_not_touched_by_a_key_file_that_is_a_setting(
    commands: Commands, ids: Path
) -> None:
    result = commands.run(
        *GENERATE, "--privacy", "pad", "--worker", "local", "--pad-memory", 0, "--prompt-ids", ids,
        env={"TSQP_KEYFILE": "/no/such.key"},
    )  # fmt: skip
    assert result.status == 0, result.stderr


# The worker's side


def worker_refuses(main: Main, commands: Commands, *options: object) -> str:
    result = main("worker", "random:tiny", *options)
    assert (result.status, result.stdout) == (2, "")
    return result.error


def test_a_worker_that_others_can_reach_wants_a_key(
    own_address: str, commands: Commands, main: Main
) -> None:
    for host in ("0.0.0.0", own_address):
        said = worker_refuses(main, commands, "--listen", f"tcp://{host}:0")
        assert f"Other machines can reach tcp://{host}:0" in said
        assert "pass --keyfile with a key of `tsqp keygen`" in said
        assert "or pass --insecure" in said


def test_a_worker_without_a_proper_key_file_does_not_begin(commands: Commands, main: Main) -> None:
    secret_file, public_file, _ = write_key_pair(commands.folder / "keys")
    options = ["--listen", commands.ipc(), "--keyfile"]
    assert "holds a public key; a worker needs" in worker_refuses(
        main, commands, *options, public_file
    )
    secret_file.chmod(0o640)
    assert "Other users have access" in worker_refuses(main, commands, *options, secret_file)
    assert "No such file" in worker_refuses(main, commands, *options, "/no/such.key")
    assert not Path(commands.ipc().removeprefix("ipc://")).exists()


# `tsqp keygen`


def test_keygen_makes_two_files_and_prints_the_public_key(main: Main, tmp_path: Path) -> None:
    result = main("keygen", tmp_path / "keys")
    assert result.status == 0
    key = result.stdout.strip()
    assert f"tsqp-public-key {key}\n" in (tmp_path / "keys" / "worker.pub").read_text()
    assert (tmp_path / "keys" / "worker.key").stat().st_mode & 0o777 == 0o600
    secret = (tmp_path / "keys" / "worker.key").read_text().split()[-1]
    assert secret not in result.stdout + result.stderr
    again = main("keygen", tmp_path / "keys")
    assert (again.status, again.stdout) == (2, "")
    assert "worker.key already exists and is not overwritten" in again.error


def test_keygen_says_where_it_cannot_write(main: Main, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = main("keygen", tmp_path / "file" / "keys")
    assert (result.status, result.stdout) == (1, "")
    assert f"Cannot write keys to {tmp_path}/file/keys: Not a directory" in result.error


def test_keygen_needs_no_torch_and_ends_at_once(commands: Commands) -> None:
    result = commands.start("keygen", "keys").ends()
    assert result.status == 0
    assert re.fullmatch(r"\S{40}\n", result.stdout)


# Which links do for which mode; nothing of this reaches a worker.

KEYS = [new_key_pair()[0] for _ in range(3)]
HERE, THERE = "tcp://192.0.2.1:5555", "tcp://192.0.2.9:5555"


def refusal(privacy: str, worker: Sequence[str], keys: Sequence[str], **options: bool) -> str:
    with pytest.raises(UsageError) as caught:
        LLM("random:tiny", privacy=privacy, worker=worker, worker_key=keys, **options)  # type: ignore[arg-type]
    text = str(caught.value)
    assert text.endswith(".")
    assert not re.search(r"[a-z]\. [A-Z]", text), text
    return text


@pytest.mark.parametrize("count", [0, 1])
def test_shares_with_fewer_than_two_workers_is_refused(count: int) -> None:
    text = refusal("shares", [HERE][:count], KEYS[:count], insecure_same_host=True)
    assert f"shares needs two or more --worker, not {count}, on hosts that do not" in text
    assert "with one worker, choose pad" in text


@pytest.mark.parametrize("privacy", ["pad", "open"])
def test_the_other_modes_take_workers_that_replace_each_other(privacy: str) -> None:
    assert "needs one or more --worker, not 0" in refusal(privacy, [], [])
    links = Options(privacy=privacy, worker=[HERE, THERE], worker_key=KEYS[:2]).links
    assert [(str(link.endpoint), link.key) for link in links] == [
        (HERE, KEYS[0]),
        (THERE, KEYS[1]),
    ]


@pytest.mark.parametrize(
    "pair",
    [
        [HERE, HERE],
        ["ipc:///a", "ipc:///a"],
        ["tcp://localhost:5555", "tcp://127.0.0.1:5555"],
        ["tcp://GPU:5555", "tcp://gpu:5555"],
    ],
)
def test_a_worker_does_not_replace_itself(pair: list[str]) -> None:
    assert f"--worker {pair[0]} is given twice" in refusal("pad", pair, [])


@pytest.mark.parametrize("count", [1, 3])
def test_there_is_a_key_for_each_worker_or_none(count: int) -> None:
    text = refusal("shares", [HERE, THERE], KEYS[:count], insecure_same_host=True)
    assert f"There are {count} --worker-key for 2 --worker" in text


@pytest.mark.parametrize("worker", ["local", "inproc"])
def test_a_worker_that_this_side_starts_has_no_key(worker: str) -> None:
    assert f"A {worker} worker has no key" in refusal("pad", [worker], KEYS[:1])


@pytest.mark.parametrize(
    ("worker", "keys", "sentence"),
    [
        ([HERE, "ipc:///run/t.sock"], KEYS[:2], "ipc:///run/t.sock is on this one"),
        ([HERE, "local"], [], "tcp://192.0.2.1:5555 is not encrypted"),
        (["local", "local"], [], "local is on this one"),
        (["inproc", "inproc"], [], "inproc is on this one"),
        ([HERE, THERE], [], "whoever sees all shares can add them up; give the --worker-key"),
        ([HERE, HERE], KEYS[:2], "are on the same host"),
        ([HERE, "tcp://192.0.2.1:6666"], KEYS[:2], "are on the same host"),
        ([HERE, THERE, HERE], KEYS[:3], "are on the same host"),
        (["tcp://localhost:1", "tcp://127.0.0.1:2"], KEYS[:2], "are on the same host"),
        (["tcp://127.0.0.1:1", "tcp://127.0.0.2:2"], KEYS[:2], "are on the same host"),
        (["tcp://[::1]:1", "tcp://localhost:2"], KEYS[:2], "are on the same host"),
        (["tcp://0.0.0.0:1", "tcp://localhost:2"], KEYS[:2], "are on the same host"),
        (["tcp://[::ffff:192.0.2.1]:1", HERE], KEYS[:2], "are on the same host"),
        (["tcp://[2001:db8:0::1]:1", "tcp://[2001:DB8::1]:1"], KEYS[:2], "are on the same host"),
        (["tcp://GPU-a.example.:1", "tcp://gpu-a.example:2"], KEYS[:2], "are on the same host"),
        (["tcp://127.1:1", "tcp://localhost:2"], KEYS[:2], "are on the same host"),
        (["tcp://0x7f000001:1", "tcp://2130706434:2"], KEYS[:2], "are on the same host"),
        (["tcp://0:1", "tcp://*:2"], KEYS[:2], "are on the same host"),
        (["tcp://[::]:1", "tcp://[::ffff:0.0.0.0]:2"], KEYS[:2], "are on the same host"),
        (["tcp://192.0.513:1", HERE], KEYS[:2], "are on the same host"),
        (["tcp://0300.0.2.1:1", HERE], KEYS[:2], "are on the same host"),
        (["tcp://192.0.2.1%eth0:1", HERE], KEYS[:2], "are on the same host"),
        (["tcp://[fe80::1%eth0]:1", "tcp://[fe80::1%2]:1"], KEYS[:2], "are on the same host"),
        (["tcp://localhost.localdomain:1", "tcp://127.1:2"], KEYS[:2], "are on the same host"),
        (["tcp://a.LOCALHOST.:1", "tcp://b.localhost:2"], KEYS[:2], "are on the same host"),
        (["tcp://gpu%eth0:1", "tcp://gpu:2"], KEYS[:2], "are on the same host"),
        ([HERE, THERE], [KEYS[0], KEYS[0]], "have the same --worker-key, and may be the same"),
    ],
)
def test_shares_that_could_meet_are_refused_and_the_flag_is_named(
    worker: list[str], keys: list[str], sentence: str
) -> None:
    for options in ({}, {"insecure": True}):
        text = refusal("shares", worker, keys, **options)
        assert sentence in text
        assert "or pass --insecure-same-host, which is for testing" in text


@pytest.mark.parametrize(
    ("privacy", "flags"), [("open", {}), ("shares", {"insecure_same_host": True})]
)
def test_an_open_link_to_another_machine_wants_a_key_or_insecure(
    privacy: str, flags: dict[str, bool]
) -> None:
    workers = [HERE, HERE][: 1 if privacy == "open" else 2]
    text = refusal(privacy, workers, [], **flags)
    assert f"The link to {HERE} is not encrypted" in text
    assert "give its --worker-key, use a worker on this machine, or pass --insecure" in text


@pytest.mark.parametrize(
    "key", ["nonsense", KEYS[0][:-1], KEYS[0] + "0", ""], ids=["nonsense", "short", "long", "none"]
)
def test_a_key_that_is_none_is_named(key: str) -> None:
    text = refusal("pad", [HERE], [key])
    assert "name a file that `tsqp keygen` made, or correct the key" in text


def test_a_secret_key_file_is_no_worker_key(tmp_path: Path) -> None:
    secret_file, _, _ = write_key_pair(tmp_path)
    assert "holds a secret key; it must not leave" in refusal("pad", [HERE], [str(secret_file)])


def test_one_key_may_be_given_without_a_list(tmp_path: Path, gives_up_soon: None) -> None:
    with pytest.raises(TSQPError, match="No worker answers at ipc"):
        LLM("random:tiny", worker=f"ipc://{tmp_path}/none", worker_key=KEYS[0])
