"""The digest of a model changes with every byte that is used, and with nothing else."""

import hashlib
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model_helpers import WriteGGUF, make_model
from tsqp import LLM
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.checkpoint.model_digest import compute_digest
from tsqp.checkpoint.weights_digest import weights_digest
from tsqp.errors import UnexpectedModel, UsageError

MODES: dict[str, list[dict[str, Any]]] = {
    "float": [
        {"privacy": "tee"},
        {"privacy": "open", "worker": "inproc"},
        {"privacy": "open", "worker": "inproc", "fuse": "layer"},
    ],
    "integers": [
        {"privacy": "tee", "fixed_point": True},
        {"privacy": "pad", "worker": "inproc"},
        {"privacy": "shares", "worker": ["inproc"] * 2, "insecure_same_host": True},
    ],
}
FORMS = pytest.mark.parametrize("form", MODES)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSQP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(directory: Path) -> Path:
    """A checkpoint with all small files; what they hold is not looked at here."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt"):
        (directory / name).write_text(f"content of {name}")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "rag.jinja").write_text("another template")
    return directory


def digest_of(model: Path | str, form: str, dtype: torch.dtype = torch.float32) -> str:
    checkpoint = open_checkpoint(str(model))
    files = checkpoint.file_digests()
    found = compute_digest(checkpoint, files, dtype, integers=form == "integers")
    checkpoint.close()
    return found


def of_tensor(name: str, change: Callable[[torch.Tensor], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors[name])
        save_file(tensors, path, metadata={"format": "pt"})

    return edit


def of_json(name: str, **changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def of_text(name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        with (folder / name).open("a") as file:
            file.write(" ")

    return edit


def negate_one(tensor: torch.Tensor) -> None:
    tensor.view(-1)[3].neg_()


CHANGES: dict[str, Callable[[Path], None]] = {
    "config": of_json("config.json", rms_norm_eps=2e-5),
    "generation config": of_json("generation_config.json", eos_token_id=9),
    "no generation config": lambda folder: (folder / "generation_config.json").unlink(),
    "tokenizer": of_text("tokenizer.json"),
    "tokenizer config": of_text("tokenizer_config.json"),
    "template": of_text("chat_template.jinja"),
    "another template": of_text("additional_chat_templates/rag.jinja"),
    "new template": lambda f: (f / "additional_chat_templates" / "x.jinja").touch(),
    "merges": of_text("merges.txt"),
    "new file": lambda folder: (folder / "added_tokens.json").touch(),
    "norm": of_tensor("model.layers.1.input_layernorm.weight", negate_one),
    "final norm": of_tensor("model.norm.weight", negate_one),
    "bias": of_tensor("model.layers.0.mlp.up_proj.bias", negate_one),
    "embedding": of_tensor("model.embed_tokens.weight", lambda table: table[17].neg_()),
    "weight": of_tensor("model.layers.1.self_attn.v_proj.weight", negate_one),
    "scale": of_tensor("model.layers.1.mlp.gate_proj.weight", lambda weight: weight[5].mul_(2)),
    "head": of_tensor("lm_head.weight", negate_one),
}


@FORMS
def test_every_change_changes_the_digest(form: str, folder: Path) -> None:
    digests = [digest_of(folder, form)]
    for change in CHANGES.values():
        change(folder)
        digests.append(digest_of(folder, form))
    assert len(set(digests)) == len(CHANGES) + 1


@FORMS
def test_shards_and_files_that_are_not_used_do_not_change_it(
    form: str, model: Any, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    (tmp_path / "many" / "README.md").write_text("x")
    assert digest_of(tmp_path / "one", form) == digest_of(tmp_path / "many", form)


def test_it_is_what_the_documentation_says(folder: Path) -> None:
    def sha256(content: bytes) -> str:
        return hashlib.sha256(content).hexdigest()

    names = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    names += ["chat_template.jinja", "merges.txt", "additional_chat_templates/rag.jinja"]
    entries = {f"file {name}": sha256((folder / name).read_bytes()) for name in names}
    entries["form"] = sha256(b"bfloat16")
    entries["weights"] = weights_digest(open_checkpoint(str(folder)), torch.bfloat16)
    lines = ["tsqp-model-1", *(f'{entries[name]} "{name}"' for name in sorted(entries))]
    expected = "sha256:" + sha256("\n".join(lines).encode())
    assert digest_of(folder, "float", torch.bfloat16) == expected


@pytest.mark.parametrize("tied", [False, True])
@FORMS
def test_all_modes_of_a_form_have_the_digest_that_is_computed_without_a_run(
    form: str, tied: bool, tmp_path: Path
) -> None:
    make_model(tie_word_embeddings=tied).save_pretrained(tmp_path / "model")
    expected = digest_of(tmp_path / "model", form, torch.bfloat16)
    for options in MODES[form]:
        with LLM(
            str(tmp_path / "model"), dtype="bfloat16", expect_model=expected, **options
        ) as llm:
            assert llm.model_digest == expected, options


def test_forms_and_dtypes_differ() -> None:
    found = {
        digest_of("random:tiny", form, dtype)
        for form in MODES
        for dtype in (torch.float32, torch.float16)
    }
    assert len(found) == 4
    assert digest_of("random:tiny:1", "float") not in found


@FORMS
def test_a_gguf_file_is_covered_with_its_tokenizer_and_template(
    form: str, write_gguf: WriteGGUF
) -> None:
    def written(change: bool = False, **options: Any) -> str:
        model = make_model()
        if change:
            with torch.no_grad():
                negate_one(model.model.norm.weight)
        return digest_of(write_gguf(model, **options), form)

    template = "tokenizer.chat_template"
    plain = {"tokens": ["a", "b"], "metadata": {template: "x"}}
    assert written(**plain) == written(**plain)
    found = {
        written(**plain),
        written(tokens=["a", "c"], metadata={template: "x"}),
        written(tokens=["a", "b"], metadata={template: "y"}),
        written(change=True, **plain),
    }
    assert len(found) == 4


def test_what_is_hashed_is_what_was_read_when_the_checkpoint_was_opened(folder: Path) -> None:
    before = digest_of(folder, "float")
    checkpoint = open_checkpoint(str(folder))
    CHANGES["config"](folder)
    CHANGES["generation config"](folder)
    files = checkpoint.file_digests()
    assert compute_digest(checkpoint, files, torch.float32, integers=False) == before


@pytest.mark.parametrize("privacy", ["open", "pad"])
def test_another_model_is_refused_before_anything_is_sent(privacy: str, tmp_path: Path) -> None:
    path = tmp_path / "worker.sock"
    expected = digest_of("random:tiny:1", "integers")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.setblocking(False)
        with pytest.raises(UnexpectedModel, match=rf"random:tiny:0 has .* asks for {expected}"):
            LLM("random:tiny", privacy=privacy, worker=f"ipc://{path}", expect_model=expected)
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.parametrize("privacy", ["tee", "pad"])
def test_another_model_than_expected_is_refused_without_a_worker_too(privacy: str) -> None:
    worker = {"worker": "inproc"} if privacy == "pad" else {}
    with pytest.raises(UnexpectedModel, match=r"asks for sha256:0000.*--dtype"):
        LLM("random:tiny", privacy=privacy, expect_model="sha256:" + "0" * 64, **worker)


@pytest.mark.parametrize(
    "digest",
    ["", "0" * 64, "sha256:" + "0" * 63, "sha256:" + "A" * 64, "sha256:" + "0" * 64 + "\n"],
)
def test_what_is_no_digest_is_a_usage_error(digest: str) -> None:
    with pytest.raises(UsageError, match=r"sha256: and 64 hexadecimal digits"):
        LLM("random:tiny", privacy="tee", expect_model=digest)
