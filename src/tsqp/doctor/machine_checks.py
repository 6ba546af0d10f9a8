"""Checks of this machine: whether TSQP runs well on it, and whether it is a TEE."""

import os
import resource
from collections.abc import Callable
from pathlib import Path

import torch

from tsqp.algebra.int8_product import fast_product_is_exact
from tsqp.bench.hardware_limits import int8_ops
from tsqp.checkpoint.memory import available_bytes
from tsqp.doctor.check import Wrong
from tsqp.errors import WorkerUnavailable
from tsqp.wire.shm import MIN_SEGMENT, SHM_FOLDER, SealedSegment

CPUINFO = Path("/proc/cpuinfo")
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
GRAMINE = Path("/dev/attestation/attestation_type")
TEE_DEVICES = {"Intel TDX": Path("/dev/tdx_guest"), "AMD SEV-SNP": Path("/dev/sev-guest")}

SIMD = {  # CPU features that speed up int8 and bfloat16 products: name in /proc/cpuinfo
    "amx_int8": "AMX",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX VNNI",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
}
WANTED_SHM = 2**27  # with the 64 MiB default of containers, calls are split
MIN_MEMORY = 2**30
MIN_FILES = 128
GIB = 2**30


def machine_checks(threads: int | None) -> list[tuple[str, Callable[[], str]]]:
    """Name and function of each check, in order.

    Args:
        threads: number of threads that the user wants; None for the default of torch.
    """
    return [
        ("processor", processor),
        ("threads", lambda: threads_fit(torch.get_num_threads() if threads is None else threads)),
        ("memory", memory),
        ("shared memory", shared_memory),
        ("limits", limits),
        ("TEE", tee),
        ("torch", gpu),
        ("int8 products", int8_products),
    ]


def cores() -> int:
    """Number of cores that this process may use, by its CPU affinity and its cgroup quota."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = CPU_QUOTA.read_text().split()
        return allowed if quota == "max" else max(1, min(allowed, int(quota) // int(period)))
    except (OSError, ValueError):  # no control groups, or version 1
        return allowed


def processor() -> str:
    """The number of cores, and the CPU features that matter."""
    try:
        flags = set(CPUINFO.read_text().split())
    except OSError:
        flags = set()
    known = [name for flag, name in SIMD.items() if flag in flags]
    load = os.getloadavg()[0]
    busy = f"; {load:.1f} of them busy in the last minute" if load >= 1 else ""
    return f"{cores()} cores, {known[0] if known else 'no AVX2'}{busy}"


def threads_fit(threads: int) -> str:
    """Whether there are no more threads than cores, and OpenMP threads do not spin."""
    if threads > cores():
        raise Wrong(
            f"{threads} threads would share {cores()} cores, and wait for each other; pass "
            f"--threads {cores()}, or set OMP_NUM_THREADS to it."
        )
    policy = os.environ.get("OMP_WAIT_POLICY", "passive")
    if policy.lower() != "passive":
        raise Wrong(
            f"OMP_WAIT_POLICY is {policy}, so idle threads take the cores that the worker and the "
            "TEE need; unset it."
        )
    return f"{threads} for computing"


def memory() -> str:
    """The memory that is still available to this process."""
    free = available_bytes()
    if free < MIN_MEMORY:
        raise Wrong(f"Only {free / GIB:.1f} GiB of memory are free; free some before you start.")
    return f"{free / GIB:.1f} GiB free"


def shared_memory(folder: Path = SHM_FOLDER) -> str:
    """Whether memory can be shared with a worker, so that tensors need not go through a socket."""
    try:
        SealedSegment.create(MIN_SEGMENT).close()
    except WorkerUnavailable:
        pass  # segments are then files, which need the checks below
    else:
        return "sealed memory"
    if not folder.is_dir():
        raise Wrong(f"There is no {folder}, so tensors would go through the socket; mount a tmpfs.")
    if not os.access(folder, os.W_OK):
        raise Wrong(f"{folder} cannot be written, so tensors would go through the socket.")
    found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    if free < WANTED_SHM:
        raise Wrong(
            f"{folder} has {free / 2**20:.0f} MiB free, and calls are cut into pieces below "
            f"{WANTED_SHM // 2**20}; give the container more (--shm-size=1g), or remount it."
        )
    return f"{free / GIB:.1f} GiB free in {folder}"


def limits() -> str:
    """The limits of the operating system on one process."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= files < MIN_FILES:
        raise Wrong(f"This process may open {files} files; raise the limit (ulimit -n 1024).")
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY:
        raise Wrong(
            f"Address space is limited to {space / GIB:.1f} GiB, which mapped files and shared "
            "memory use up early; lift the limit (ulimit -v unlimited)."
        )
    return f"{'any number of' if files < 0 else files} open files"


def tee() -> str:
    """The kind of trusted execution environment, if this is one."""
    try:
        return f"Gramine, attestation {GRAMINE.read_text().strip()}"
    except OSError:
        kinds = [name for name, device in TEE_DEVICES.items() if device.exists()]
    if not kinds:
        return "none: whoever controls this machine can read prompts and answers"
    return f"{kinds[0]} guest"


def gpu() -> str:
    """The version of torch and the GPUs that it sees."""
    if not torch.cuda.is_available():
        return f"{torch.__version__}, no CUDA device"
    names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    return f"{torch.__version__}, {', '.join(names)}"


def int8_products() -> str:
    """The int8 product, which a CPU worker [P9] and the pads [P4] use."""
    if not fast_product_is_exact():
        raise Wrong(
            "torch._int_mm is not exact on this processor, so the private modes multiply in "
            "float64, many times slower; use a processor with AVX-512 VNNI, AVX VNNI or AMX."
        )
    return f"torch._int_mm is exact, {int8_ops() / 1e12:.2f} T operations/s"
