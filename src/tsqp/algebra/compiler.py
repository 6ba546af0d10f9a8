"""Imports numba with its default settings, whatever the working folder contains.

numba reads `.numba_config.yaml` in the working folder and NUMBA_* variables, when it is imported
and again for each function that it compiles. They can turn compiling off, add checks and debug
output, write files, and change the instructions in use. The loops over secrets must not depend on
them, and the working folder may be that of a downloaded model.
"""

import os
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any


@cache
def numba() -> Any:
    """numba, imported when it is first needed. All its settings stay at their defaults."""
    with _without_yaml(), _without_variables(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numba says so if it cannot read the file
        import numba
    settings: Any = numba.core.config
    # Against later changes of variables, and in case another module has imported numba before.
    settings._env_reloader.process_environ({})
    settings._env_reloader.update = lambda: None
    codegen: Any = numba.core.codegen
    settings.CPU_FEATURES = _cpu_features(codegen.get_host_cpu_features())
    return numba


def _cpu_features(default: str) -> str:
    """The features of this processor that LLVM uses, with vectors of 512 bits if it has them.

    LLVM prefers 256 bits for most processors, because the first ones with AVX-512 slowed down when
    they used it. The loops here run for long, and recent processors run them up to twice as fast.
    """
    return default + ",-prefer-256-bit" if "+avx512f" in default.split(",") else default


class _NoYaml:
    """Stops one thread from importing yaml. Without yaml, numba does not read its file."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> None:
        if name == "yaml" and threading.get_ident() == self._thread:
            raise ModuleNotFoundError(name)


@contextmanager
def _without_yaml() -> Iterator[None]:
    """yaml cannot be imported by this thread, even if it has been already."""
    loaded = sys.modules.pop("yaml", None)
    finder: Any = _NoYaml()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        if loaded is not None:
            sys.modules["yaml"] = loaded


@contextmanager
def _without_variables() -> Iterator[None]:
    """No NUMBA_* variables: one of them makes numba write a file when the process ends."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("NUMBA_")}
    try:
        yield
    finally:
        os.environ.update(hidden)
