"""Reads call logs and benchmark results. Every file is untrusted until checked."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from tsqp.errors import ReportError, printable_path
from tsqp.tee.call_lines import FORMAT, CallLine, Header, Summary

MAX_FILE_BYTES = 2**28
MAX_LINE_BYTES = 2**14
BAD_LINES = 3  # maximum of bad lines that are skipped; a file with more is damaged


@dataclass(frozen=True, slots=True)
class LogFile:
    """A call log.

    Attributes:
        name: name of the file, to show.
        summary: None if the log has no last line.
        notes: problems of the file, as sentences.
    """

    name: str
    header: Header
    calls: Sequence[CallLine]
    summary: Summary | None
    notes: Sequence[str]


@dataclass(frozen=True, slots=True)
class BenchFile:
    """A result of `tsqp bench`, as read from its JSON."""

    name: str
    values: dict[str, Any]


class _Version(Struct, frozen=True):
    line: str
    format: int


def read_file(path: Path) -> LogFile | BenchFile:
    """Read a call log or a benchmark result.

    Raises:
        ReportError: the file is neither, is damaged, or has another version.
    """
    text = _read(path)
    if not text.strip():
        raise ReportError(f"{path} is empty; give a call log or a result of `tsqp bench`.")
    first = text.split(b"\n", 1)[0]
    version = _decode_version(first)
    if version is not None:
        return _read_log(path, text, version)
    values = _decode_object(text)
    if values is None or "command" not in values:
        raise ReportError(
            f"{path} is neither a call log of --rpc-log nor a result of `tsqp bench`; give one."
        )
    return BenchFile(path.name, values)


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise ReportError(
            f"There is no file {printable_path(path, 'of that name')}; name a call log, or a "
            "result of `tsqp bench`."
        )
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
    except OSError as exc:
        raise ReportError(f"Cannot read {printable_path(path)}: {exc.strerror}.") from exc
    if len(text) > MAX_FILE_BYTES:
        raise ReportError(
            f"{path} is larger than {MAX_FILE_BYTES} bytes; log a shorter run, or cut the file "
            "after some line."
        )
    return text


def _decode_version(line: bytes) -> int | None:
    """The format version in the first line of a log; None if it is not a log."""
    try:
        version = msgspec.json.decode(line[:MAX_LINE_BYTES], type=_Version)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None
    return version.format if version.line == "header" else None


def _decode_object(text: bytes) -> dict[str, Any] | None:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None


def _read_log(path: Path, text: bytes, version: int) -> LogFile:
    if version != FORMAT:
        raise ReportError(
            f"{path} is a call log of format {version}, and this tsqp reads format {FORMAT}; use "
            "the version that wrote it."
        )
    lines = text.split(b"\n")
    cut = lines.pop()  # empty if the file ends with a whole line
    notes = []
    if cut:
        notes.append(f"{path.name} ends within a line, which was left out.")
    decoded = _Lines(path)
    header = decoded.header(lines[0] if lines else cut)
    calls: list[CallLine] = []
    summary: Summary | None = None
    for number, line in decoded.rest(lines[1:]):
        if isinstance(line, Header):
            raise ReportError(
                f"{path} holds a second log from line {number} on; put each log into its own file."
            )
        if summary is not None:
            raise ReportError(f"{path} continues after its summary line; tsqp did not write it.")
        if isinstance(line, Summary):
            summary = line
        else:
            calls.append(line)
    if decoded.bad:
        numbers = ", ".join(map(str, decoded.bad))
        notes.append(f"{path.name} has bad lines, which were left out: {numbers}.")
    if summary is None:
        notes.append(
            f"{path.name} has no last line: the run did not end as it should, and what this side "
            "did between calls is not known."
        )
    elif summary.dropped:
        notes.append(f"{path.name} lacks {summary.dropped:,} lines that could not be written.")
    return LogFile(path.name, header, calls, summary, notes)


class _Lines:
    """Decodes lines and counts the bad ones."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._decoder: msgspec.json.Decoder[Header | CallLine | Summary] = msgspec.json.Decoder(
            Header | CallLine | Summary
        )
        self.bad: list[int] = []

    def header(self, line: bytes) -> Header:
        found = self._decode(line)
        if not isinstance(found, Header):
            raise ReportError(f"The first line of {self._path} is damaged; log again.")
        return found

    def rest(self, lines: Sequence[bytes]) -> Iterator[tuple[int, Header | CallLine | Summary]]:
        """All valid lines after the first one, each with its line number."""
        for number, line in enumerate(lines, 2):
            found = self._decode(line)
            if found is not None:
                yield number, found
                continue
            self.bad.append(number)
            if len(self.bad) > BAD_LINES:
                numbers = ", ".join(map(str, self.bad))
                raise ReportError(
                    f"{self._path} is damaged, in lines {numbers} at least; log again."
                )

    def _decode(self, line: bytes) -> Header | CallLine | Summary | None:
        if len(line) > MAX_LINE_BYTES:
            return None
        try:
            return self._decoder.decode(line)
        except (msgspec.DecodeError, ValueError, RecursionError):
            return None
