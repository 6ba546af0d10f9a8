"""Encrypted files of a model, which are decrypted into our own memory as they are read.

    file    magic, length of the header (4 bytes, little-endian), header (JSON), chunks
    chunk   AES-256-GCM of `chunk_bytes` of the content; the last one may be shorter
    key     HKDF-SHA256 of the model's key, with the salt of the header: see `ModelKey.of_file`
    nonce   number of the chunk (11 bytes, big-endian), then 1 for the last chunk and 0 for others
    data    that each chunk authenticates: SHA-256 of everything before the first chunk

A chunk therefore decrypts only at its own place in its own file. The header has the length of the
content, the name of the file and the names of all files that were encrypted together.
"""

import hashlib
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tsqp.checkpoint.files import BinaryFile
from tsqp.checkpoint.model_key import ModelKey
from tsqp.checkpoint.progress import Counter
from tsqp.errors import CheckpointError

KIND = b"tsqp encrypted "
MAGIC = KIND + b"1"  # with the version
CHUNK_BYTES = 2**16
READ_BYTES = 2**20  # of the file at once
TAG_BYTES = 16
SALT_BYTES = 32
ID_BYTES = 16
MAX_HEADER_BYTES = 2**20  # names of some thousand files
_AFTER_MAGIC = len(MAGIC) + 4


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a file says about itself. All of it is authenticated.

    Attributes:
        salt: of the file's own key.
        check: see `ModelKey.of_file`.
        chunk_bytes: bytes of content in each chunk but the last.
        size: bytes of content.
        name: path in the model's folder; empty for a file that is the whole model.
        model: random; the same in all files that were encrypted together.
        files: the names of these files.
    """

    salt: bytes
    check: bytes
    chunk_bytes: Annotated[int, msgspec.Meta(ge=2**12, le=2**24)]
    size: Annotated[int, msgspec.Meta(ge=0, lt=2**45)]  # AES-GCM has room for more under one key
    name: str
    model: bytes
    files: list[str]

    @property
    def chunks(self) -> int:
        """An empty file has one, which authenticates its header."""
        return max(1, -(-self.size // self.chunk_bytes))


class EncryptedFile(BinaryFile):
    """A file that is decrypted as it is read. Nothing of it is written anywhere.

    Each chunk is authenticated before anything of it is returned, and the header when the file is
    opened.

    Attributes:
        header: authenticated.
        size: bytes of the decrypted content.
    """

    def __init__(self, path: Path, key: ModelKey, name: str = "") -> None:
        """Open the file, and decrypt its first chunk.

        Args:
            name: the name that the file must have been encrypted under.

        Raises:
            CheckpointError: it is not an encrypted file, is damaged, or was encrypted with another
                key, under another name or by another version.
        """
        super().__init__(path)
        try:
            self.header, self._start, self._data = self._read_header()
            file_key, check = key.of_file(self.header.salt)
            if check != self.header.check:
                raise CheckpointError(
                    f"{path} is encrypted with another key than that of --model-key-file."
                )
            self._aes = AESGCM(file_key)
            self._decrypt(0, memoryview(self._read_stored(*self._place(0))))
            if self.header.name != name:
                raise CheckpointError(
                    f"{path} was encrypted as {self.header.name[:200]!a}: give it that name again."
                )
        except BaseException:
            self.close()
            raise
        self.size = self.header.size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with decrypted bytes from `offset` on; safe from several threads.

        Raises:
            CheckpointError: the file was changed, ends first, or cannot be read.
        """
        end, size = offset + len(buffer), self.header.chunk_bytes
        if end > self.size:
            raise CheckpointError(f"{self.path} is cut short: fetch it again.")
        first, last = offset // size, -(-end // size)
        at_once = max(1, READ_BYTES // size)
        for begin in range(first, last, at_once):
            numbers = range(begin, min(begin + at_once, last))
            origin, stop = self._place(begin)[0], self._place(numbers[-1])[1]
            stored = memoryview(self._read_stored(origin, stop))
            for number in numbers:
                low, high = (place - origin for place in self._place(number))
                content = memoryview(self._decrypt(number, stored[low:high]))
                start = number * size
                low, high = max(offset, start), min(end, start + len(content))
                buffer[low - offset : high - offset] = content[low - start : high - start]

    def _read_header(self) -> tuple[Header, int, bytes]:
        """The header, where the first chunk begins, and what each chunk authenticates."""
        magic = self._read_stored(0, min(len(MAGIC), self.size))
        if not magic.startswith(KIND):
            raise CheckpointError(
                f"{self.path} is not encrypted, but --model-key-file was given: encrypt the model "
                "with `tsqp encrypt`, or leave the key out."
            )
        if magic != MAGIC:
            raise CheckpointError(
                f"{self.path} was encrypted by another version of tsqp: encrypt the model again."
            )
        length = self._read_stored(len(MAGIC), min(_AFTER_MAGIC, self.size))
        start = _AFTER_MAGIC + int.from_bytes(length, "little")
        if start > min(self.size, _AFTER_MAGIC + MAX_HEADER_BYTES):
            raise self._changed()
        text = self._read_stored(_AFTER_MAGIC, start)
        try:
            header = msgspec.json.decode(text, type=Header)
        except (msgspec.DecodeError, RecursionError) as exc:
            raise self._changed() from exc
        if self.size != start + header.size + header.chunks * TAG_BYTES:
            raise CheckpointError(f"{self.path} is cut short or too long: fetch it again.")
        return header, start, _data(bytes(magic + length + text))

    def _place(self, number: int) -> tuple[int, int]:
        """Where a chunk begins and ends in the file."""
        header = self.header
        begin = number * header.chunk_bytes
        content = min(header.chunk_bytes, header.size - begin)
        begin += self._start + number * TAG_BYTES
        return begin, begin + content + TAG_BYTES

    def _read_stored(self, begin: int, end: int) -> bytearray:
        """Bytes of the file as they are stored."""
        buffer = bytearray(end - begin)
        super().read_into(begin, memoryview(buffer))
        return buffer

    def _decrypt(self, number: int, chunk: memoryview) -> bytes:
        nonce = _nonce(number, self.header.chunks)
        try:
            return self._aes.decrypt(nonce, chunk, self._data)
        except InvalidTag:
            raise self._changed() from None

    def _changed(self) -> CheckpointError:
        return CheckpointError(
            f"{self.path} was changed after it was encrypted, or is damaged: fetch it again."
        )


def open_file(path: Path, key: ModelKey | None) -> BinaryFile:
    """Open the one file of a model, decrypted if there is a key.

    Raises:
        CheckpointError: it cannot be read; is encrypted and there is no key; or the reverse.
    """
    return open_plain(path) if key is None else EncryptedFile(path, key)


def open_plain(path: Path) -> BinaryFile:
    """Open a file that must not be encrypted.

    Raises:
        CheckpointError: it cannot be read, or is encrypted.
    """
    file = BinaryFile(path)
    try:
        check_plain(path, file.read(0, min(len(KIND), file.size)))
    except BaseException:
        file.close()
        raise
    return file


def check_plain(path: Path, start: bytes) -> None:
    """Raises EncryptedModel if a file that starts with these bytes is encrypted."""
    if start.startswith(KIND):
        raise EncryptedModel(f"{path} is encrypted: give its key with --model-key-file.")


class EncryptedModel(CheckpointError):
    """A file is encrypted, and there is no key."""


def write_encrypted(
    out: BinaryIO,
    key: ModelKey,
    read: Callable[[int, int], bytes],
    size: int,
    *,
    name: str,
    model: bytes,
    files: Sequence[str],
    done: Counter,
) -> None:
    """Encrypt one file.

    Args:
        read: gives bytes of the content, by their offset and number.
        size: bytes of the content.
        name, model, files: see `Header`.
        done: counts the bytes of content.

    Raises:
        CheckpointError: `read` does.
        OSError: `out` cannot be written.
    """
    salt = secrets.token_bytes(SALT_BYTES)
    file_key, check = key.of_file(salt)
    header = Header(salt, check, CHUNK_BYTES, size, name, model, list(files))
    text = msgspec.json.encode(header)
    before = MAGIC + len(text).to_bytes(4, "little") + text
    out.write(before)
    data, aes = _data(before), AESGCM(file_key)
    for number in range(header.chunks):
        begin = number * CHUNK_BYTES
        content = read(begin, min(CHUNK_BYTES, size - begin))
        out.write(aes.encrypt(_nonce(number, header.chunks), content, data))
        done.add(len(content))


def _data(before: bytes) -> bytes:
    """What each chunk authenticates, from everything before the first one."""
    return hashlib.sha256(before).digest()


def _nonce(number: int, chunks: int) -> bytes:
    """Never used twice under one key: each file has its own, and each chunk its number."""
    return number.to_bytes(11, "big") + bytes([number == chunks - 1])
