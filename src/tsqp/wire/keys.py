"""Key pairs of encrypted links, and the text files that hold them.

The worker keeps its secret key in a file that nobody else can read. The TEE needs the
public key. Both keys are 40 characters of Z85. A file has comment lines, and one line with the kind
of the key and the key itself.
"""

import os
from pathlib import Path
from typing import Literal

from tsqp.checkpoint.secret_file import is_open_to_others, write_new_file
from tsqp.errors import TSQPError, UsageError, printable_path
from tsqp.wire.zmq import is_key, new_key_pair

SECRET_FILE = "worker.key"
PUBLIC_FILE = "worker.pub"
MAX_FILE = 4096

Kind = Literal["public", "secret"]

_FILE = """\
# tsqp worker, {kind} key: {advice}
tsqp-{kind}-key {key}
"""
_ADVICE: dict[Kind, str] = {
    "public": "give it to the users of the worker, for --worker-key",
    "secret": "it stays with the worker, for --keyfile; show it to nobody",
}

_WRONG_KIND: dict[Kind, str] = {
    "secret": f"a worker needs the secret one, {SECRET_FILE} of the same pair",
    "public": f"it must not leave the worker, so give the public one, {PUBLIC_FILE} of that pair",
}


def write_key_pair(folder: Path) -> tuple[Path, Path, str]:
    """Make a key pair in `folder`, which is created if it does not exist.

    Returns:
        the secret file, the public file, and the public key.

    Raises:
        UsageError: the folder already holds keys.
        TSQPError: the files cannot be written; neither file is left behind.
    """
    secret_path, public_path = folder / SECRET_FILE, folder / PUBLIC_FILE
    public, secret = new_key_pair()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(secret_path, "secret", secret, 0o600)
        try:
            _write(public_path, "public", public, 0o644)
        except BaseException:
            secret_path.unlink()
            raise
    except FileExistsError as exc:
        raise UsageError(
            f"{exc.filename} already exists and is not overwritten; name another folder."
        ) from exc
    except OSError as exc:
        raise TSQPError(
            f"Cannot write keys to {printable_path(folder, 'that folder')}: {exc.strerror}; name "
            "another folder, or make room."
        ) from exc
    return secret_path, public_path, public


def read_secret_key(path: Path) -> str:
    """Read the secret key from a worker's file.

    Raises:
        UsageError: there is no such file, others can read it, or it holds no secret key.
    """
    return _read(path, "secret")


def parse_public_key(text: str) -> str:
    """Read a public key, given as its 40 characters or as the name of its file.

    Raises:
        UsageError: `text` is neither.
    """
    # A path of 40 characters may look like a key.
    return text if is_key(text) and not Path(text).is_file() else read_public_key(Path(text))


def read_public_key(path: Path) -> str:
    """Read a public key from its file.

    Raises:
        UsageError: there is no such file, or it holds no public key.
    """
    return _read(path, "public")


def _write(path: Path, kind: Kind, key: str, mode: int) -> None:
    content = _FILE.format(kind=kind, advice=_ADVICE[kind], key=key)
    write_new_file(path, content.encode("ascii"), mode)


def _read(path: Path, kind: Kind) -> str:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            content = file.read(MAX_FILE)
    except OSError as exc:
        raise UsageError(
            f"Cannot read a key from {printable_path(path)}: {exc.strerror}; name a file that "
            "`tsqp keygen` made, or correct the key."
        ) from exc
    lines = content.decode("ascii", "replace").splitlines()
    words = [line.split() for line in lines if line.strip() and not line.startswith("#")]
    other: Kind = "public" if kind == "secret" else "secret"
    match words:
        case [[label, key]] if label == f"tsqp-{kind}-key" and is_key(key):
            if kind == "secret" and is_open_to_others(status):
                raise UsageError(
                    f"Other users have access to the secret key in {path}; run `chmod 600 {path}`, "
                    "and make a new pair if anyone may have read it."
                )
            return key
        case [[label, _]] if label == f"tsqp-{other}-key":
            raise UsageError(f"{path} holds a {other} key; {_WRONG_KIND[kind]}.")
    raise UsageError(f"{path} holds no {kind} key of tsqp; make a pair with `tsqp keygen`.")
