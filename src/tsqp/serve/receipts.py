"""Signed receipts of requests and responses, if the options ask for them."""

import base64
import hashlib
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from fastapi import APIRouter, Request, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tsqp.api.receipts import COMMENT, HEADER, ID_HEADER, Receipt
from tsqp.serve.attestation import Attestation
from tsqp.serve.documented import ERRORS
from tsqp.serve.errors import APIError

router = APIRouter()

KEPT_S = 600.0
MAX_KEPT = 4096


@dataclass(frozen=True, slots=True)
class Answered:
    """A response that was sent, by its hashes.

    Attributes:
        request, response: SHA-256 of the bodies, in hexadecimal digits.
    """

    path: str
    status: int
    request: str
    response: str


class ReceiptBook:
    """Signs receipts, and keeps those of the last minutes for whoever may see them."""

    def __init__(self, attestation: Attestation) -> None:
        self._attestation = attestation
        self._kept: OrderedDict[str, tuple[float, str, str]] = OrderedDict()

    def sign(self, receipt_id: str, tenant: str, answered: Answered) -> str | None:
        """A signed receipt; None while the model is being loaded, when nothing is answered."""
        claims = self._attestation.claims
        if claims is None:
            return None
        receipt = Receipt(
            id=receipt_id,
            request=answered.request,
            response=answered.response,
            status=answered.status,
            path=answered.path,
            time=int(time.time()),
            model_digest=claims.model_digest,
            privacy=claims.privacy,
            field=claims.field,
            version=claims.version,
            configuration=claims.configuration.hex(),
            platform=self._attestation.platform,
            key=base64.b64encode(self._attestation.key.public_key).decode(),
        )
        text = receipt.sign(self._sign)
        self._keep(receipt_id, tenant, text)
        return text

    def find(self, receipt_id: str, tenant: str) -> str | None:
        """A receipt of the last minutes, if it belongs to this tenant."""
        expires, owner, text = self._kept.get(receipt_id, (0.0, "", ""))
        return text if owner == tenant and expires > time.monotonic() else None

    def _keep(self, receipt_id: str, tenant: str, text: str) -> None:
        now = time.monotonic()
        self._kept[receipt_id] = (now + KEPT_S, tenant, text)
        while len(self._kept) > MAX_KEPT or next(iter(self._kept.values()))[0] < now:
            self._kept.popitem(last=False)

    def _sign(self, data: bytes) -> bytes:
        numbers = decode_dss_signature(self._attestation.key.sign(data))
        return b"".join(number.to_bytes(32, "big") for number in numbers)


class Receipts:
    """Adds receipts to the responses of POST requests.

    It stands behind the `Gate`, which gives it whole bodies of requests.
    """

    def __init__(self, app: ASGIApp, book: ReceiptBook) -> None:
        self._app = app
        self._book = book

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        first: Message | None = await receive()
        assert first is not None and not first.get("more_body", False)
        sending = _Sending(self._book, scope, first.get("body", b""), send)

        async def replay() -> Message:
            nonlocal first
            if first is None:
                return await receive()
            given, first = first, None
            return given

        await self._app(scope, replay, sending.send)


class _Sending:
    """One response on its way."""

    def __init__(self, book: ReceiptBook, scope: Scope, body: bytes, send: Send) -> None:
        self._book = book
        self._scope = scope
        self._send = send
        self._id = secrets.token_hex(16)
        self._request = hashlib.sha256(body).hexdigest()
        self._response = hashlib.sha256()
        self._status = 0
        self._held: list[Message] = []  # of a response that is no stream, until its receipt

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            kind = Headers(raw=message["headers"]).get("content-type", "")
            if kind.startswith("text/event-stream"):
                MutableHeaders(scope=message)[ID_HEADER] = self._id
                await self._send(message)
            else:
                self._held.append(message)
            return
        self._response.update(message.get("body", b""))
        is_last = not message.get("more_body", False)
        if self._held:
            self._held.append(message)
            if is_last:
                await self._release()
        elif is_last:
            await self._send({**message, "more_body": True})
            receipt = self._sign()
            line = b"" if receipt is None else COMMENT + receipt.encode() + b"\n\n"
            await self._send({"type": "http.response.body", "body": line, "more_body": False})
        else:
            await self._send(message)

    async def _release(self) -> None:
        receipt = self._sign()
        if receipt is not None:
            headers = MutableHeaders(scope=self._held[0])
            headers[ID_HEADER], headers[HEADER] = self._id, receipt
        for message in self._held:
            await self._send(message)

    def _sign(self) -> str | None:
        # The path of a route, never what a client wrote.
        path = getattr(self._scope.get("route"), "path", "")
        answered = Answered(path, self._status, self._request, self._response.hexdigest())
        return self._book.sign(self._id, self._scope["state"]["tenant"], answered)


@router.get(
    "/v1/tsqp/receipts/{receipt_id}",
    response_class=Response,
    responses={
        **ERRORS,
        200: {"description": "A JWS.", "content": {"text/plain": {"schema": {"type": "string"}}}},
    },
)
async def receipt(receipt_id: str, request: Request) -> Response:
    """The receipt of a response of the last minutes to the same API key, by its own id."""
    book: ReceiptBook | None = request.app.state.tsqp.receipts
    found = None if book is None else book.find(receipt_id, request.state.tenant)
    if found is None:
        raise APIError(404, "There is no receipt of this id, or not any more.", code="no_receipt")
    headers = {"Cache-Control": "no-store"}
    return Response(found, media_type="text/plain", headers=headers)
