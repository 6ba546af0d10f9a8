"""Commands that leave nothing behind, and the models and workers that tests share."""

import gc
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from liars import LyingWorker
from lying_sessions import complete, held, private
from protocol_helpers import (
    PLAIN_OUTPUT,
    Commands,
    Main,
    Result,
    Running,
    eventually,
    is_setting,
    segments,
    socket_endpoint,
    write_ids,
)
from torch import Tensor, manual_seed, no_grad, randn_like
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import tsqp.wire.client
from tsqp import cli
from tsqp.checkpoint import demo_model
from tsqp.errors import CheckpointError
from tsqp.runtime import build
from tsqp.tee.crypto.freivalds import FailureLimit
from tsqp.tee.sampler import Sampler


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    """Runs commands; at the end no process, no socket and no segment may be left."""
    commands = Commands(tmp_path)
    try:
        yield commands
        commands.finish()
    finally:
        commands.close()


@pytest.fixture(autouse=True)
def _shared_workers_live(shared_commands: Commands) -> Iterator[None]:
    """No test may end what others use."""
    yield
    shared_commands.still_serve()


@pytest.fixture(scope="session")
def shared_commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """For workers that tests share."""
    commands = Commands(tmp_path_factory.mktemp("shared"))
    try:
        yield commands
        commands.finish()
    finally:
        commands.close()


@pytest.fixture
def main(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Main:
    """The command line, in this process."""
    for name in filter(is_setting, list(os.environ)):
        monkeypatch.delenv(name)
    # For good it would forbid core files to this process, and to what other tests start from it.
    monkeypatch.setattr(sys.modules["tsqp.cli.app"], "harden_process", lambda: True)

    def run(*arguments: object, env: Mapping[str, str] | None = None) -> Result:
        began = time.monotonic()
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            patch.setattr(sys, "argv", ["tsqp", *map(str, arguments)])
            for name, value in (PLAIN_OUTPUT | dict(env or {})).items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit) as end:
                cli.main()
        assert isinstance(end.value.code, int)
        return Result(end.value.code, *capsys.readouterr(), time.monotonic() - began)

    return run


@pytest.fixture
def gives_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process does not wait long for a worker that is not there."""
    monkeypatch.setattr(tsqp.wire.client, "CONNECT_S", 0.5)


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    """A file for --prompt-ids, for any model."""
    return write_ids(tmp_path / "ids.json", range(1, 41))


@pytest.fixture(scope="session")
def demo_path() -> Path:
    """SmolLM2-135M-Instruct."""
    try:
        return demo_model.locate()
    except CheckpointError as exc:
        pytest.skip(str(exc))


@pytest.fixture(scope="session")
def speaking(demo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that streams nonsense for a long time: random weights, a real tokenizer."""
    folder = tmp_path_factory.mktemp("speaking")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        str(demo_path.parent), gguf_file=demo_path.name, local_files_only=True
    )
    tokenizer.save_pretrained(folder)
    manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=100_000,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="1MB")
    return folder


@pytest.fixture(scope="session")
def small_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with biases and an output projection of its own."""
    folder = tmp_path_factory.mktemp("small")
    manual_seed(1)
    config = LlamaConfig(
        vocab_size=199,
        hidden_size=48,
        intermediate_size=88,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name else 0.0
            parameter.copy_(centre + 0.3 * randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_worker(shared_commands: Commands) -> str:
    """The endpoint of a worker with random:tiny in float32."""
    endpoint = f"ipc://{shared_commands.folder}/tiny.sock"
    shared_commands.worker("random:tiny", endpoint)
    return endpoint


@pytest.fixture(scope="session")
def demo_worker(demo_path: Path, shared_commands: Commands) -> Running:
    """A worker with the real model in float32; see `demo_ipc`."""
    endpoint = f"ipc://{shared_commands.folder}/demo.sock"
    return shared_commands.worker("demo", endpoint, "--dtype", "float32")


@pytest.fixture(scope="session")
def demo_ipc(demo_worker: Running) -> str:
    """Where `demo_worker` listens."""
    return socket_endpoint(demo_worker.stderr)


@pytest.fixture(scope="session")
def demo_tcp(demo_path: Path, shared_commands: Commands) -> str:
    """The endpoint of another worker with the real model in float32."""
    worker = shared_commands.worker("demo", "tcp://127.0.0.1:0", "--dtype", "float32")
    return socket_endpoint(worker.stderr)


@pytest.fixture(scope="session")
def liar(shared_commands: Commands) -> Iterator[LyingWorker]:
    """A worker that lies as it is told before each session."""
    liar = LyingWorker(shared_commands)
    try:
        liar.running.says("serving ")
        yield liar
        liar.close()
    finally:
        liar.running.stop()


@pytest.fixture(scope="module")
def _began(liar: LyingWorker) -> None:
    """What stays after the first session of a process is there: pyzmq's collector of buffers."""
    with private(liar, shm=False) as llm:
        complete(llm)
    gc.collect()
    gc.freeze()  # what torch made at its import need not be looked at after each test


@pytest.fixture
def nothing_is_left(liar: LyingWorker, _began: None) -> Iterator[None]:
    """No thread, file or memory stays on this side, no memory on the other, no name on disk."""
    gc.collect()
    before, names = held_at_rest(), segments()
    yield
    gc.collect()
    assert eventually(lambda: held() == before), (before, held())
    assert eventually(lambda: liar.segments == 0)
    assert eventually(lambda: segments() <= names)
    assert liar.running.is_alive, liar.running.stderr


def held_at_rest() -> tuple[int, int, int, int]:
    """What is held once the threads of earlier sessions have ended."""
    found = held()
    while True:
        time.sleep(0.01)
        if (again := held()) == found:
            return found
        found = again


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> FailureLimit:
    """The limit of the process, for tests that reach it, or come near."""
    limit = FailureLimit()
    monkeypatch.setattr(build, "process_limit", limit)
    return limit


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every token that is chosen, also of a generation that fails."""
    tokens: list[int] = []
    sample = Sampler.sample

    def recorded(sampler: Sampler, logits_V: Tensor) -> int:
        tokens.append(sample(sampler, logits_V))
        return tokens[-1]

    monkeypatch.setattr(Sampler, "sample", recorded)
    return tokens
