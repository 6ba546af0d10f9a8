"""Threads that work for several tenants in turn."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")

_Work = tuple[Future[Any], Callable[[], Any]]


class FairPool:
    """A pool of threads whose work is taken from one tenant after the other.

    The work of one tenant is done in the order in which it came. Work that is cancelled before it
    began is forgotten at once, with all that it holds.

    Args:
        threads: maximum number of threads.
        name: what their names begin with.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._free = threads  # how many threads have nothing to do
        self._lock = threading.Lock()
        self._waiting: dict[str, deque[_Work]] = {}  # by tenant, in the order of their turns

    def submit(self, tenant: str, work: Callable[[], T]) -> Future[T]:
        """Have some work done in the turn of a tenant; any thread may call this.

        Raises:
            RuntimeError: the pool is shut down.
        """
        future: Future[T] = Future()
        with self._lock:
            if self._free:
                self._pool.submit(self._run)
                self._free -= 1
            self._waiting.setdefault(tenant, deque()).append((future, work))
        future.add_done_callback(partial(self._forget, tenant))
        return future

    def shutdown(self) -> None:
        """Do what waits, and end the threads."""
        self._pool.shutdown()

    def _run(self) -> None:
        while (item := self._next()) is not None:
            future, work = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = work()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            del item, future, work

    def _next(self) -> _Work | None:
        """The next work of the tenant whose turn it is; None, and the thread is free, without."""
        with self._lock:
            if not self._waiting:
                self._free += 1
                return None
            tenant = next(iter(self._waiting))
            line = self._waiting.pop(tenant)
            item = line.popleft()
            if line:
                self._waiting[tenant] = line  # at the end: the others have their turn
            return item

    def _forget(self, tenant: str, future: Future[Any]) -> None:
        if not future.cancelled():
            return
        with self._lock:
            line = self._waiting.get(tenant, deque())
            with suppress(StopIteration):
                line.remove(next(item for item in line if item[0] is future))
                if not line:
                    del self._waiting[tenant]
