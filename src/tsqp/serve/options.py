"""The options of the HTTP server, checked once."""

import hashlib
import ipaddress
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tsqp.errors import AttestationError, UsageError, printable_path
from tsqp.runtime.admission import share
from tsqp.serve.tools import tool_style
from tsqp.tee.attest.provider import CHOICES

MAX_BODY = 4 * 2**20
CONNECTIONS = 512
SPARE_CONNECTIONS = 64  # for /health and the like, where all others wait for answers


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How the server listens, and what it lets in.

    Attributes:
        host, port: where it listens.
        uds: a Unix socket to listen on instead.
        api_keys: what clients must send; without any, everybody is let in.
        served_model_names: names of the model in requests and answers, the first in answers.
        max_model_len: a lower maximum number of tokens of prompt and answer than the model's.
        max_num_seqs: maximum number of answers that run at the same time.
        max_num_queued_reqs: maximum number of answers that wait.
        ssl_certfile, ssl_keyfile: PEM files for TLS.
        attest: which platform gives evidence for attested TLS, "auto" or "simulated"; None for a
            server without evidence.
        broker_url, broker_key: a key broker, and SHA-256 of its TLS key; see `serve.secrets`.
        fetch_model_key, fetch_api_keys: names of the broker's secrets that this process fetches.
        receipts: whether each answer comes with a signed receipt.
        root_path: the path under which a reverse proxy shows the server.
        tool_call_parser: how the model writes tool calls; None to see it in the chat template.
        shutdown_timeout: seconds that running requests get after SIGTERM.
        show_worker_view: whether clients may see a sample of what workers received for them.
        max_body_bytes: of one request.
        body_timeout: seconds in which a request's body must arrive.
        max_connections: maximum number of connections; None for 512, or more if more answers may
            run and wait.
        header_timeout: seconds in which the header of a request must arrive, and a TLS handshake.
        send_timeout: seconds in which a client must take more of what is sent to it.

    Raises:
        UsageError: a value is out of range, or values contradict each other.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: Path | None = None
    api_keys: Sequence[str] = ()
    served_model_names: Sequence[str] = ()
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_queued_reqs: int = 256
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    attest: str | None = None
    broker_url: str | None = None
    broker_key: str | None = None
    fetch_model_key: str | None = None
    fetch_api_keys: str | None = None
    receipts: bool = False
    root_path: str = ""
    tool_call_parser: str | None = None
    shutdown_timeout: float = 30.0
    show_worker_view: bool = False
    max_body_bytes: int = MAX_BODY
    body_timeout: float = 30.0
    max_connections: int | None = None
    header_timeout: float = 10.0
    send_timeout: float = 30.0

    def __post_init__(self) -> None:
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise UsageError("TLS needs both --ssl-certfile and --ssl-keyfile.")
        for name, path in (
            ("--ssl-certfile", self.ssl_certfile),
            ("--ssl-keyfile", self.ssl_keyfile),
        ):
            if path is not None and not os.access(path, os.R_OK):
                raise UsageError(f"The file of {name} cannot be read.")
        if self.attest not in (None, *CHOICES):
            raise UsageError("--attest takes auto or simulated, or no value.")
        if self.attest is not None and self.ssl_certfile is not None:
            raise UsageError(
                "--attest makes its own key and certificate, so that the key never leaves this "
                "process: leave --ssl-certfile and --ssl-keyfile out."
            )
        if self.receipts and self.attest is None:
            raise UsageError("--receipts needs --attest, which makes the key that signs them.")
        self._check_broker()
        if not 0 <= self.port < 65536:
            raise UsageError("--port must be from 0 to 65535; 0 chooses a free port.")
        if self.max_num_seqs < 1 or self.max_num_queued_reqs < 0:
            raise UsageError(
                "--max-num-seqs must be 1 or more, and --max-num-queued-reqs 0 or more."
            )
        if self.max_connections is not None and self.max_connections < 1:
            raise UsageError("--max-connections must be 1 or more.")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise UsageError("--max-model-len must be 2 or more.")
        if not 0 <= self.shutdown_timeout < 86400:
            raise UsageError("--shutdown-timeout must be a number of seconds, at most a day.")
        if not all(key.isascii() and key.isprintable() and key.strip() for key in self.api_keys):
            raise UsageError(
                "An API key must be printable ASCII characters; the key itself is not shown."
            )
        tool_style(None, self.tool_call_parser)
        if self.root_path and not self.root_path.startswith("/"):
            raise UsageError("--root-path must begin with a slash.")

    def _check_broker(self) -> None:
        from tsqp.api.key_release import broker_address, check_name, parse_broker_key

        names = [each for each in (self.fetch_model_key, self.fetch_api_keys) if each is not None]
        given = (self.broker_url is not None, self.broker_key is not None, bool(names))
        if len(set(given)) > 1:
            raise UsageError(
                "A key broker needs --broker-url, --broker-key, and --fetch-model-key or "
                "--fetch-api-keys."
            )
        if self.broker_url is None or self.broker_key is None:
            return
        if self.attest is None:
            raise UsageError("--broker-url needs --attest: the broker gives secrets for evidence.")
        try:
            for name in names:
                check_name(name)
        except AttestationError as error:
            raise UsageError(str(error)) from None
        broker_address(self.broker_url)
        object.__setattr__(self, "broker_key", parse_broker_key(self.broker_key).hex())

    @property
    def most_answers(self) -> int:
        """Maximum number of answers of one request."""
        waiting = self.max_num_queued_reqs
        return self.max_num_seqs + (share(waiting) if self.is_shared and waiting else waiting)

    @property
    def most_connections(self) -> int:
        """Maximum number of connections."""
        if self.max_connections is not None:
            return self.max_connections
        return max(CONNECTIONS, self.max_num_seqs + self.max_num_queued_reqs + SPARE_CONNECTIONS)

    @property
    def is_shared(self) -> bool:
        """Whether there are several keys, whose holders share the queue."""
        return len(self.api_keys) > 1

    @property
    def has_tls(self) -> bool:
        """Whether clients connect by TLS."""
        return self.ssl_certfile is not None or self.attest is not None

    @property
    def exposure(self) -> str:
        """A sentence if other machines can reach the server and it is not protected; or empty."""
        if self.uds is not None or _is_loopback(self.host):
            return ""
        missing = []
        if not self.has_tls:
            missing.append("without TLS, so prompts and answers travel in clear")
        if not self.api_keys:
            missing.append("without API keys, so everybody may use it")
        if not missing:
            return ""
        return f"The server can be reached from other machines {', and '.join(missing)}."


def read_api_keys(given: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """All API keys, each once.

    Args:
        given: those of --api-key, which other users can see in the list of processes, or of
            TSQP_API_KEY.
        file: has one key a line.

    Raises:
        UsageError: the file cannot be read, holds no key, or may be read by everybody.
    """
    keys = list(given)
    if file is not None:
        name = printable_path(file, "the file of --api-key-file")
        try:
            mode = file.stat().st_mode
            found = split_api_keys(file.read_text(encoding="utf-8"), name)
        except (OSError, ValueError):
            raise UsageError(f"Cannot read API keys from {name}.") from None
        if stat.S_ISREG(mode) and mode & stat.S_IROTH:
            raise UsageError(f"Everybody may read the API keys in {name}: run chmod 600 on it.")
        keys += found
    return tuple(dict.fromkeys(keys))


def split_api_keys(text: str, where: str) -> list[str]:
    """The API keys in a text, one a line. Raises UsageError if there is none."""
    if not (found := text.split()):
        raise UsageError(f"There is no API key in {where}; write one a line.")
    return found


def tenant_of(key: str) -> str:
    """A name for the holder of a key, which does not tell the key."""
    return hashlib.sha256(f"tsqp tenant {key}".encode()).hexdigest()[:32]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
