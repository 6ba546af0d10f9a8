"""The most work of one call, over sockets: honest clients never meet it, others are refused."""

import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from tsqp import LLM, SamplingParams
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.errors import HandshakeError, ProtocolError, RemoteError, TSQPError, WorkerError
from tsqp.gpu.backends.cpu import CpuBackend
from tsqp.gpu.worker import PRIVATE_ABILITIES, Worker
from tsqp.gpu.worker_weights import load_integers, load_weights
from tsqp.wire.call_limit import CALL_MACS
from tsqp.wire.client import RemoteChannel
from tsqp.wire.endpoint import parse_endpoint
from tsqp.wire.messages import Hello, Operation, Product, SeedProduct, Welcome
from tsqp.wire.server import Server
from tsqp.wire.tensors import Spec

MODEL = "random:tiny"
CPU = CpuBackend()
PROMPTS = [list(range(1, 41)), list(range(50, 57))]
PARAMS = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
HIDDEN, QKV, LM_HEAD_MACS = 64, 128, 64 * 512
DEAREST_ROW = 102_400  # of one layer at the end of the context
MODES: dict[str, dict[str, Any]] = {
    "pad": {"privacy": "pad"},
    "shares": {"privacy": "shares", "insecure_same_host": True},
    "open": {"privacy": "open"},
    "attention": {"privacy": "open", "attention": "gpu"},
    "layers": {"privacy": "open", "fuse": "layer"},
}


class Announcing(Worker):
    """Announces whatever limit a test wants."""

    announced: int | None = None

    def welcome(self, hello: Hello) -> Welcome:
        found = super().welcome(hello)
        if self.announced is None:
            return found
        return msgspec.structs.replace(found, max_call_macs=self.announced)


@pytest.fixture(scope="module")
def loaded() -> Worker:
    checkpoint = open_checkpoint(MODEL)
    weights, integers = load_weights(checkpoint, torch.float32, CPU), load_integers(checkpoint, CPU)
    checkpoint.close()
    return Worker(weights, integers)


@contextmanager
def served(loaded: Worker, folder: Path, announced: int | None = None) -> Iterator[str]:
    """A worker that does no more in a call than one row of the model needs; its endpoint."""
    worker = Announcing(loaded._weights, loaded._integers, DEAREST_ROW)
    worker.announced = announced
    server = Server(parse_endpoint(f"ipc://{folder}/{secrets.token_hex(4)}"))
    stop = threading.Event()
    thread = threading.Thread(target=server.serve, args=(worker, stop.is_set))
    thread.start()
    try:
        yield server.address
    finally:
        stop.set()
        thread.join(30)
        assert not thread.is_alive()
        server.close()


def answers(**options: Any) -> tuple[list[list[int]], Tensor, int]:
    """Tokens, the log probabilities of a prompt, and how many calls both took."""
    with LLM(MODEL, dtype="float32", timeout=60, **options) as llm:
        tokens = [list(answer.token_ids) for answer in llm.generate(PROMPTS, PARAMS)]
        logprobs_T = llm.score(PROMPTS[0]).logprobs_T
        return tokens, logprobs_T, sum(llm.rpc.calls.values())


@pytest.mark.parametrize("mode", MODES)
def test_clients_split_their_calls_and_get_what_they_get_elsewhere(
    mode: str, loaded: Worker, tmp_path: Path
) -> None:
    options = MODES[mode]
    private = mode in ("pad", "shares")
    count = 2 if mode == "shares" else 1
    whole = answers(**options, worker=["inproc"] * count if count > 1 else "inproc")
    with served(loaded, tmp_path) as one, served(loaded, tmp_path) as two:
        limited = answers(**options, worker=[one, two][:count])
    reference = answers(privacy="tee", fixed_point=private)
    assert limited[0] == reference[0] == whole[0]
    if private:
        assert torch.equal(limited[1], reference[1])
    else:
        torch.testing.assert_close(limited[1], reference[1], atol=1e-4, rtol=0)
    assert limited[2] > 1.5 * whole[2]


def private_hello(loaded: Worker, shm_bytes: int) -> Hello:
    assert loaded._integers is not None
    digest = loaded._integers.digest
    return Hello(secrets.token_bytes(32), digest, "int8", PRIVATE_ABILITIES, shm_bytes)


def ask(channel: RemoteChannel, operation: Operation, rows: int) -> None:
    """One call of residues that are all zero."""
    inputs = [Spec((rows, 4 * HIDDEN), torch.uint8)] if isinstance(operation, Product) else []
    slot = channel.reserve(operation, inputs, [Spec((rows, 4 * QKV), torch.uint8)])
    for tensor in slot.inputs:
        tensor.zero_()
    with channel.wait(channel.submit(slot), time.monotonic() + 30):
        pass


@pytest.mark.parametrize("shm_bytes", [2**20, 0], ids=["shared", "inline"])
@pytest.mark.parametrize("seeded", [False, True])
def test_a_client_that_asks_for_more_is_sent_away_and_disturbs_nobody(
    seeded: bool, shm_bytes: int, loaded: Worker, tmp_path: Path
) -> None:
    most = DEAREST_ROW // (HIDDEN * QKV)

    def operation(rows: int) -> Operation:
        if seeded:
            return SeedProduct(0, "qkv", "wide", rows, bytes(32))
        return Product(0, "qkv", "wide")

    with served(loaded, tmp_path) as endpoint:
        greedy, other = (
            RemoteChannel(parse_endpoint(endpoint), private_hello(loaded, shm_bytes))
            for _ in range(2)
        )
        ask(greedy, operation(most), most)
        with pytest.raises(RemoteError, match="multiply-accumulates, but this worker allows"):
            ask(greedy, operation(most + 1), most + 1)
        ask(other, operation(most), most)
        other.close()
        greedy.close()


@pytest.mark.parametrize(
    ("mode", "least"), [("pad", LM_HEAD_MACS), ("open", DEAREST_ROW), ("layers", DEAREST_ROW)]
)
def test_a_limit_that_no_row_fits_is_refused(
    mode: str, least: int, loaded: Worker, tmp_path: Path
) -> None:
    refused: list[tuple[int, type[TSQPError], str]] = [
        (1, HandshakeError, f"one row of this model needs {least}"),
        (least - 1, HandshakeError, f"one row of this model needs {least}"),
        (0, ProtocolError, "sent an invalid message"),
        (2**63, ProtocolError, "sent an invalid message"),
    ]
    for announced, error, words in refused:
        with (
            served(loaded, tmp_path, announced) as endpoint,
            pytest.raises(error, match=words),
        ):
            LLM(MODEL, dtype="float32", worker=endpoint, **MODES[mode])


@pytest.mark.parametrize("announced", [LM_HEAD_MACS, 2**62])
def test_any_other_limit_does_no_harm(announced: int, loaded: Worker, tmp_path: Path) -> None:
    worker = Worker(loaded._weights, loaded._integers, max(CALL_MACS["cpu"], announced))
    with served(worker, tmp_path, announced) as endpoint:
        if announced == LM_HEAD_MACS:
            found, expected = (
                answers(privacy="pad", worker=endpoint),
                answers(privacy="tee", fixed_point=True),
            )
            assert found[0] == expected[0]
            assert torch.equal(found[1], expected[1])
        else:  # the worker refuses what it has claimed to do
            with pytest.raises(WorkerError):
                answers(privacy="pad", worker=endpoint)
