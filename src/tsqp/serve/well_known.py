"""`GET /.well-known/tsqp-attestation`: fresh evidence, for whoever asks, before any API key."""

import re

from fastapi import APIRouter, Request, Response

from tsqp.api.claims import MAX_NONCE, MIN_NONCE
from tsqp.api.evidence import PATH
from tsqp.api.tokens import AttestationAnswer
from tsqp.serve.documented import ERRORS
from tsqp.serve.errors import APIError, bad_request
from tsqp.serve.state import state_of
from tsqp.serve.streaming import while_connected

router = APIRouter()

_NONCE = re.compile(rf"(?:[0-9a-fA-F]{{2}}){{{MIN_NONCE},{MAX_NONCE}}}")


@router.get(PATH, response_model=AttestationAnswer, responses=ERRORS)
async def attestation(request: Request, nonce: str = "") -> Response:
    """Evidence of the platform over a nonce: 16 to 64 random bytes in hexadecimal digits."""
    found = state_of(request).attestation
    if found is None:
        raise APIError(404, "This server is not attested: it runs without --attest.")
    if not _NONCE.fullmatch(nonce):
        raise bad_request("nonce must be 16 to 64 bytes in hexadecimal digits.", "nonce")
    evidence = await while_connected(request, found.evidence(bytes.fromhex(nonce)))
    return Response(
        evidence.to_json(),
        media_type="application/json",
        headers={"Cache-Control": "no-store"},
    )
