"""How much memory this process may still use."""

import ctypes
from pathlib import Path

import psutil

CGROUP_ROOT = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def available_bytes() -> int:
    """The smaller of what the machine has free and what the control groups still allow."""
    return min([int(psutil.virtual_memory().available), *_cgroup_headrooms()])


def give_back() -> None:
    """Return freed memory to the system, if the C library can.

    By itself, the C library keeps the gaps that short-lived tensors leave between long-lived ones.
    These gaps grow with the model.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _cgroup_headrooms() -> list[int]:
    """Limit minus usage of this process's memory control groups (v2 and v1), ancestors included.

    Page cache that can be dropped at once is not usage: reading a checkpoint fills it.
    """
    headrooms = []
    for folder, limit_name, usage_name, cache_key in _memory_cgroups():
        limit, usage = _number(folder / limit_name), _number(folder / usage_name)
        if limit is not None and usage is not None:
            headrooms.append(max(0, limit - usage + _inactive_file(folder, cache_key)))
    return headrooms


def _memory_cgroups() -> list[tuple[Path, str, str, str]]:
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:  # not Linux, or an enclave without this file
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        relative = Path(path.lstrip("/"))
        if controllers == "":
            names = ("memory.max", "memory.current", "inactive_file")
            folder = CGROUP_ROOT / relative
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            folder = CGROUP_ROOT / "memory" / relative
        else:
            continue
        ancestors = [folder, *folder.parents]
        found += [(f, *names) for f in ancestors if f.is_relative_to(CGROUP_ROOT)]
    return found


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None  # "max" means no limit


def _inactive_file(folder: Path, key: str) -> int:
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key} ")), 0)
