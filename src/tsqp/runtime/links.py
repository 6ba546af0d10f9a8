"""Checks that the workers and their links suit the privacy mode."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from tsqp.errors import UsageError
from tsqp.wire.endpoint import Endpoint, parse_endpoint
from tsqp.wire.fixed_segment import FixedPlace, parse_place
from tsqp.wire.keys import parse_public_key

FOR_TESTING = "or pass --insecure-same-host, which is for testing"


@dataclass(frozen=True, slots=True)
class Link:
    """The link to one worker.

    Attributes:
        key: the worker's public key; None for a link that is not encrypted.
        shm_place: the only place where memory may be shared, if there is one.
    """

    endpoint: Endpoint
    key: str | None
    shm_place: FixedPlace | None = None

    @property
    def is_private(self) -> bool:
        """Whether nobody between the two sides can read or change what is sent."""
        return self.key is not None or self.endpoint.is_loopback


def check_links(
    privacy: str,
    workers: Sequence[str],
    keys: Sequence[str | None],
    *,
    insecure: bool,
    insecure_same_host: bool,
    shm_place: FixedPlace | None = None,
) -> tuple[Link, ...]:
    """The links to the workers of a mode, in the order given.

    Args:
        keys: one for each worker, None for a link that is not encrypted; or none at all.

    Raises:
        UsageError: too few or too many workers or keys, or links that do not suit this mode.
    """
    _check_numbers(privacy, len(workers), len(keys))
    each_key = [None if key is None else parse_public_key(key) for key in keys]
    each_key = each_key or [None] * len(workers)
    links = tuple(
        Link(parse_endpoint(worker), key, shm_place)
        for worker, key in zip(workers, each_key, strict=True)
    )
    for link in links:
        if link.key is not None and link.endpoint.scheme not in ("ipc", "tcp"):
            raise UsageError(f"A {link.endpoint} worker has no key; leave --worker-key out.")
    if privacy == "shares" and not insecure_same_host:
        _check_apart(links)
    if privacy != "shares":
        _check_different(links)
    for link in links:
        if privacy != "pad" and not link.is_private and not insecure:
            raise UsageError(
                f"The link to {link.endpoint} is not encrypted, so anyone on its path can read and "
                "change what is sent; give its --worker-key, use a worker on this machine, or pass "
                "--insecure."
            )
    return links


def check_shm_name(name: str | None, privacy: str, shm: bool) -> FixedPlace | None:
    """The only place where memory may be shared; None if `name` is None.

    Args:
        name: the value of --shm-name.
        shm: whether memory may be shared at all.

    Raises:
        UsageError: it is not a place, or does not suit the other options.
    """
    if name is None:
        return None
    if not shm:
        raise UsageError("--shm-name and --no-shm contradict each other; leave one of them out.")
    if privacy == "shares":
        raise UsageError(
            "--shm-name is the place of one worker's memory, and --privacy shares has several "
            "workers; leave it out."
        )
    return parse_place(name)


def _check_numbers(privacy: str, workers: int, keys: int) -> None:
    if privacy == "tee" and workers + keys:
        raise UsageError(
            "--privacy tee has no --worker and no --worker-key; leave them out, or choose pad."
        )
    if privacy == "shares" and workers < 2:
        raise UsageError(
            f"--privacy shares needs two or more --worker, not {workers}, on hosts that do not "
            "share what they receive; with one worker, choose pad."
        )
    if privacy in ("pad", "open") and not workers:
        raise UsageError(
            f"--privacy {privacy} needs one or more --worker, not 0; "
            "name the endpoint of a running `tsqp worker`, or `local`."
        )
    check_number_of_keys(workers, keys)


def check_number_of_keys(workers: int, keys: int) -> None:
    """Raise UsageError unless there is a key for each worker, or none."""
    if keys not in (0, workers):
        raise UsageError(
            f"There are {keys} --worker-key for {workers} --worker; give one for each worker, in "
            "the same order, or none."
        )


def _check_different(links: Sequence[Link]) -> None:
    """A worker that is not to be asked again must not take over from itself."""
    for one, other in combinations(links, 2):
        if _place(one.endpoint) == _place(other.endpoint) and one.endpoint.scheme in ("ipc", "tcp"):
            raise UsageError(
                f"--worker {one.endpoint} is given twice; name each worker once, because the "
                "others take over from one that fails."
            )


def _check_apart(links: Sequence[Link]) -> None:
    """[P8]: only the TEE may see all shares of an input. Checks what the TEE can tell."""
    for link in links:
        if link.endpoint.scheme != "tcp":
            raise UsageError(
                f"--privacy shares needs workers on separate hosts, but {link.endpoint} is on this "
                f"one; give each as tcp://HOST:PORT, {FOR_TESTING}."
            )
        if link.key is None:
            raise UsageError(
                f"The link to {link.endpoint} is not encrypted, and whoever sees all shares can "
                f"add them up; give the --worker-key of every worker, {FOR_TESTING}."
            )
    for one, other in combinations(links, 2):
        if _host(one.endpoint) == _host(other.endpoint):
            raise UsageError(
                f"{one.endpoint} and {other.endpoint} are on the same host, which could add up "
                f"their shares; use hosts that do not share what they receive, {FOR_TESTING}."
            )
        if one.key == other.key:
            raise UsageError(
                f"The workers at {one.endpoint} and {other.endpoint} have the same --worker-key, "
                f"and may be the same worker; run `tsqp keygen` for each, {FOR_TESTING}."
            )


def _place(endpoint: Endpoint) -> tuple[str, str | int]:
    if endpoint.scheme == "tcp":
        return _host(endpoint), endpoint.port
    return endpoint.scheme, endpoint.address


def _host(endpoint: Endpoint) -> str:
    """A normalised host. Names are not resolved, because no resolver is trusted."""
    ip = endpoint.ip
    if ip is not None:
        return "localhost" if ip.is_loopback or ip.is_unspecified else str(ip)
    name = (endpoint.host.rpartition("%")[0] or endpoint.host).lower().rstrip(".")
    is_local = name == "*" or "localhost" in (name.split(".")[0], name.split(".")[-1])
    return "localhost" if is_local else name
