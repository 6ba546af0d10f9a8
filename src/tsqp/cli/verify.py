"""`tsqp verify` and `tsqp proxy`."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tsqp.cli.app import app
from tsqp.cli.flags import Debug, JsonOutput
from tsqp.errors import UsageError

if TYPE_CHECKING:
    from tsqp.client.verdict import Verdict

PolicyFile = Annotated[
    Path | None,
    typer.Option(help="TOML file of what the server must be; see docs/attestation.md."),
]
CollateralFiles = Annotated[
    list[Path] | None,
    typer.Option(
        help="File or folder of collateral: Intel's as JSON, AMD's certificates and revocation "
        "lists as PEM or DER. May be repeated."
    ),
]
Cacert = Annotated[
    Path | None,
    typer.Option(
        help="Also require that one of the authorities in this PEM file signed the server's "
        "certificate. Without it, the evidence takes the place of an authority."
    ),
]


@app.command()
def verify(
    url: Annotated[
        str | None,
        typer.Argument(help="The server: https://HOST:PORT.", show_default=False),
    ] = None,
    policy: PolicyFile = None,
    collateral: CollateralFiles = None,
    quote: Annotated[
        Path | None,
        typer.Option(
            help="Verify this file instead of a server: a quote of SGX or TDX, a report of "
            "SEV-SNP, or what --save wrote."
        ),
    ] = None,
    claims: Annotated[
        Path | None, typer.Option(help="File of the claims whose hash is in --quote.")
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            help="Judge --quote at this time, for example 2025-07-04T00:00:00Z. The default is now."
        ),
    ] = None,
    cacert: Cacert = None,
    save: Annotated[
        Path | None, typer.Option(help="Write the server's evidence to this file, as JSON.")
    ] = None,
    json_output: JsonOutput = False,
    debug: Debug = False,
) -> None:
    """Verify the evidence of a server, or of files, against a policy. Sends no prompt."""
    if (url is None) == (quote is None):
        raise UsageError("Give the URL of a server or the file of a --quote, and not both.")
    if url is not None:
        _refuse("--quote", {"--claims": claims, "--at": at})
        if policy is None:
            raise UsageError("A server is verified against a policy: give --policy FILE.")
        verdict = _verify_server(url, policy, collateral or [], cacert, save)
    else:
        _refuse("a URL", {"--cacert": cacert, "--save": save})
        assert quote is not None
        verdict = _verify_file(quote, policy, collateral or [], claims, time_of(at))
    print(verdict.text(), file=sys.stderr if json_output else sys.stdout)
    if json_output:
        print(verdict.json())
    if not verdict.accepted:
        raise typer.Exit(1)


def _verify_server(
    url: str, policy: Path, collateral: list[Path], cacert: Path | None, save: Path | None
) -> "Verdict":
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # it prints each request
    with needed_packages():
        from tsqp.client.collateral import read_collateral
        from tsqp.client.policy import read_policy
        from tsqp.client.verified import verify_url
    demands = read_policy(policy)
    found = verify_url(url, demands, collateral=read_collateral(collateral), cacert=cacert)
    if save is not None:
        try:
            save.write_bytes(found.evidence.to_json() + b"\n")
        except OSError as exc:
            raise UsageError(f"The evidence cannot be written to --save: {exc.strerror}.") from None
    return found.verdict


def _verify_file(
    quote: Path, policy: Path | None, collateral: list[Path], claims: Path | None, at: datetime
) -> "Verdict":
    with needed_packages():
        from tsqp.client.collateral import read_collateral
        from tsqp.client.policy import NO_DEMANDS, read_policy
        from tsqp.client.quote_file import read_evidence
        from tsqp.client.verify import verify_evidence
    demands = NO_DEMANDS if policy is None else read_policy(policy)
    files = [*(Path(each) for each in demands.collateral), *collateral]
    evidence, found = read_evidence(quote, claims), read_collateral(files)
    if policy is None:
        print(
            "No --policy was given: this only shows whether the platform is genuine and up to "
            "date, not what runs on it.",
            file=sys.stderr,
        )
    return verify_evidence(evidence, demands, at=at, collateral=found)


def _refuse(needed: str, given: dict[str, object]) -> None:
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"{name} needs {needed}.")


def time_of(text: str | None) -> datetime:
    """The time that was given, in UTC unless it says otherwise; or now."""
    if text is None:
        return datetime.now(UTC)
    try:
        time = datetime.fromisoformat(text)
        return (time if time.tzinfo is not None else time.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise UsageError("--at must be a time such as 2025-07-04T00:00:00Z.") from None


@contextmanager
def needed_packages() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as exc:
        raise UsageError(
            f"This command needs the package {exc.name}: pip install 'tsqp[client]'."
        ) from None


@app.command()
def proxy(
    url: Annotated[str, typer.Argument(help="The server: https://HOST:PORT.", show_default=False)],
    policy: Annotated[
        Path, typer.Option(help="TOML file of what the server must be; see docs/attestation.md.")
    ],
    collateral: CollateralFiles = None,
    cacert: Cacert = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on. 0 chooses a free one.")
    ] = 8001,
    reverify_seconds: Annotated[
        float, typer.Option(help="Seconds after which the server is verified again.")
    ] = 300.0,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File of the server's API key. The proxy sends it in place of what clients send."
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Forward OpenAI's interface to a server, only while its evidence meets a policy."""
    with needed_packages():
        from tsqp.client.run_proxy import ProxyOptions, run_proxy
        from tsqp.serve.options import read_api_keys
    keys = () if api_key_file is None else read_api_keys((), api_key_file)
    if len(keys) > 1:
        raise UsageError("--api-key-file of a proxy must hold one key, the one to send.")
    run_proxy(
        ProxyOptions(
            url=url,
            policy=policy,
            collateral=tuple(collateral or ()),
            cacert=cacert,
            host=host,
            port=port,
            reverify_s=reverify_seconds,
            api_key=keys[0] if keys else None,
        )
    )
