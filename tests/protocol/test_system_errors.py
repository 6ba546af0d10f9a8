"""What the system refuses is named in one sentence, and never passes for a fault of the program."""

import errno
import os

import pytest
import torch
from protocol_helpers import Commands, Main, write_ids

from tsqp.cli.system_errors import describe
from tsqp.errors import OutOfMemory


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EACCES, "change its permissions"),
        (errno.ENOENT, "make it first"),
        (errno.ENOSPC, "free some space"),
        (errno.EROFS, "name another place"),
        (errno.EMFILE, "raise `ulimit -n`"),
        (errno.EIO, ""),
    ],
)
def test_an_error_of_the_system_names_the_file_and_what_to_do(number: int, advice: str) -> None:
    said = str(describe(OSError(number, os.strerror(number), "/some/file")))
    assert said.startswith(f"/some/file: {os.strerror(number)}")
    assert advice in said
    assert said.endswith(".")
    assert str(describe(OSError(number, os.strerror(number)))).startswith(os.strerror(number))


def test_memory_that_is_short_is_named() -> None:
    with pytest.raises(RuntimeError, match="memory") as caught:
        torch.empty(2**60, dtype=torch.int8)
    assert isinstance(describe(caught.value), OutOfMemory)
    assert isinstance(describe(MemoryError()), OutOfMemory)


def test_threads_that_are_short_are_named() -> None:
    assert "`ulimit -u`" in str(describe(RuntimeError("can't start new thread")))


@pytest.mark.parametrize(
    "fault", [ValueError("x"), RuntimeError("x"), KeyError(1), AssertionError()]
)
def test_a_fault_of_ours_is_none_of_them(fault: Exception) -> None:
    assert describe(fault) is None


def test_a_command_shows_a_condition_as_its_one_error(
    main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("tsqp.wire.keys.write_key_pair", fail)
    result = main("keygen", "somewhere")
    assert result.status == 1
    assert result.error == "Too many open files; raise `ulimit -n`."


def test_too_few_open_files_are_named_by_both_sides(commands: Commands) -> None:
    ids = write_ids(commands.folder / "ids.json", [1, 2, 3])
    few = ["sh", "-c", 'ulimit -n 8; exec "$@"', "sh"]
    command = ["generate", "random:tiny", "--worker", "local", "--prompt-ids", ids]
    assert "Too many open files" in commands.run(*command, before=few).error
