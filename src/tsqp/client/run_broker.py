"""Listens for TEEs that ask for secrets."""

import hashlib
import logging
import ssl
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tsqp.api.key_release import MAX_SECRET, check_name
from tsqp.api.listening import keep_quiet, listen
from tsqp.client.key_broker import Broker, broker_app
from tsqp.client.policy import read_policy
from tsqp.errors import AttestationError, UsageError, printable_path

log = logging.getLogger("tsqp")

MAX_CONNECTIONS = 64
KEEP_ALIVE_S = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerOptions:
    """How a broker listens. Its certificate identifies it to the TEEs.

    Attributes:
        secrets: NAME=FILE for each secret.
        ssl_certfile, ssl_keyfile: PEM files.
    """

    policy: Path
    collateral: tuple[Path, ...]
    secrets: tuple[str, ...]
    host: str
    port: int
    ssl_certfile: Path
    ssl_keyfile: Path


def run_broker(options: BrokerOptions) -> None:
    """Give out secrets until SIGINT or SIGTERM.

    Raises:
        UsageError: a file cannot be read, or the address cannot be used.
        AttestationError: the policy cannot be used.
    """
    policy = read_policy(options.policy)
    if policy.allow_simulated:
        log.warning("The policy has allow_simulated, so ANYBODY can get the secrets.")
    secrets = read_secrets(options.secrets)
    broker = Broker(policy=options.policy, collateral=options.collateral, secrets=secrets)
    keep_quiet("uvicorn", "uvicorn.error", "asyncio")
    config = uvicorn.Config(
        broker_app(broker),
        ssl_certfile=options.ssl_certfile,
        ssl_keyfile=options.ssl_keyfile,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        http="h11",
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_S,
    )
    key = _key_digest(options.ssl_certfile)
    try:
        config.load()
    except (OSError, ssl.SSLError):
        raise UsageError(
            "The certificate cannot be used: check --ssl-certfile and --ssl-keyfile."
        ) from None
    with closing(listen(options.host, options.port)) as listener:
        log.info(
            "giving %d secrets at https://%s:%d; --broker-key %s",
            len(secrets), options.host, listener.getsockname()[1], key,
        )  # fmt: skip
        uvicorn.Server(config).run(sockets=[listener])


def read_secrets(given: tuple[str, ...]) -> dict[str, bytes]:
    """The secrets of NAME=FILE, by name.

    Raises:
        UsageError: a name is wrong or occurs twice, or a file is empty, too long or unreadable.
    """
    found: dict[str, bytes] = {}
    for each in given:
        name, _, path = each.partition("=")
        try:
            check_name(name)
        except AttestationError as error:
            raise UsageError(str(error)) from None
        if name in found or not path:
            raise UsageError("--secret takes NAME=FILE, with another NAME each time.")
        try:
            with Path(path).open("rb") as file:
                secret = file.read(MAX_SECRET + 1)
        except OSError as error:
            raise UsageError(f"Cannot read {printable_path(path)}: {error.strerror}.") from None
        if not 0 < len(secret) <= MAX_SECRET:
            raise UsageError(f"{printable_path(path)} must have 1 to {MAX_SECRET:,} bytes.")
        found[name] = secret
    if not found:
        raise UsageError("There is nothing to give: name secrets with --secret NAME=FILE.")
    return found


def _key_digest(certfile: Path) -> str:
    try:
        certificate = x509.load_pem_x509_certificate(certfile.read_bytes())
    except (OSError, ValueError):
        raise UsageError(f"{printable_path(certfile)} is not a certificate in PEM.") from None
    form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(certificate.public_key().public_bytes(*form)).hexdigest()
