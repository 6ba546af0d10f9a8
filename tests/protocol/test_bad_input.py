"""Models, prompts and options that cannot be served: one sentence that says what to do."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from protocol_helpers import START_S, Commands, Main, write_ids
from safetensors.torch import load_file, save_file

LLAMA_8B_FLOAT32_BYTES = 4 * (8_030_261_248 - 65 * 4096)  # without the norms
TEE = ["generate", "random:tiny", "--privacy", "tee"]


def test_a_prompt_longer_than_the_context_is_refused(commands: Commands) -> None:
    ids = write_ids(commands.folder / "long.json", [1] * 512)
    error = commands.fails(*TEE, "--prompt-ids", ids)
    assert "has 512 tokens" in error
    assert "maximum context length is 512 tokens" in error


def test_a_prompt_longer_than_the_context_is_refused_in_open(
    commands: Commands, tiny_worker: str
) -> None:
    ids = write_ids(commands.folder / "long.json", [1], [1] * 512)
    error = commands.fails(
        "generate", "random:tiny", "--privacy", "open", "--worker", tiny_worker,
        "--prompt-ids", ids,
    )  # fmt: skip
    assert "maximum context length is 512 tokens" in error


def test_an_empty_text_is_refused(commands: Commands, speaking: Path) -> None:
    error = commands.fails("generate", speaking, "--privacy", "tee", "--prompt", "")
    assert "prompt is empty" in error


@pytest.mark.parametrize("content", ["[]", "[[]]", "[[1], []]"])
def test_a_prompt_without_tokens_is_refused(content: str, main: Main, tmp_path: Path) -> None:
    path = tmp_path / "empty.json"
    path.write_text(content)
    result = main(*TEE, "--prompt-ids", path)
    assert (result.status, result.stdout) == (1, "")
    assert "prompt is empty" in result.error


def test_a_prompt_that_is_not_unicode_is_refused(main: Main, speaking: Path) -> None:
    prompt = os.fsdecode(b"caf\xe9")  # what Python makes of such an argument
    result = main("generate", speaking, "--privacy", "tee", "--prompt", prompt)
    assert (result.status, result.stdout) == (1, "")
    assert "not valid Unicode" in result.error


def test_standard_input_that_is_not_unicode_is_refused(commands: Commands, speaking: Path) -> None:
    path = commands.folder / "prompt.txt"
    path.write_bytes(b"caf\xe9")
    command = ["generate", speaking, "--privacy", "tee", "--prompt", "-"]
    assert "not valid U" in commands.fails(*command, stdin=path)


def test_a_token_outside_the_vocabulary_is_refused(main: Main, tmp_path: Path) -> None:
    result = main(*TEE, "--prompt-ids", write_ids(tmp_path / "big.json", [1, 512]))
    assert (result.status, result.stdout) == (1, "")
    assert "outside the model's vocabulary of 512" in result.error


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "No such file"),
        ("not json", "Cannot read token ids"),
        ('{"ids": [1]}', "Cannot read token ids"),
        ("[1, 2.5]", "Cannot read token ids"),
        ("[1, [2]]", "mixes token ids and lists"),
    ],
)
def test_a_file_that_holds_no_ids_is_refused(
    content: str | None, sentence: str, main: Main, tmp_path: Path
) -> None:
    path = tmp_path / "wrong.json"
    if content is not None:
        path.write_text(content)
    result = main(*TEE, "--prompt-ids", path)
    assert (result.status, result.stdout) == (1, "")
    assert sentence in result.error
    assert str(path) in result.error


def test_text_for_a_model_without_tokenizer_is_refused(main: Main) -> None:
    result = main(*TEE, "--prompt", "hello")
    assert result.status == 1
    assert "no tokenizer: pass token ids with --prompt-ids" in result.error


def test_stop_strings_for_a_model_without_tokenizer_are_refused(main: Main, ids: Path) -> None:
    result = main(*TEE, "--prompt-ids", ids, "--stop", "x")
    assert result.status == 1
    assert "Stop strings need a tokenizer" in result.error


def test_an_unknown_dtype_is_refused(commands: Commands, ids: Path) -> None:
    error = commands.fails(*TEE, "--prompt-ids", ids, "--dtype", "float8")
    assert "no such dtype: choose auto, float32" in error


@pytest.mark.parametrize(
    ("options", "status", "sentence"),
    [
        (["--privacy", "secret"], 2, "no such privacy mode; choose pad, shares, open or tee"),
        (["--privacy", "open"], 2, "--privacy open needs one or more --worker, not 0"),
        (
            ["--privacy", "open", "--worker", "ipc:///a", "--worker", "ipc:///a"],
            2,
            "--worker ipc:///a is given twice",
        ),
        (["--worker", "local"], 2, "--privacy tee has no --worker"),
        (["--attention", "moon"], 2, "no such attention mode; choose tee or gpu"),
        (["--fuse", "all"], 2, "no such fusion; choose none or layer"),
        (["--attention", "gpu"], 2, "--attention gpu needs a worker, but --privacy tee has none"),
        (["--fuse", "layer"], 2, "--fuse layer needs a worker, but --privacy tee has none"),
        (
            ["--privacy", "pad", "--attention", "gpu"],
            2,
            "--attention gpu works only with --privacy open, not with pad: pads are made for known "
            "weights, so they cannot mask a product of two secrets",
        ),
        (
            ["--privacy", "shares", "--fuse", "layer"],
            2,
            "--fuse layer works only with --privacy open, not with shares: whole layers need plain "
            "activations",
        ),
        (
            ["--privacy", "open", "--fuse", "layer", "--attention", "tee"],
            2,
            "--fuse layer runs attention on the worker too, but --attention tee keeps it in",
        ),
        (["--chat"], 2, "--chat works only with --prompt"),
        (["--prompt", "hello"], 2, "either --prompt or --prompt-ids"),
        (["--privacy", "open", "--worker", "nowhere"], 1, "This is not an endpoint"),
        (["--privacy", "open", "--worker", "tcp://host"], 1, "needs a host, and a port"),
        (["--pad-memory", "inf"], 2, "--pad-memory is inf; it must be a number of GiB, 0 or more"),
        (["--pad-memory", "1e305"], 2, "--pad-memory is 1e+305; it must be a number of GiB"),
        (["--temperature", "-1"], 1, "temperature must be"),
        (["--temperature", "nan"], 1, "temperature must be"),
        (["--top-p", "0"], 1, "top_p must be"),
        (["--stop", ""], 1, "stop string must"),
    ],
)
def test_impossible_options_are_refused(
    options: list[str], status: int, sentence: str, main: Main, ids: Path
) -> None:
    result = main(*TEE, "--prompt-ids", ids, *options)
    assert (result.status, result.stdout) == (status, "")
    assert sentence in result.error


def test_a_device_for_a_worker_that_is_not_started_here_is_refused(main: Main, ids: Path) -> None:
    command = ["generate", "random:tiny", "--prompt-ids", ids, "--device", "cuda"]
    for where in (["--privacy", "tee"], ["--worker", "ipc:///nowhere"]):
        result = main(*command, *where)
        assert result.status == 2
        assert "give it to `tsqp worker` instead" in result.error


def test_no_prompt_at_all_is_wrong_usage(main: Main) -> None:
    result = main(*TEE)
    assert result.status == 2
    assert "--prompt or --prompt-ids" in result.error


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "example.org", "[2001:db8::1]"])
def test_a_worker_on_another_machine_needs_insecure(host: str, main: Main, ids: Path) -> None:
    endpoint = f"tcp://{host}:5555"
    result = main(
        "generate", "random:tiny", "--privacy", "open", "--worker", endpoint, "--prompt-ids", ids
    )
    assert (result.status, result.stdout) == (2, "")
    assert f"The link to {endpoint} is not encrypted" in result.error
    assert "pass --insecure" in result.error


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["generate", "--nonsense"],
        ["generate"],
        ["generate", "random:tiny", "--privacy", "tee", "--max-tokens", "0"],
        ["worker"],
        [],
    ],
)
def test_wrong_usage_has_exit_status_two_and_no_traceback(arguments: list[str], main: Main) -> None:
    result = main(*arguments)
    assert result.status == 2
    assert "Usage: " in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("exists", [True, False])
def test_a_benchmark_that_could_not_write_its_result_does_not_begin(
    exists: bool, main: Main, tmp_path: Path
) -> None:
    out = tmp_path / "result.json" if exists else tmp_path / "missing" / "result.json"
    if exists:
        out.write_text("precious")
    result = main("bench", "random:tiny", "--out", out)
    assert (result.status, result.stdout) == (2, "")
    assert str(out if exists else out.parent) in result.error
    assert not exists or out.read_text() == "precious"


def without_a_shard(folder: Path) -> str:
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.unlink()
    return shard.name


def with_a_short_shard(folder: Path) -> str:
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-100])
    return shard.name


def with_a_wrong_shape(folder: Path) -> str:
    name = "model.layers.1.mlp.down_proj.weight"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"][name]
    tensors = load_file(shard)
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, shard)
    return name


def without_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "config.json"


@pytest.mark.parametrize(
    "damage", [without_a_shard, with_a_short_shard, with_a_wrong_shape, without_config]
)
def test_a_damaged_model_is_named_by_both_sides(
    damage: Callable[[Path], str], commands: Commands, speaking: Path, ids: Path
) -> None:
    folder = commands.folder / "model"
    shutil.copytree(speaking, folder)
    named = damage(folder)
    check_that_both_sides_name(named, commands, folder, ids)


def test_a_gguf_file_cut_short_is_named_by_both_sides(
    commands: Commands, demo_path: Path, ids: Path
) -> None:
    path = commands.folder / "cut.gguf"
    with demo_path.open("rb") as whole:
        path.write_bytes(whole.read(demo_path.stat().st_size // 2))
    check_that_both_sides_name("cut.gguf", commands, path, ids)


def check_that_both_sides_name(named: str, commands: Commands, model: Path, ids: Path) -> None:
    running = [
        commands.start("generate", model, "--privacy", "tee", "--prompt-ids", ids),
        commands.start("worker", model, "--listen", commands.ipc()),
    ]
    for each in running:
        result = each.ends(START_S)
        assert (result.status, result.stdout) == (1, "")
        assert named in result.error


def test_a_model_that_is_not_there_is_named(commands: Commands, ids: Path) -> None:
    error = commands.fails("generate", "/no/model", "--privacy", "tee", "--prompt-ids", ids)
    assert "/no/model" in error


@pytest.mark.skipif(
    psutil.virtual_memory().available > LLAMA_8B_FLOAT32_BYTES, reason="this machine has room"
)
@pytest.mark.parametrize("command", ["generate", "worker"])
def test_a_model_larger_than_memory_is_refused_with_both_figures(
    command: str, commands: Commands, ids: Path
) -> None:
    other = ["--privacy", "tee", "--prompt-ids", ids]
    if command == "worker":
        other = ["--serve", "open", "--listen", commands.ipc()]
    error = commands.fails(command, "random:llama-3.1-8b", "--dtype", "float32", *other)
    assert f"{LLAMA_8B_FLOAT32_BYTES} bytes" in error
    assert re.search(r"[1-9]\d* bytes \(.* GiB\) are available", error)
