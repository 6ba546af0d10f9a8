"""For every test: how processes start (`processes`), no time limits, and nothing left unclosed."""

import contextlib
import gc
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

import processes

# A busy machine makes no test fail.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# A shell starts what runs in its background with Ctrl-C ignored, and all processes inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config) -> None:
    """Let pytest-xdist's own processes be forks of one server, which starts all others, too."""
    from execnet import gateway_io

    def start(self: Any, command: Sequence[str], execmodel: Any) -> None:
        interpreter, unbuffered, *arguments = command
        assert unbuffered == "-u"
        self.popen = processes.start(
            [interpreter, *arguments], stdin=processes.PIPE, stdout=processes.PIPE
        )
        gateway_io.Popen2IO.__init__(self, self.popen.stdin, self.popen.stdout, execmodel)

    gateway_io.Popen2IOMaster.__init__ = start
    processes.server()
    if not sys.dont_write_bytecode:
        _rewrite(config)  # while the server loads


def _rewrite(config: pytest.Config) -> None:
    """Write what pytest makes of files of tests, so that its processes need not make it again."""
    from _pytest.assertion import rewrite

    state = config.stash[rewrite.assertstate_key]
    for argument in config.args:
        named = config.invocation_params.dir / argument.partition("::")[0]
        for path in [named] if named.is_file() else named.rglob("test_*.py"):
            written = rewrite.get_cache_dir(path) / (path.name[:-3] + rewrite.PYC_TAIL)
            if rewrite._read_pyc(path, written) is None and rewrite.try_makedirs(written.parent):
                source_hash, code = rewrite._rewrite_test(path, config)
                rewrite._write_pyc(state, code, source_hash, written)


def pytest_collection_finish() -> None:
    """Spare later collections what was imported: it stays to the end anyway."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def _collect() -> Iterator[None]:
    """Collect after each file, so that what it left unclosed fails its own tests, no others.

    What is left then is in use, and later collections need not look at it.
    """
    yield
    gc.collect()
    gc.freeze()


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
