"""`tsqp verify-receipt`."""

import json
import re
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tsqp.cli.app import app
from tsqp.cli.flags import Debug, JsonOutput
from tsqp.cli.verify import CollateralFiles, time_of
from tsqp.errors import UsageError, printable_path

if TYPE_CHECKING:
    from tsqp.api.evidence import Evidence
    from tsqp.api.receipts import Receipt

MAX_BODY = 2**30
MAX_SMALL = 2**20
SIMULATED = "The server's platform is SIMULATED, so this receipt proves nothing."


@app.command()
def verify_receipt(
    request: Annotated[Path, typer.Option(help="File with the exact bytes of the request's body.")],
    response: Annotated[
        Path,
        typer.Option(
            help="File with the exact bytes of the response's body. A stream may have its receipt "
            "at its end."
        ),
    ],
    receipt: Annotated[
        Path | None,
        typer.Option(
            help="File with the receipt: the value of the header X-TSQP-Receipt. The default is "
            "the receipt at the end of a stream."
        ),
    ] = None,
    evidence: Annotated[
        Path | None,
        typer.Option(help="File with the evidence of the server: what `tsqp verify --save` wrote."),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(help="TOML file of what the server must be; see docs/attestation.md."),
    ] = None,
    collateral: CollateralFiles = None,
    at: Annotated[
        str | None,
        typer.Option(
            help="Judge --evidence at this time, for example 2025-07-04T00:00:00Z. The default is "
            "now."
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            metavar="SHA256", help="SHA-256 of the server's public key, instead of --evidence."
        ),
    ] = None,
    json_output: JsonOutput = False,
    debug: Debug = False,
) -> None:
    """Check that a server's receipt is for this request and this response."""
    try:
        from tsqp.api.claims import Claims
        from tsqp.api.receipts import split_stream
        from tsqp.client.quote_file import read_evidence
        from tsqp.client.receipts import check_claims, check_receipt
    except ModuleNotFoundError as exc:
        raise UsageError(
            f"Receipts need the package {exc.name}: pip install 'tsqp[client]'."
        ) from None

    if (evidence is None) == (key is None):
        raise UsageError("Give either --evidence or --key: whose receipt it must be.")
    for option, value in (("--policy", policy), ("--at", at)):
        if value is not None and evidence is None:
            raise UsageError(f"{option} needs --evidence.")
    given = claims = None
    if evidence is not None:
        if policy is None:
            raise UsageError("Evidence is verified against a policy: give --policy FILE.")
        given = read_evidence(evidence, None)
        _verify(given, policy, collateral or [], time_of(at))
        claims = Claims.decode(given.claims)
        digest = claims.public_key
    elif key is not None and re.fullmatch(r"(?:sha256:)?[0-9a-fA-F]{64}", key):
        digest = bytes.fromhex(key.removeprefix("sha256:"))
    else:
        raise UsageError("--key must be 64 hexadecimal digits, the SHA-256 of the public key.")
    body, found = split_stream(_read(response, MAX_BODY, "--response"))
    if receipt is not None:
        found = _read(receipt, MAX_SMALL, "--receipt").decode("ascii", "replace")
    if found is None:
        raise UsageError("The response has no receipt at its end: give it with --receipt.")
    asked = _read(request, MAX_BODY, "--request")
    checked = check_receipt(found, request=asked, response=body, key=digest)
    if given is not None and claims is not None:
        check_claims(checked, claims, given.platform)
    _print(checked, given is not None, json_output)


def _verify(evidence: "Evidence", policy: Path, collateral: list[Path], at: datetime) -> None:
    """Verify evidence, and end the command if it is refused."""
    from tsqp.client.collateral import read_collateral
    from tsqp.client.policy import read_policy
    from tsqp.client.verify import verify_evidence

    demands = read_policy(policy)
    files = [*(Path(each) for each in demands.collateral), *collateral]
    known = read_collateral(files)
    verdict = verify_evidence(evidence, demands, at=at, collateral=known)
    print(verdict.text(), file=sys.stderr)
    verdict.require()


def _print(receipt: "Receipt", is_verified: bool, json_output: bool) -> None:
    warnings = [SIMULATED] if receipt.platform == "simulated" else []
    if not is_verified:
        warnings.append(
            "No evidence was verified here, so this shows only that the key of --key signed: give "
            "--evidence and --policy to learn whose key it is."
        )
    if json_output:
        print(json.dumps({"valid": True, "receipt": asdict(receipt), "warnings": warnings}))
        return
    when = datetime.fromtimestamp(receipt.time, UTC).isoformat()
    print(f"The receipt is valid: {receipt.path} answered with status {receipt.status} at {when}.")
    print(f"request        sha256:{receipt.request}")
    print(f"response       sha256:{receipt.response}")
    print(f"model          {receipt.model_digest}")
    print(f"privacy        {receipt.privacy}, field {receipt.field or 'none'}")
    print(f"configuration  sha256:{receipt.configuration}")
    for warning in warnings:
        print(f"warning: {warning}")


def _read(path: Path, limit: int, option: str) -> bytes:
    name = printable_path(path, f"the file of {option}")
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise UsageError(f"Cannot read {name}: {error.strerror}.") from None
    if len(content) > limit:
        raise UsageError(f"{name} has more than {limit:,} bytes.")
    return content
