"""What every HTTP server here does before it serves: it takes an address, and logs no content."""

import logging
import socket

from tsqp.errors import UsageError


def listen(host: str, port: int, backlog: int | None = None) -> socket.socket:
    """A socket that listens for TCP connections.

    Args:
        port: 0 chooses a free one.
        backlog: maximum number of connections that wait to be accepted.

    Raises:
        UsageError: the address cannot be used.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=backlog)
    except OSError as error:
        raise UsageError(f"Cannot listen on --host and --port {port}: {error.strerror}.") from None


def keep_quiet(*names: str) -> None:
    """Let these libraries log nothing that may have been sent: no requests, and no tracebacks."""
    for name in names:
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING)
        logger.addFilter(_without_tracebacks)


def _without_tracebacks(record: logging.LogRecord) -> bool:
    record.exc_info = record.exc_text = None
    return True
