"""A fake kernel and a fake Gramine, which answer the file operations of quotes."""

import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path

from tsqp.tee.attest.attributes import AttributeFiles

TABLE = b"table of certificates"


def fake_snp_report(report_data: bytes) -> bytes:
    return report_data.rjust(0x90, b"\1").ljust(1184, b"\2")


def fake_intel_quote(report_data: bytes, version: int, tee: int) -> bytes:
    """A quote with nothing but what has a fixed place in it."""
    place, size = {0: (320, 384), 0x81: (520, 584)}[tee]
    descriptor = b""
    if version == 5:
        size = 648 if tee else size
        descriptor = struct.pack("<HI", 3 if tee else 1, size)
    body = report_data.rjust(place + 64, b"\3").ljust(size, b"\4")
    header = struct.pack("<HHI", version, 2, tee).ljust(48, b"\5")
    return header + descriptor + body + struct.pack("<I", 100) + bytes([6]) * 100


def fake_tdx_quote(report_data: bytes) -> bytes:
    return fake_intel_quote(report_data, 4, 0x81)


class FakeFiles(AttributeFiles):
    """File operations that fail when told to.

    Attributes:
        fails: errors to raise: the number of times left, by operation and name of the attribute.
        done: the operations so far.
    """

    def __init__(self) -> None:
        self.fails: dict[tuple[str, str], tuple[int, int]] = {}
        self.done: list[tuple[str, str]] = []

    def fail(self, operation: str, name: str, number: int, times: int = 10**6) -> None:
        self.fails[operation, name] = (number, times)

    def step(self, operation: str, name: str) -> None:
        self.done.append((operation, name))
        number, times = self.fails.get((operation, name), (0, 0))
        if times:
            self.fails[operation, name] = (number, times - 1)
            raise OSError(number, os.strerror(number))


class FakeTsm(FakeFiles):
    """configfs-tsm with all its entries in memory.

    Attributes:
        entries: the folders that there are.
        written: what was written to each `inblob`.
        meanwhile: called after each `outblob` was read, with its folder: what others do then.
    """

    def __init__(self, provider: bytes = b"sev_guest\n") -> None:
        super().__init__()
        self.provider = provider
        self.make_blob = fake_tdx_quote if provider == b"tdx_guest\n" else fake_snp_report
        self.entries: dict[Path, tuple[int, bytes]] = {}
        self.written: list[bytes] = []
        self.meanwhile: Callable[[Path], None] = lambda folder: None

    def make(self, folder: Path) -> None:
        self.step("make", "")
        assert folder not in self.entries
        self.entries[folder] = (0, b"")

    def remove(self, folder: Path) -> None:
        self.step("remove", "")
        del self.entries[folder]

    def write(self, path: Path, value: bytes) -> None:
        self.step("write", path.name)
        assert path.name == "inblob"
        self.written.append(value)
        self.ask(path.parent, value)

    def ask(self, folder: Path, value: bytes) -> None:
        self.entries[folder] = (self.entries[folder][0] + 1, value)

    def read(self, path: Path, limit: int) -> bytes:
        self.step("read", path.name)
        generation, inblob = self.entries[path.parent]
        match path.name:
            case "provider":
                return self.provider
            case "generation":
                return b"%d\n" % generation
            case "outblob":
                assert generation > 0
                blob = self.make_blob(inblob)
                self.meanwhile(path.parent)
                return blob
        assert path.name == "auxblob"
        if self.provider != b"sev_guest\n":
            raise FileNotFoundError(errno.ENOENT, "there is none")
        return TABLE


class FakeTsmOnDisk(AttributeFiles):
    """The same in a real folder, for several processes at once: real names, real collisions."""

    def make(self, folder: Path) -> None:
        super().make(folder)
        (folder / "provider").write_text("sev_guest\n")
        (folder / "generation").write_text("0\n")
        (folder / "inblob").write_bytes(b"")

    def write(self, path: Path, value: bytes) -> None:
        super().write(path, value)
        generation = path.parent / "generation"
        generation.write_text(f"{int(generation.read_text()) + 1}\n")
        (path.parent / "outblob").write_bytes(fake_snp_report(path.read_bytes()))
        (path.parent / "auxblob").write_bytes(TABLE)

    def remove(self, folder: Path) -> None:
        for file in folder.iterdir():
            file.unlink()
        super().remove(folder)


class FakeGramine(FakeFiles):
    """/dev/attestation of one process.

    Attributes:
        held: the report data that was written last, by whomever.
        meanwhile: called before each quote is made: what others do then.
    """

    def __init__(self, kind: bytes = b"dcap") -> None:
        super().__init__()
        self.kind = kind
        self.held = bytes(64)
        self.meanwhile: Callable[[], None] = lambda: None

    def read(self, path: Path, limit: int) -> bytes:
        self.step("read", path.name)
        if path.name == "attestation_type":
            return self.kind
        assert path.name == "quote"
        self.meanwhile()
        return fake_intel_quote(self.held, 3, 0)

    def write(self, path: Path, value: bytes) -> None:
        self.step("write", path.name)
        assert path.name == "user_report_data"
        self.held = value
