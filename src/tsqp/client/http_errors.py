"""What goes wrong between a client and a server, each as one sentence.

A server is not trusted here: of what it sends, only a short printable text is shown.
"""

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import httpx2
import msgspec

from tsqp.errors import PromptError, ServerError, TSQPError
from tsqp.wire.codec import printable

E = TypeVar("E", bound=BaseException)

MAX_SHOWN = 300  # characters of a server's own message
TOO_LONG, NO_MODEL = "context_length_exceeded", "model_not_found"
REFUSED_BODY = (400, 413, 422)
BUSY = (429, 503)


class ErrorDetails(msgspec.Struct):
    """OpenAI's description of an error, as far as it is used."""

    message: str = ""
    code: str | int | None = None


class ErrorBody(msgspec.Struct):
    """The body of an answer with a status of 400 or above, in the forms that servers have."""

    error: ErrorDetails | str | None = None
    message: str = ""

    @property
    def details(self) -> ErrorDetails:
        if isinstance(self.error, ErrorDetails):
            return self.error
        return ErrorDetails(message=self.error or self.message)


@contextmanager
def translated(server: object, *, within_body: bool = False) -> Iterator[None]:
    """Turn failures of the connection into a `ServerError` that names the server.

    Args:
        within_body: whether the answer has begun.

    Raises:
        ServerError: the server cannot be reached, or does not speak HTTP as it should.
    """
    try:
        yield
    except httpx2.TransportError as error:
        raise ServerError(_sentence(server, error, within_body)) from error


def _sentence(server: object, error: httpx2.TransportError, within_body: bool) -> str:
    if (tls := _cause(error, ssl.SSLError)) is not None:
        return _tls_sentence(server, tls)
    match error:
        case httpx2.ConnectTimeout():
            return f"The server at {server} does not answer: check the address and the network."
        case httpx2.ConnectError():
            cause = _cause(error, OSError)
            reason = (cause and cause.strerror) or "no connection"
            return (
                f"Cannot reach the server at {server} ({reason}): check the address, and that it "
                "runs."
            )
        case httpx2.TimeoutException():
            return f"The server at {server} sent nothing for too long: try again."
        case httpx2.ReadError() | httpx2.WriteError():
            return f"The connection to {server} was lost: try again."
        case httpx2.SSEError():
            return f"The server at {server} sent an event that is too large: check what runs there."
        case httpx2.RemoteProtocolError() if within_body:
            return f"The answer of {server} was cut off: try again."
        case _:
            return (
                f"The server at {server} does not speak HTTP as it should: check the address, and "
                "whether it is http or https."
            )


def _tls_sentence(server: object, error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"The certificate of {server} is not accepted "
            f"({printable(error.verify_message)[:MAX_SHOWN]}): check the address, or name its "
            "authority with --cacert."
        )
    return (
        f"TLS with {server} failed ({printable(error.reason or 'no reason given')}): check whether "
        "the server uses TLS."
    )


def _cause(error: BaseException, kind: type[E]) -> E | None:
    """The error of this kind that led to another one."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, kind):
        found = found.__cause__ or found.__context__
    return found


def refusal(server: object, response: httpx2.Response, body: bytes, *, has_key: bool) -> TSQPError:
    """The error for an answer whose status is not 200.

    Args:
        body: its beginning.
    """
    details = _details(body)
    status, said = response.status_code, _said(details)
    if status == 401:
        what = "refuses the API key" if has_key else "wants an API key"
        return ServerError(f"The server at {server} {what}: set TSQP_API_KEY or --api-key-file.")
    if status in REFUSED_BODY:
        if details.code == TOO_LONG:
            return PromptError("The conversation is too long for the model's context: shorten it.")
        return PromptError(f"The server refuses the request{said}.")
    if status in BUSY:
        seconds = response.headers.get("retry-after", "")
        plain = seconds.isascii() and seconds.isdigit() and len(seconds) < 6
        when = f"in {seconds} seconds" if plain else "later"
        return ServerError(f"The server at {server} cannot answer now{said}; try again {when}.")
    if 300 <= status < 400:
        return ServerError(f"The server at {server} redirects elsewhere: name its own address.")
    if status == 404 and (details.code == NO_MODEL or (said and response.request.content)):
        return ServerError(
            f"The server at {server} has no such model{said}; leave MODEL out to use its first one."
        )
    if status == 404:
        return ServerError(f"There is no OpenAI-compatible server at {server}: check the address.")
    return ServerError(f"The server at {server} answers with status {status}{said}.")


def reported(server: object, details: ErrorDetails) -> ServerError:
    """The error that a server reports within an answer."""
    return ServerError(f"The server at {server} could not finish the answer{_said(details)}.")


def _details(body: bytes) -> ErrorDetails:
    try:
        return msgspec.json.decode(body, type=ErrorBody).details
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return ErrorDetails()


def _said(details: ErrorDetails) -> str:
    """What the server says, to be put before a full stop; empty if it says nothing."""
    text = printable(details.message[:MAX_SHOWN]).strip().rstrip(".")
    return f": {text}" if text else ""
