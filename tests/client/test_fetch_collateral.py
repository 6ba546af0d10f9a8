"""Collateral is fetched when a user asks for it, from a service that is not trusted."""

import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote as quoted

import pytest
from protocol_helpers import Commands
from samples import IntelSample, folder

from tsqp.client.fetch_collateral import fetch_collateral, write_collateral
from tsqp.client.quote_file import read_evidence
from tsqp.errors import AttestationError, UsageError

Answers = Callable[[str], tuple[bytes, Mapping[str, str]]]


@contextmanager
def service(answers: Answers) -> Iterator[str]:
    """A PCCS that gives these answers; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body, headers = answers(self.path)
            self.send_response(200 if body else 404)
            for name, value in headers.items():
                self.send_header(name, quoted(value))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def recorded(sample: IntelSample) -> Answers:
    """What Intel's service answered, from a file of it."""
    found = sample.collateral

    def signed(name: str, part: str) -> bytes:
        return f'{{"{name}":{found[part]},"signature":"{found[f"{part}_signature"]}"}}'.encode()

    def answer(path: str) -> tuple[bytes, Mapping[str, str]]:
        path = path.partition("?")[0]
        if path.endswith("/pckcrl"):
            chain = {"SGX-PCK-CRL-Issuer-Chain": found["pck_crl_issuer_chain"]}
            return bytes.fromhex(found["pck_crl"]), chain
        if path.endswith("/rootcacrl"):
            return found["root_ca_crl"].encode(), {}
        if path.endswith("/tcb"):
            chain = {"TCB-Info-Issuer-Chain": found["tcb_info_issuer_chain"]}
            return signed("tcbInfo", "tcb_info"), chain
        if path.endswith("/qe/identity"):
            chain = {"SGX-Enclave-Identity-Issuer-Chain": found["qe_identity_issuer_chain"]}
            return signed("enclaveIdentity", "qe_identity"), chain
        return b"", {}

    return answer


@pytest.mark.parametrize("name", ["sgx_quote", "tdx_quote"])
def test_a_quote_is_verified_with_what_was_fetched(
    name: str, commands: Commands, tmp_path: Path
) -> None:
    sample, out = IntelSample.read(name), tmp_path / "found.json"
    out.write_text("an earlier one")
    with service(recorded(sample)) as url:
        result = commands.run("collateral", folder() / name, "--pccs", url, "--out", out)
    assert (result.status, result.stdout) == (0, ""), result
    assert f"{name[:3]} on processors" in result.stderr
    assert sample.verdict(collateral=json.loads(out.read_text())).accepted
    assert list(tmp_path.glob(".*")) == []


def test_a_service_that_gives_something_else_is_one_sentence(tmp_path: Path) -> None:
    sgx, tdx = IntelSample.read("sgx_quote"), IntelSample.read("tdx_quote")
    evidence = read_evidence(folder() / "tdx_quote", None)
    lies: list[tuple[Answers, str]] = [
        (lambda _: (b"", {}), "cannot be fetched"),
        (lambda _: (b"not what was asked", {}), "cannot be fetched"),
        (recorded(sgx), "other processors than the quote's"),
    ]
    for answers, message in lies:
        with service(answers) as url, pytest.raises(AttestationError, match=message):
            fetch_collateral(evidence, url)
    honest = recorded(tdx)
    huge = "x" * 2**21

    def long(path: str) -> tuple[bytes, Mapping[str, str]]:
        body, headers = honest(path)
        return body.replace(b'"id":"TDX"', f'"id":"TDX","more":"{huge}"'.encode()), headers

    with service(long) as url, pytest.raises(AttestationError, match="more than 1,048,576 bytes"):
        fetch_collateral(evidence, url)


def test_a_service_that_does_not_answer_is_given_up() -> None:
    evidence = read_evidence(folder() / "tdx_quote", None)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(AttestationError, match=r"no collateral within 0\.2 seconds"):
            fetch_collateral(evidence, url, 0.2)
    with pytest.raises(AttestationError, match="cannot be fetched: error sending request"):
        fetch_collateral(evidence, url)


def test_what_needs_no_collateral_of_intel_is_refused(tmp_path: Path) -> None:
    evidence = read_evidence(folder() / "snp_report_milan.hex", None)
    with pytest.raises(UsageError, match="Only quotes of SGX and TDX"):
        fetch_collateral(evidence, "https://localhost")
    with pytest.raises(UsageError, match="--pccs must be https://HOST"):
        fetch_collateral(read_evidence(folder() / "tdx_quote", None), "file:///etc")
    with pytest.raises(UsageError, match=r"must end in \.json"):
        write_collateral(None, tmp_path / "out")  # type: ignore[arg-type]  # refused before
