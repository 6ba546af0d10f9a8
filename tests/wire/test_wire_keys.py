"""Key files: made once, readable by their owner alone, and told apart."""

import os
import stat
from pathlib import Path

import pytest
from wire_mounts import run_in_a_mount

from tsqp.errors import TSQPError, UsageError
from tsqp.wire.keys import parse_public_key, read_secret_key, write_key_pair
from tsqp.wire.zmq import is_key, public_key_of


def refusal(read: object, what: object) -> str:
    with pytest.raises(UsageError) as caught:
        read(what)  # type: ignore[operator]
    return str(caught.value)


def test_a_pair_is_read_back_from_its_files_and_belongs_together(tmp_path: Path) -> None:
    secret_path, public_path, public = write_key_pair(tmp_path / "a" / "b")
    assert {secret_path, public_path} == set((tmp_path / "a" / "b").iterdir())
    assert parse_public_key(str(public_path)) == parse_public_key(public) == public
    assert public_key_of(read_secret_key(secret_path)) == public


def test_the_secret_file_is_for_its_owner_alone_whatever_the_umask(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        secret_path, public_path, _ = write_key_pair(tmp_path)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(secret_path.stat().st_mode) == 0o600
    assert stat.S_IMODE(public_path.stat().st_mode) == 0o644


def test_a_file_says_what_it_is_and_holds_one_key(tmp_path: Path) -> None:
    for path, kind in zip(write_key_pair(tmp_path)[:2], ("secret", "public"), strict=True):
        comment, line = path.read_text().splitlines()
        assert comment.startswith(f"# tsqp worker, {kind} key")
        assert line.split()[0] == f"tsqp-{kind}-key"
    public = parse_public_key(str(tmp_path / "worker.pub"))
    assert read_secret_key(tmp_path / "worker.key") not in (tmp_path / "worker.pub").read_text()
    assert public not in (tmp_path / "worker.key").read_text()


def test_two_pairs_are_different(tmp_path: Path) -> None:
    assert write_key_pair(tmp_path / "a")[2] != write_key_pair(tmp_path / "b")[2]


@pytest.mark.parametrize("name", ["worker.key", "worker.pub"])
def test_a_key_that_is_there_is_neither_replaced_nor_given_a_partner(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text("precious")
    assert f"{tmp_path / name} already exists" in refusal(write_key_pair, tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / name]
    assert (tmp_path / name).read_text() == "precious"


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "worker.key").symlink_to(tmp_path / "elsewhere")
    assert "worker.key already exists" in refusal(write_key_pair, tmp_path)
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TSQPError, match=r"Cannot write keys to .*/file/keys: Not a directory;"):
        write_key_pair(tmp_path / "file" / "keys")


@pytest.mark.parametrize(
    ("options", "reason"),
    [("ro", "Read-only file system"), ("nr_blocks=1", "No space left on device")],
)
def test_a_folder_without_room_is_named_and_no_half_of_a_pair_stays(
    options: str, reason: str, tmp_path: Path
) -> None:
    program = """
        from pathlib import Path
        from tsqp.errors import TSQPError
        from tsqp.wire.keys import write_key_pair
        folder = Path("FOLDER")
        try:
            write_key_pair(folder)
        except TSQPError as exc:
            print(exc, [path.name for path in folder.iterdir()])
    """
    said = run_in_a_mount(tmp_path, options, program.replace("FOLDER", str(tmp_path)))
    assert said.startswith(f"Cannot write keys to {tmp_path}: {reason};")
    assert said.endswith("[]")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644, 0o666])
def test_a_secret_key_that_others_can_reach_is_refused(mode: int, tmp_path: Path) -> None:
    secret_path, _, _ = write_key_pair(tmp_path)
    secret_path.chmod(mode)
    assert f"run `chmod 600 {secret_path}`" in refusal(read_secret_key, secret_path)
    secret_path.chmod(0o400)
    assert read_secret_key(secret_path)


@pytest.mark.parametrize(
    ("owner", "user", "mode", "is_refused"),
    [
        (0, 10001, 0o440, False),  # as systemd and Kubernetes hand them out
        (0, 10001, 0o444, True),
        (0, 10001, 0o460, True),
        (0, 0, 0o440, True),
        (10001, 10001, 0o440, True),
        (10002, 10001, 0o440, True),
    ],
)
def test_a_secret_key_that_root_hands_to_a_service_is_read(
    owner: int,
    user: int,
    mode: int,
    is_refused: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    secret_path, _, _ = write_key_pair(tmp_path)
    fstat = os.fstat

    def owned(descriptor: int) -> os.stat_result:
        fields = list(fstat(descriptor))
        fields[stat.ST_UID], fields[stat.ST_MODE] = owner, stat.S_IFREG | mode
        return os.stat_result(fields)

    monkeypatch.setattr(os, "fstat", owned)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    if is_refused:
        assert "Other users have access" in refusal(read_secret_key, secret_path)
    else:
        assert read_secret_key(secret_path)


def test_the_wrong_half_of_a_pair_is_named(tmp_path: Path) -> None:
    secret_path, public_path, _ = write_key_pair(tmp_path)
    assert "holds a secret key; it must not leave" in refusal(parse_public_key, str(secret_path))
    assert "holds a public key; a worker needs" in refusal(read_secret_key, public_path)
    assert read_secret_key(secret_path) not in refusal(parse_public_key, str(secret_path))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"# nothing but a comment\n",
        b"tsqp-secret-key\n",
        b"tsqp-secret-key short\n",
        b"tsqp-secret-key " + b"0" * 41,
        b"tsqp-secret-key " + b"0" * 39 + b"~",
        b"tsqp-secret-key " + b"0" * 40 + b"\ntsqp-secret-key " + b"0" * 40,
        b"tsqp-secret-key " + b"0" * 40 + b" 0",
        b"-----BEGIN PRIVATE KEY-----\n",
        b"\xff" * 10_000,
        bytes(100),
    ],
    ids=range(11),
)
def test_a_file_without_one_whole_key_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "worker.key"
    path.write_bytes(content)
    path.chmod(0o600)
    assert refusal(read_secret_key, path).startswith(f"{path} holds no secret key of tsqp; make")
    path.write_bytes(content.replace(b"secret", b"public"))
    assert f"{path} holds no public key of tsqp" in refusal(parse_public_key, str(path))


def test_a_key_in_a_file_written_by_hand_is_read(tmp_path: Path) -> None:
    path = tmp_path / "worker.pub"
    path.write_text(f"\n# mine\r\n\r\n  tsqp-public-key\t{'0' * 40}  \n\n# end")
    assert parse_public_key(str(path)) == "0" * 40


@pytest.mark.parametrize("text", ["", "no-such-file", "0" * 39, "~" * 40, "x" * 5000])
def test_what_is_neither_a_key_nor_a_file_is_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "name a file that `tsqp keygen` made, or correct the key" in refusal(
        parse_public_key, text
    )


def test_a_folder_or_nothing_in_the_place_of_a_key_file_is_named(tmp_path: Path) -> None:
    assert f"Cannot read a key from {tmp_path}: Is a dir" in refusal(read_secret_key, tmp_path)
    missing = tmp_path / "worker.key"
    assert f"Cannot read a key from {missing}: No such" in refusal(read_secret_key, missing)


def test_a_path_that_looks_like_a_key_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "k" * 40
    assert is_key(name)
    _, public_path, public = write_key_pair(tmp_path)
    public_path.rename(name)
    assert parse_public_key(name) == public
