"""Helpers of the tests of call logs: short greedy answers, and logs that must be whole."""

from pathlib import Path

from tsqp import SamplingParams
from tsqp.report.read import LogFile, read_file


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


def read(path: Path) -> LogFile:
    """A log that is whole."""
    log = read_file(path)
    assert isinstance(log, LogFile)
    assert log.notes == []
    assert log.summary is not None
    return log
