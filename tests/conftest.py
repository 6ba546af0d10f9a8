"""How processes start, for every test: see `processes`."""

import contextlib
from collections.abc import Iterator

import pytest

import processes


@pytest.fixture(scope="session", autouse=True)
def _local_workers_are_forks() -> Iterator[None]:
    from tsqp.runtime import local_worker

    before = processes.fork_local_workers()
    yield
    local_worker.subprocess = before


@pytest.fixture(autouse=True)
def _fresh(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let the processes of tests that are marked `fresh` start from nothing."""
    is_fresh = request.node.get_closest_marker("fresh") is not None
    with processes.from_nothing() if is_fresh else contextlib.nullcontext():
        yield
