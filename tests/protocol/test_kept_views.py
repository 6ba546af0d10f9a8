"""Nobody reads an answer after it was released: then its memory belongs to the next call."""

from types import TracebackType

import pytest
import torch
from torch import Tensor

from tsqp.checkpoint.checkpoint import Checkpoint, open_checkpoint
from tsqp.checkpoint.weights_digest import weights_digest
from tsqp.gpu.backends.cpu import CpuBackend
from tsqp.gpu.worker import Worker
from tsqp.gpu.worker_weights import load_weights
from tsqp.nn.attention import kv_in_blocks
from tsqp.runtime.generate import generate
from tsqp.tee.decoder import Decoder
from tsqp.tee.engine.engine import Engine
from tsqp.tee.offload.open import OpenOffload
from tsqp.tee.offload.open_attention import OpenAttentionOffload
from tsqp.tee.offload.open_layers import OpenLayersOffload
from tsqp.tee.sampling import SamplingParams
from tsqp.wire.channel import InprocChannel, InprocSlot, Reply
from tsqp.wire.messages import Hello

Split = OpenOffload | OpenAttentionOffload | OpenLayersOffload

PROMPTS = [list(range(1, 60)), [7], list(range(300, 200, -1))]
GREEDY = SamplingParams(temperature=0, max_tokens=16)


class PoisonedReply:
    """FAKE: an answer that turns into NaN when it is released."""

    times = None

    def __init__(self, reply: InprocSlot) -> None:
        self._reply = reply
        self.outputs: list[Tensor] = reply.outputs

    def __enter__(self) -> "PoisonedReply":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for output in self._reply.outputs:
            output.fill_(torch.nan)


class PoisonedChannel(InprocChannel):
    """FAKE: a worker in this process whose answers are poisoned."""

    def wait(self, ticket: int, deadline: float) -> Reply:  # type: ignore[override]
        return PoisonedReply(super().wait(ticket, deadline))


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint("random:tiny")


def tokens(
    checkpoint: Checkpoint,
    split: type[Split],
    kind: type[InprocChannel],
    max_call_bytes: int,
    lanes: int,
) -> list[tuple[int, ...]]:
    config, dtype = checkpoint.config, torch.float32
    abilities = ("embedding", "linear", "attention", "layer")
    digest = weights_digest(checkpoint, dtype)
    worker = Worker(load_weights(checkpoint, dtype, CpuBackend()))
    channel = kind(worker, Hello(bytes(32), digest, "float32", abilities, 0))
    channel.max_call_bytes = max_call_bytes
    if split is OpenOffload:
        offload = split([channel], config, dtype, {}, 1.0, kv_in_blocks(config, dtype))
    else:
        offload = split(channel, config, dtype, {}, 1.0)
    decoder = Decoder(checkpoint, dtype, None, offload.placement, offload.most_scores)
    engine = Engine(decoder, offload, config, prefill_chunk=20, microbatches=lanes)
    return [completion.token_ids for completion in generate(engine, PROMPTS, GREEDY)]


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("max_call_bytes", [2**30, 4096])
@pytest.mark.parametrize("split", [OpenOffload, OpenAttentionOffload, OpenLayersOffload])
def test_answers_are_not_read_after_their_release(
    checkpoint: Checkpoint, split: type[Split], max_call_bytes: int, lanes: int
) -> None:
    expected = tokens(checkpoint, split, InprocChannel, max_call_bytes, lanes)
    assert len({token for answer in expected for token in answer}) > 10
    assert tokens(checkpoint, split, PoisonedChannel, max_call_bytes, lanes) == expected
