"""The key of encrypted models, and the text file that holds it.

The file has comment lines, and one line with the kind of the key and 32 bytes as hexadecimal
digits. One key may be used for any number of models: each file is encrypted under a key of its own,
which is derived from this one.
"""

import os
import re
import secrets
from pathlib import Path

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tsqp.checkpoint.secret_file import is_open_to_others, write_new_file
from tsqp.errors import UsageError, printable_path

KEY_BYTES = 32
CHECK_BYTES = 16
MAX_FILE = 4096

_FILE = """\
# tsqp, key of encrypted models: whoever has it can read them
tsqp-model-key {key}
"""
_LINE = re.compile(rf"tsqp-model-key ([0-9a-f]{{{2 * KEY_BYTES}}})")
_LABEL = b"tsqp encrypted model file 1"


class ModelKey:
    """A key of 32 bytes. It has no text form, so that no message or log can show it."""

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        assert len(secret) == KEY_BYTES
        self._secret = secret

    def of_file(self, salt: bytes) -> tuple[bytes, bytes]:
        """The AES-256 key of the file with this salt, and 16 bytes that show which key it is.

        The 16 bytes are public. They reveal nothing about either key.
        """
        derived = HKDF(SHA256(), KEY_BYTES + CHECK_BYTES, salt, _LABEL).derive(self._secret)
        return derived[:KEY_BYTES], derived[KEY_BYTES:]


def read_model_key(path: str | Path) -> ModelKey:
    """Read a key from its file.

    Raises:
        UsageError: there is no such file, others can read it, or it holds no key of models.
    """
    try:
        with Path(path).open("rb") as file:
            status = os.fstat(file.fileno())
            content = file.read(MAX_FILE)
    except OSError as exc:
        raise UsageError(
            f"Cannot read the model's key from {printable_path(path)}: {exc.strerror}."
        ) from exc
    key = parse_model_key(content, printable_path(path))
    if is_open_to_others(status):
        raise UsageError(
            f"Other users have access to the key in {path}; run `chmod 600 {path}`, and encrypt "
            "the model with a new key if anyone may have read it."
        )
    return key


def parse_model_key(content: bytes, what: str) -> ModelKey:
    """Read a key from the content of its file.

    Args:
        what: names the content in errors, at the beginning of a sentence.

    Raises:
        UsageError: it is not the key of a model.
    """
    lines = content.decode("ascii", "replace").splitlines()
    found = [_LINE.fullmatch(line.strip()) for line in lines if line and line[0] != "#"]
    if len(found) != 1 or found[0] is None:
        raise UsageError(f"{what} does not hold the key of a model; `tsqp encrypt` makes one.")
    return ModelKey(bytes.fromhex(found[0][1]))


def new_model_key(path: Path) -> ModelKey:
    """Make a key and write it to a new file that only this user may read.

    Raises:
        UsageError: the file exists, or cannot be written.
    """
    secret = secrets.token_bytes(KEY_BYTES)
    try:
        write_new_file(path, _FILE.format(key=secret.hex()).encode())
    except OSError as exc:
        raise UsageError(f"Cannot write a key to {printable_path(path)}: {exc.strerror}.") from exc
    return ModelKey(secret)
