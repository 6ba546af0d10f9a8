"""`tsqp bench`, whole: every figure is there, and those that no clock decides are right."""

import json
import math
from pathlib import Path

import pytest
import torch
from protocol_helpers import Main, Result
from transformers import AutoTokenizer, LlamaForCausalLM

from tsqp.bench import attention_times, compare, kernel_times, timing
from tsqp.bench.modes import Setting
from tsqp.errors import UsageError
from tsqp.gpu import backends

MODES = ["transformers", "tee", "open", "open-gpu-attention", "open-fused", "pad"]
MODES += ["pad-inline", "shares"]
FIGURE = {"median", "least", "most"}
SENTENCE = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. "


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More than one window of the speaking model, should it have a context of 100 tokens."""
    path = tmp_path_factory.mktemp("text") / "sample.txt"
    path.write_text(12 * SENTENCE)
    return path


@pytest.fixture(scope="module")
def small_context(speaking: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The speaking model with a context of 100 tokens."""
    folder = tmp_path_factory.mktemp("small-context")
    for file in speaking.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100}))
    return folder


def test_every_mode_is_compared_unless_some_are_named(main: Main, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    result = main(
        "bench", "random:tiny", "--rounds", 1, "--prompt-tokens", 20, "--new-tokens", 5,
        "--out", out, "--device", "cpu",
    )  # fmt: skip
    assert result.status == 0, result.stderr
    found = result.json
    assert json.loads(out.read_text()) == found
    assert found["model"] == "random:tiny"
    for name in ("prefill_s", "decode_s_per_token", "decode_cpu_s_per_token"):
        assert list(found[name]) == MODES
        for figure in found[name].values():
            assert set(figure) == FIGURE
            assert 0 < figure["least"] <= figure["median"] <= figure["most"]
    assert {"pad/tee", "pad/open", "pad/transformers"} <= set(found["decode_ratio"])
    assert list(found["floors"]) == MODES
    pads_cpu_s = {mode: found["pads_cpu_s_per_token"][mode]["median"] for mode in MODES}
    assert min(pads_cpu_s["pad"], pads_cpu_s["pad-inline"]) > 10 * pads_cpu_s["tee"]


def test_the_second_gpu_is_not_taken_for_the_first(
    main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Setting] = []

    def note(setting: Setting, modes: list[str], **options: object) -> None:
        assert "transformers-worker" in modes
        asked.append(setting)
        raise UsageError("That is enough.")

    monkeypatch.setattr(backends, "parse_device", torch.device)
    monkeypatch.setattr(compare, "compare", note)
    assert main("bench", "random:tiny", "--device", "cuda:1").error == "That is enough."
    assert [setting.device for setting in asked] == ["cuda:1"]


@pytest.mark.parametrize(
    ("field", "residue_bytes"),
    [pytest.param("wide", 4, marks=pytest.mark.slow), ("lattice", 6)],
)
def test_what_crosses_is_counted_for_each_run(field: str, residue_bytes: int, main: Main) -> None:
    result = main(
        "bench", "random:tiny", "--modes", "pad-inline, pad", "--rounds", 1, "--field", field,
        "--prompt-tokens", 20, "--new-tokens", 5, "--sustained", 70, "--device", "cpu",
    )  # fmt: skip
    found = result.json
    assert list(found["prefill_s"]) == ["pad-inline", "pad"]
    rows = 20 + 4  # the prompt, and every new token but the last
    qkv, others, head = 64 + 128, (64 + 64) + (64 + 256) + (128 + 64), 64 + 512
    # After the last attention, the rows of the prompt that choose no token are left out.
    residues = 2 * rows * qkv + (rows + 5) * others + 5 * head
    for mode in ("pad-inline", "pad"):
        assert found["calls_per_forward"][mode]["median"] == 2 * 4 + 1
        assert found["tensor_bytes"][mode]["median"] == residue_bytes * residues
    assert list(found["stock_rows"]) == ["pad"]
    assert found["stock_rows"]["pad"] >= rows
    stocks, row_bytes = found["lattice_stock"], 6 * (2 * (qkv + others) + head)
    assert (
        stocks == {}
        if field == "wide"
        else stocks
        == {
            "pad-inline": {"pad_memory": 0, "classes": 64},
            "pad": {"pad_memory": 4096 * row_bytes, "classes": 1},
        }
    )
    assert found["sustained"]["pad"]["tokens"] == 70
    assert found["sustained"]["pad"]["pads_cpu_s_per_token"] > 0
    assert 0 <= found["sustained"]["pad"]["ahead"] <= 1
    for when in ("before", "after"):
        assert 0 <= found["sustained"]["pad"][f"stock_rows_{when}"] <= found["stock_rows"]["pad"]


@pytest.mark.slow
@pytest.mark.parametrize("field", ["wide", "lattice"])
def test_starts_are_measured_without_and_with_the_cache(
    field: str, main: Main, speaking: Path
) -> None:
    result = main(
        "bench", speaking, "--modes", "tee,pad-inline", "--rounds", 1, "--prompt-tokens", 5,
        "--new-tokens", 2, "--starts", "--field", field,
    )  # fmt: skip
    assert result.status == 0, result.stderr
    assert result.json["model"] == speaking.name
    starts = result.json["starts"]
    assert [(start["mode"], start["cache"]) for start in starts] == [
        ("tee", "none"),
        ("pad-inline", "cold"),
        ("pad-inline", "prepared"),
    ]
    for start in starts:
        assert 0 < start["load_s"] < start["process_s"] < 60
        assert len(start["workers_bytes"]) == (0 if start["mode"] == "tee" else 1)
        for peak in (start["tee_bytes"], *start["workers_bytes"]):
            assert 5e7 < peak < 5e9


@pytest.fixture(scope="module")
def expected(small_context: Path, text: Path) -> tuple[float, int]:
    """Perplexity by transformers, window by window; and how many tokens it is over."""
    model = LlamaForCausalLM.from_pretrained(small_context, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(small_context)(text.read_text())["input_ids"]
    assert len(ids) > 200
    losses = []
    for first in range(0, len(ids), 100):
        window = torch.tensor(ids[first : first + 100])
        with torch.no_grad():
            logits_TV = model(window[None]).logits[0, :-1].double()
        losses += torch.nn.functional.cross_entropy(
            logits_TV, window[1:], reduction="none"
        ).tolist()
    return math.exp(sum(losses) / len(losses)), len(losses)


@pytest.mark.slow
def test_perplexity_is_that_of_transformers_and_pads_change_nothing(
    main: Main, small_context: Path, text: Path, expected: tuple[float, int]
) -> None:
    result = main("bench", "accuracy", small_context, "--text", text, "--chunk", 30)
    assert result.status == 0, result.stderr
    found = result.json
    assert (found["window"], found["scored"]) == (100, expected[1])
    modes = {(m["privacy"], m["fixed_point"], m["field"]): m for m in found["modes"]}
    assert list(modes) == [
        ("tee", False, None),
        ("tee", True, "wide"),
        ("pad", False, "wide"),
        ("tee", True, "compact"),
        ("pad", False, "compact"),
        ("tee", True, "lattice"),
        ("pad", False, "lattice"),
    ]
    assert modes["tee", False, None]["perplexity"] == pytest.approx(expected[0], rel=1e-4)
    for field in ("wide", "compact", "lattice"):
        reference, pad = modes["tee", True, field], modes["pad", False, field]
        assert pad["equal"] is True
        assert pad["perplexity"] == reference["perplexity"] != expected[0]
        assert 0.9 < pad["relative"] < 1.1
        assert 0.5 < pad["agreement"] <= 1


def test_kernels_are_timed_in_every_field(
    main: Main, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kernel_times, "SHAPES", {"o": (64, 32)})
    monkeypatch.setattr(kernel_times, "TOKENS", (1, 130))
    monkeypatch.setattr(timing, "SAMPLE_S", 0.001)
    monkeypatch.setattr(kernel_times, "ROUNDS", 2)
    result = main("bench", "kernels", "--out", tmp_path / "kernels.json")
    assert result.status == 0, result.stderr
    found = result.json["kernels"]
    assert [(each["field"], each["tokens"]) for each in found] == [
        ("wide", 1), ("wide", 130), ("compact", 1), ("compact", 130),
        ("lattice", 1), ("lattice", 130),
    ]  # fmt: skip
    targets = result.json["target_ns"]
    assert targets == {"wide": 1.5, "compact": 1.5, "lattice": 2.0}
    assert result.json["lattice_target_element_ns"] == 2.8
    floor = result.json["transform_ns"]
    assert floor["without_noise"] > 0 and floor["with_noise"] > 0
    for each in found:
        for part in ("mask_ns", "unmask_ns"):
            assert each["pair_ns"]["most"] > each[part]["least"] > 0
        assert set(each["random_ns"]) == set(each["pad_element_ns"]) == FIGURE
        assert (each["pad_product_ps"] is None) is (each["field"] == "lattice")
    one, many = found[0]["pair_ns"], found[1]["pair_ns"]
    assert one["median"] > many["median"]  # a call costs something beside its elements


def test_kernels_of_chosen_widths_stand_beside_the_plain_product(
    main: Main, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kernel_times, "ROUNDS", 1)
    monkeypatch.setattr(timing, "SAMPLE_S", 0.001)
    result = main("bench", "kernels", "--widths", "64,32", "--out", tmp_path / "kernels.json")
    assert result.status == 0, result.stderr
    found = result.json["kernels"]
    assert [(each["width"], each["features"]) for each in found] == [
        shape for shape in ((32, 32), (32, 128), (64, 64), (64, 256)) for _ in range(3)
    ]
    assert {each["tokens"] for each in found} == {64}
    for each in found:
        assert set(each["float32_us"]) == set(each["bfloat16_us"]) == FIGURE


def test_attention_is_timed_for_each_number_of_sequences_and_length(
    main: Main, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(attention_times, "LEAST_BYTES", 2**16)
    monkeypatch.setattr(attention_times, "ROUNDS", 2)
    given = ["random:tiny", "--sequences", "3,1", "--tokens", "5", "--dtype", "bfloat16"]
    result = main("bench", "attention", *given, "--out", tmp_path / "attention.json")
    assert result.status == 0, result.stderr
    found = result.json["attention"]
    assert [(each["sequences"], each["tokens"]) for each in found] == [(1, 5), (3, 5)]
    for each in found:
        assert set(each["layer_us"]) == set(each["over_contiguous"]) == FIGURE


def test_attention_of_more_tokens_than_the_model_takes_is_refused(main: Main) -> None:
    result = main("bench", "attention", "random:tiny", "--tokens", "100000")
    refused(result, "--tokens: random:tiny takes at most", 2)


@pytest.mark.parametrize("widths", ["", "0", "8193", "64,-1", "64.5", "²"])
def test_kernel_widths_that_cannot_be_measured_are_refused(main: Main, widths: str) -> None:
    refused(
        main("bench", "kernels", "--widths", widths), "--widths takes numbers from 1 to 8192", 2
    )


def refused(result: Result, sentence: str, status: int = 1) -> None:
    assert (result.status, result.stdout) == (status, ""), result
    assert sentence in result.error


def test_an_unknown_mode_is_refused(main: Main) -> None:
    result = main("bench", "random:tiny", "--modes", "tee,secret")
    refused(result, "no such mode to compare; choose transformers, transformers-worker, tee", 2)


def test_no_mode_at_all_is_refused(main: Main) -> None:
    refused(main("bench", "random:tiny", "--modes", " , "), "names nothing to compare", 2)


def test_an_unknown_field_is_refused(main: Main) -> None:
    refused(main("bench", "random:tiny", "--field", "vast"), "choose wide, compact or lattice", 2)


def test_more_tokens_than_the_context_are_refused(main: Main) -> None:
    refused(main("bench", "random:tiny"), "more than the context of 512 tokens; ask for fewer", 2)


def test_a_text_that_is_not_there_is_refused(main: Main, tmp_path: Path) -> None:
    path = tmp_path / "missing.txt"
    result = main("bench", "accuracy", "random:tiny", "--text", path)
    refused(result, f"Cannot read {path}: No such file")


def test_a_text_that_is_not_utf8_is_refused(main: Main, tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9")
    result = main("bench", "accuracy", "random:tiny", "--text", path)
    refused(result, f"{path} is not valid UTF-8")


@pytest.mark.parametrize("words", ["", "a"])
def test_a_text_that_is_too_short_is_refused(
    words: str, main: Main, small_context: Path, tmp_path: Path
) -> None:
    path = tmp_path / "short.txt"
    path.write_text(words)
    result = main("bench", "accuracy", small_context, "--text", path)
    refused(result, f"{path} has fewer than two tokens")


def test_a_text_for_a_model_without_tokenizer_is_refused(main: Main, text: Path) -> None:
    result = main("bench", "accuracy", "random:tiny", "--text", text)
    refused(result, "random:tiny has no tokenizer to read")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["random:tiny", "--rounds", "0"], "--rounds must be an integer, 1 or more"),
        (["random:tiny", "--prompt-tokens", "0"], "--prompt-tokens must be "),
        (["random:tiny", "--new-tokens", "1"], "--new-tokens must be "),
        (["random:tiny", "--batch", "0"], "--batch must be "),
        (["random:tiny", "--sustained", "-1"], "--sustained must be "),
        (["random:tiny", "--threads", "0"], "--threads must be "),
        (["random:tiny", "--rounds", "many"], "--rounds must be an integer, 1 or more"),
        (["random:tiny", "--device", "moon"], "There is no such device"),
        (["random:tiny", "--dtype", "float8", "--prompt-tokens", "9"], "no such dtype"),
        (["random:huge"], "There is no such random model"),
        (["transport", "--calls", "1"], "--calls must be "),
        (["scaling", "--widths", "100"], "--widths"),
        (["scaling", "--plot", "nowhere/plot.svg"], "There is no folder nowhere/ for --plot"),
        (["kernels", "--rounds", "1"], "There is no such option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_impossible_benchmark_does_not_begin(
    arguments: list[str], words: str, main: Main
) -> None:
    result = main("bench", *arguments)
    assert result.status in (1, 2)
    assert result.stdout == ""
    assert words in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["kernels", "accuracy"])
def test_no_benchmark_overwrites_a_result(
    command: str, main: Main, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "result.json"
    out.write_text("precious")
    model = ["random:tiny", "--text", text] if command == "accuracy" else []
    refused(main("bench", command, *model, "--out", out), f"{out} exists", 2)
    assert out.read_text() == "precious"
