"""The effective configuration of a server, which its evidence binds and shows.

It has every option after defaults, the environment variables that are kept, and the code. A new
option is in it without further ado: only what stands in `_SHOWN` is changed or left out.
It is public, so it holds no secret, and nothing from which a weak secret could be guessed.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tsqp.api.evidence import canonical_json
from tsqp.errors import UsageError
from tsqp.runtime.environment import measured_variables
from tsqp.runtime.installed_code import installed_code
from tsqp.runtime.links import Link
from tsqp.runtime.options import WORKER_HINTS, Options
from tsqp.serve.options import ServeOptions

MAX_BYTES = 24 * 2**10
LEFT_OUT: Any = object()


def effective_configuration(
    options: Options, served: ServeOptions, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Everything besides the model that decides what the server does.

    Raises:
        UsageError: it is too long to be served.
    """
    found = {
        "command": "serve",
        "options": _fields(options),
        "server": _fields(served),
        "environment": measured_variables(environment),
        "code": installed_code(),
    }
    if len(canonical_json(found)) > MAX_BYTES:
        raise UsageError(
            f"The configuration has more than {MAX_BYTES} bytes, so evidence cannot hold it: "
            "shorten environment variables such as PATH."
        )
    return found


def _fields(given: Options | ServeOptions) -> dict[str, Any]:
    values = {each.name: getattr(given, each.name) for each in dataclasses.fields(given)}
    shown = {name: _SHOWN.get(name, _plain)(value) for name, value in values.items()}
    return {name: value for name, value in shown.items() if value is not LEFT_OUT}


def _plain(value: Any) -> Any:
    """A value as JSON has it. One of another type needs an entry of its own in `_SHOWN`."""
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    assert value is None or isinstance(value, bool | int | float | str), type(value)
    return value


def _links(links: tuple[Link, ...]) -> list[dict[str, str | None]]:
    """How the workers are reached, and whom their keys belong to.

    Addresses are left out: they may be private, and the network, which is not trusted, decides
    where they lead. The key decides who can answer.
    """
    return [{"scheme": link.endpoint.scheme, "key": link.key} for link in links]


def _is_given(value: object) -> bool:
    return value is not None


def _hints(value: Path | str | None) -> str | None:
    """Hints are checked wherever they come from, so the file's name does not matter."""
    return "file" if value not in (None, WORKER_HINTS) else None if value is None else WORKER_HINTS


_SHOWN: dict[str, Callable[[Any], Any]] = {
    "links": _links,
    "worker": lambda _: LEFT_OUT,  # both are in `links`
    "worker_key": lambda _: LEFT_OUT,
    "workers_file": _is_given,  # whether workers come and go; the first ones are in `links`
    "shm_place": lambda _: LEFT_OUT,  # what `shm_name` means
    "hints": _hints,
    "model_key_file": _is_given,
    "model_key": _is_given,
    "broker_url": _is_given,  # as of workers: the key decides who can answer
    "rpc_log": _is_given,
    "uds": _is_given,
    "ssl_certfile": _is_given,
    "ssl_keyfile": _is_given,
    "api_keys": len,  # a hash of a weak key would let anybody guess it
}
