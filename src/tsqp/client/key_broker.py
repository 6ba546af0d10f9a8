"""A key broker: gives secrets to TEEs whose evidence meets a policy, and to nobody else."""

import asyncio
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tsqp.api.claims import Claims
from tsqp.api.key_release import (
    MAX_REQUEST,
    NONCE_PATH,
    RELEASE_PATH,
    SUITE,
    ReleaseRequest,
    binding,
    encode_secret,
)
from tsqp.client.collateral import read_collateral
from tsqp.client.nonces import Nonces
from tsqp.client.policy import read_policy
from tsqp.client.verify import verify_evidence
from tsqp.errors import AttestationError

log = logging.getLogger("tsqp")

MAX_CHECKS = 2  # at the same time
BODY_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Broker:
    """What a broker gives, and to whom.

    Attributes:
        policy: file of the policy. It is read for each request, and so is the collateral.
        collateral: files and folders, in addition to the policy's own.
        secrets: by name.
    """

    policy: Path
    collateral: tuple[Path, ...]
    secrets: Mapping[str, bytes]

    def release(self, request: ReleaseRequest, nonce: bytes) -> bytes:
        """The secret, encrypted to the attested key.

        Raises:
            AttestationError: the evidence is refused, or there is no such secret.
        """
        demands = read_policy(self.policy)
        files = [*(Path(each) for each in demands.collateral), *self.collateral]
        verdict = verify_evidence(
            request.evidence,
            demands,
            at=datetime.now(UTC),
            collateral=read_collateral(files),
            public_key=hashlib.sha256(request.public_key).digest(),
            nonce=nonce,
        )
        verdict.require()
        if request.name not in self.secrets:  # only a verified TEE learns which there are
            raise AttestationError("There is no secret of this name.")
        info = binding(request.name, request.evidence.claims)
        return SUITE.encrypt(self.secrets[request.name], request.key, info=info)


def broker_app(broker: Broker) -> Starlette:
    """The app of a broker."""
    nonces = Nonces()
    checks = asyncio.Semaphore(MAX_CHECKS)

    async def give_nonce(_: Request) -> Response:
        return JSONResponse({"nonce": nonces.new().hex()})

    async def release(request: Request) -> Response:
        try:
            async with asyncio.timeout(BODY_S):
                body = await _body(request)
            asked = ReleaseRequest.from_json(body)
            nonce = Claims.decode(asked.evidence.claims).nonce
            nonces.take(nonce)
            async with checks:
                ciphertext = await asyncio.to_thread(broker.release, asked, nonce)
        except (TimeoutError, ClientDisconnect):
            return _refused(408, "The request did not arrive in time.")
        except AttestationError as error:
            log.warning("refused: %s", error)
            return _refused(403, "The broker refuses; its log has the reason.")
        log.info("released %s to %s", asked.name, asked.evidence.platform)
        return Response(encode_secret(ciphertext), media_type="application/json")

    return Starlette(
        routes=[
            Route(NONCE_PATH, give_nonce, methods=["POST"]),
            Route(RELEASE_PATH, release, methods=["POST"]),
        ]
    )


async def _body(request: Request) -> bytes:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_REQUEST:
            raise AttestationError(f"A request has more than {MAX_REQUEST:,} bytes.")
    return body


def _refused(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message}}, status)
