"""Listens for clients of the proxy."""

import asyncio
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from tsqp.api.listening import keep_quiet, listen
from tsqp.client.collateral import read_collateral
from tsqp.client.pin import Verifier
from tsqp.client.policy import read_policy
from tsqp.client.proxy import Proxy
from tsqp.client.verified import Examined, examine
from tsqp.errors import UsageError

log = logging.getLogger("tsqp")

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
SHUTDOWN_S = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyOptions:
    """What a proxy does.

    Attributes:
        url: the server, https://HOST:PORT.
        policy: file of the policy. It is read at each verification, and so is the collateral.
        collateral: files and folders, in addition to the policy's own.
        cacert: see `tls_context`.
        host, port: where to listen; port 0 chooses a free one.
        reverify_s: seconds for which a verification holds.
        api_key: sent to the server in place of what clients send.

    Raises:
        UsageError: a number is out of range.
    """

    url: str
    policy: Path
    collateral: tuple[Path, ...] = ()
    cacert: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8001
    reverify_s: float = 300.0
    api_key: str | None = None

    def __post_init__(self) -> None:
        if not self.reverify_s > 0:
            raise UsageError("--reverify-seconds must be more than 0.")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the proxy."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


class _Uvicorn(uvicorn.Server):
    """A server that leaves signals to us: uvicorn would raise them again at its end."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop(self) -> None:
        """Let running requests end; end at once when called again."""
        self.force_exit = self.should_exit
        self.should_exit = True


def run_proxy(options: ProxyOptions) -> None:
    """Verify the server, then forward requests until SIGINT or SIGTERM.

    Raises:
        UsageError: the URL or the address to listen on cannot be used.
        AttestationError: the policy cannot be used, the server cannot be reached, or it is not
            verified.
    """
    if not options.is_loopback:
        log.warning(
            "Others can reach the proxy%s, and prompts travel to it in clear: listen on 127.0.0.1.",
            " and use your API key" if options.api_key is not None else "",
        )
    with closing(listen(options.host, options.port)) as listener:
        asyncio.run(_serve(options, listener))


async def _serve(options: ProxyOptions, listener: socket.socket) -> None:
    async def look() -> Examined:
        policy = read_policy(options.policy)
        collateral = read_collateral(options.collateral)
        return await examine(options.url, policy, collateral=collateral, cacert=options.cacert)

    keep_quiet("uvicorn", "uvicorn.error", "httpx2", "httpcore2", "asyncio")
    verifier = Verifier(look, options.cacert, options.reverify_s)
    async with verifier.pin():  # a server that is refused now is an error of the command
        pass
    hosts = LOOPBACK | {options.host} if options.is_loopback else None
    config = uvicorn.Config(
        Proxy(verifier, options.api_key, hosts),
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        http="h11",
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    host = f"[{options.host}]" if ":" in options.host else options.host
    log.info("forwarding http://%s:%d/v1", host, listener.getsockname()[1])
    server = _Uvicorn(config)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, server.stop)
    try:
        await server.serve(sockets=[listener])
    finally:
        await verifier.close()
