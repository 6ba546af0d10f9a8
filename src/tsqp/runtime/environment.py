"""The environment variables that an attested server keeps, all of which are measured.

A variable can change what a library does, so none may stay unmeasured; but the values of variables
that nobody knows may be secrets of somebody else, and a hash of a short secret gives it away. So
the variables below are kept, and evidence shows their values. All others are removed before the
libraries that could read them are loaded.
"""

from collections.abc import Mapping, MutableMapping

# Places, locale and time zone. HOME is where Python looks for packages of the user.
_NAMES = {
    "HOME", "LANG", "LANGUAGE", "PATH", "TMPDIR", "TSQP_CACHE", "TZ", "VIRTUAL_ENV",
    "XDG_CACHE_HOME",
}  # fmt: skip
# The dynamic linker, the C library, Python, and what computes.
_PREFIXES = (
    "ATEN_", "CUDA_", "DNNL_", "GLIBC_", "GOMP_", "KMP_", "LC_", "LD_", "MALLOC_", "MKL_", "NUMBA_",
    "NVIDIA_", "OMP_", "ONEDNN_", "OPENBLAS_", "PYTHON", "PYTORCH_", "TORCH_",
)  # fmt: skip
# Options and API keys. What they set is measured as the server's options, without secrets.
_OPTIONS = ("TSQP_", "LLAMA_")


def keep_known(environment: MutableMapping[str, str]) -> int:
    """Remove all variables that are not known; returns how many there were."""
    unknown = [name for name in environment if not _is_measured(name) and not _is_option(name)]
    for name in unknown:
        del environment[name]
    return len(unknown)


def measured_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that are shown in evidence, as valid Unicode."""
    return {
        name: value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        for name, value in environment.items()
        if _is_measured(name)
    }


def _is_measured(name: str) -> bool:
    return name in _NAMES or name.startswith(_PREFIXES)


def _is_option(name: str) -> bool:
    return name.startswith(_OPTIONS)
