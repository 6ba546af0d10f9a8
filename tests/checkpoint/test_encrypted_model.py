"""Encrypted models: the same numbers, and nothing else than what was encrypted."""

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from prepared_helpers import change_byte

from tsqp import LLM, SamplingParams
from tsqp.checkpoint import encrypt_model as encrypting
from tsqp.checkpoint import encrypted_file
from tsqp.checkpoint.checkpoint import Checkpoint, open_checkpoint
from tsqp.checkpoint.encrypt_model import encrypt_model
from tsqp.checkpoint.encrypted_file import (
    KIND,
    MAGIC,
    TAG_BYTES,
    EncryptedFile,
    EncryptedModel,
    write_encrypted,
)
from tsqp.checkpoint.encrypted_folder import model_files
from tsqp.checkpoint.integer_cache import load_integers
from tsqp.checkpoint.model_digest import compute_digest
from tsqp.checkpoint.model_key import ModelKey, new_model_key, read_model_key
from tsqp.checkpoint.prepared import SUFFIX, prepare
from tsqp.checkpoint.progress import Counter
from tsqp.errors import CheckpointError, UsageError
from tsqp.model.config import linear_groups
from tsqp.runtime import hints_cache
from tsqp.runtime.hints_cache import hints_path

CHUNK = 4096
KEY, OTHER_KEY = ModelKey(bytes(range(32))), ModelKey(bytes(32))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks so small that a tiny model has many of them."""
    monkeypatch.setattr(encrypted_file, "CHUNK_BYTES", CHUNK)


def write(path: Path, content: bytes, key: ModelKey = KEY) -> Path:
    """One encrypted file, which is a whole model."""
    with path.open("wb") as file:
        write_encrypted(
            file, key, lambda offset, count: content[offset : offset + count], len(content),
            name="", model=bytes(16), files=[""], done=Counter(len(content)),
        )  # fmt: skip
    return path


def read(path: Path, key: ModelKey = KEY) -> bytes:
    with closing(EncryptedFile(path, key)) as file:
        return file.read(0, file.size)


def chunks_of(path: Path) -> tuple[bytes, list[bytes]]:
    """What stands before the chunks, and the chunks as they are stored."""
    raw = path.read_bytes()
    start = len(MAGIC) + 4 + int.from_bytes(raw[len(MAGIC) : len(MAGIC) + 4], "little")
    step = CHUNK + TAG_BYTES
    return raw[:start], [raw[place : place + step] for place in range(start, len(raw), step)]


def with_header(path: Path, **changes: object) -> bytes:
    """What stands before the chunks, with other values in the header."""
    before, _ = chunks_of(path)
    text = json.dumps(json.loads(before[len(MAGIC) + 4 :]) | changes).encode()
    return MAGIC + len(text).to_bytes(4, "little") + text


@pytest.fixture
def content() -> bytes:
    """Two whole chunks, and a part of one."""
    return bytes(number * number % 251 for number in range(2 * CHUNK + 1000))


@pytest.fixture
def file(tmp_path: Path, content: bytes) -> Path:
    return write(tmp_path / "file", content)


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_every_range_of_a_file_reads_as_it_was(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encrypted_file, "READ_BYTES", 2 * CHUNK)
    content = bytes(number % 251 for number in range(size))
    edges = [edge for chunk in (0, CHUNK, 2 * CHUNK) for edge in (chunk, chunk + 1, chunk + 9)]
    with closing(EncryptedFile(write(tmp_path / "file", content), KEY)) as file:
        assert file.size == size
        for begin in edges:
            for end in (*edges, size):
                if begin <= end <= size:
                    assert file.read(begin, end - begin) == content[begin:end]
        for begin in (0, size):
            with pytest.raises(CheckpointError, match="cut short"):
                file.read(begin, size - begin + 1)


def test_every_changed_byte_is_noticed(file: Path) -> None:
    size, start = file.stat().st_size, len(chunks_of(file)[0])
    for place in [*range(start), *range(start, size, 29), size - 1]:
        change_byte(file, place)
        with pytest.raises(CheckpointError, match=r"^\S+ (is|was) [^.]*: [^.]*\.$|another key"):
            read(file)
        change_byte(file, place)
    read(file)


def test_a_file_of_another_length_is_refused_when_it_is_opened(file: Path) -> None:
    raw, (before, chunks) = file.read_bytes(), chunks_of(file)
    whole = [before, *chunks]
    cuts = [sum(map(len, whole[:number])) for number in range(1, len(whole))]
    for wrong in [*(raw[:cut] for cut in (*cuts, len(raw) - 1)), raw + b"\0", raw + chunks[-1]]:
        file.write_bytes(wrong)
        with pytest.raises(CheckpointError, match="cut short or too long: fetch it again"):
            EncryptedFile(file, KEY)
    for cut in range(len(before)):
        file.write_bytes(raw[:cut])
        with pytest.raises(CheckpointError):
            EncryptedFile(file, KEY)


@pytest.mark.parametrize("left", [1, 2])
def test_a_header_that_hides_missing_chunks_is_noticed(left: int, file: Path) -> None:
    _, chunks = chunks_of(file)
    file.write_bytes(with_header(file, size=left * CHUNK) + b"".join(chunks[:left]))
    with pytest.raises(CheckpointError, match="was changed after it was encrypted"):
        read(file)


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 0, 2), (1, 1, 2)])
def test_chunks_in_another_order_are_noticed(order: tuple[int, ...], file: Path) -> None:
    before, chunks = chunks_of(file)
    file.write_bytes(before + b"".join(chunks[number] for number in order))
    with pytest.raises(CheckpointError, match="was changed after it was encrypted"):
        read(file)


def test_a_chunk_of_another_file_is_noticed(file: Path, content: bytes, tmp_path: Path) -> None:
    (before, mine), (_, theirs) = chunks_of(file), chunks_of(write(tmp_path / "other", content))
    file.write_bytes(before + mine[0] + theirs[1] + mine[2])
    with pytest.raises(CheckpointError, match="was changed after it was encrypted"):
        read(file)


def test_equal_chunks_look_different_in_one_file_and_in_two(tmp_path: Path) -> None:
    content = bytes(3 * CHUNK)
    files = [write(tmp_path / name, content) for name in ("one", "two")]
    chunks = [chunk for file in files for chunk in chunks_of(file)[1]]
    assert len({chunk[:CHUNK] for chunk in chunks}) == len(chunks) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: write(file, b"content", OTHER_KEY), "encrypted with another key than"),
        (lambda file: file.write_bytes(b"GGUF" * 100), "is not encrypted, but --model-key-file"),
        (lambda file: file.write_bytes(b""), "is not encrypted, but --model-key-file"),
        (lambda file: file.write_bytes(KIND + b"2" + bytes(99)), "by another version of tsqp"),
        (lambda file: file.write_bytes(MAGIC + b"\xff" * 99), "changed after it was encrypted"),
        (lambda file: file.write_bytes(MAGIC + b"\2\0\0\0[]"), "changed after it was encrypted"),
        (
            lambda file: file.write_bytes(
                with_header(file, name="other") + b"".join(chunks_of(file)[1])
            ),
            "changed after it was encrypted",
        ),
        (
            lambda file: file.write_bytes(with_header(file, chunk_bytes=2**30)),
            "changed after it was encrypted",
        ),
        (
            lambda file: file.write_bytes(with_header(file, more=1)),
            "changed after it was encrypted",
        ),
    ],
)
def test_what_cannot_be_decrypted_is_one_sentence(
    change: Callable[[Path], object], message: str, file: Path
) -> None:
    change(file)
    with pytest.raises(CheckpointError, match=message):
        EncryptedFile(file, KEY)


@pytest.fixture(params=["directory", "sharded", "gguf"])
def plain(request: pytest.FixtureRequest) -> Path:
    """A model in each of its forms."""
    if request.param == "gguf":
        path: Path = request.getfixturevalue("write_gguf")(request.getfixturevalue("model"))
    else:
        path = request.getfixturevalue(request.param)
        (path / "additional_chat_templates").mkdir()
        (path / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    return path


@pytest.fixture
def encrypted(plain: Path, tmp_path: Path) -> Path:
    out = tmp_path / f"encrypted{plain.suffix}"
    encrypt_model(str(plain), out, KEY)
    return out


def digest_of(checkpoint: Checkpoint) -> str:
    return compute_digest(checkpoint, checkpoint.file_digests(), torch.float32, integers=False)


def test_an_encrypted_model_has_the_digest_of_the_plain_one(plain: Path, encrypted: Path) -> None:
    with (
        closing(open_checkpoint(str(plain))) as before,
        closing(open_checkpoint(str(encrypted), key=KEY)) as after,
    ):
        assert digest_of(before) == digest_of(after)
        assert before.file_digests() == after.file_digests()


def test_an_encrypted_model_needs_its_key(plain: Path, encrypted: Path) -> None:
    with pytest.raises(EncryptedModel, match="encrypted: give its key with --model-key-file"):
        open_checkpoint(str(encrypted))
    with pytest.raises(CheckpointError, match="encrypted with another key"):
        open_checkpoint(str(encrypted), key=OTHER_KEY)
    with pytest.raises(CheckpointError, match="is not encrypted, but --model-key-file was given"):
        open_checkpoint(str(plain), key=KEY)
    with pytest.raises(CheckpointError, match="is not encrypted: leave --model-key-file out"):
        open_checkpoint("random:tiny", key=KEY)


def test_nothing_of_the_plain_model_is_in_the_encrypted_one(plain: Path, encrypted: Path) -> None:
    files = [plain] if plain.is_file() else [path for path in plain.rglob("*") if path.is_file()]
    copies = [encrypted] if encrypted.is_file() else list(encrypted.rglob("*.*"))
    stored = b"".join(path.read_bytes() for path in copies if path.is_file())
    for path in files:
        content = path.read_bytes()
        pieces = {content[place : place + 32] for place in range(0, len(content) - 31, 1000)}
        assert not any(piece in stored for piece in pieces if len(set(piece)) > 4), path


def load_all(folder: Path) -> None:
    with closing(open_checkpoint(str(folder), key=KEY)) as checkpoint:
        digest_of(checkpoint)


@pytest.fixture
def folder(sharded: Path, tmp_path: Path) -> Path:
    """An encrypted folder of several shards."""
    encrypt_model(str(sharded), tmp_path / "encrypted", KEY)
    return tmp_path / "encrypted"


def test_swapped_files_of_a_folder_are_refused(folder: Path) -> None:
    one, two, *_ = sorted(folder.glob("*.safetensors"))
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"was encrypted as 'model-.*: give it that name"):
        load_all(folder)


@pytest.mark.parametrize("name", ["generation_config.json", "model-00002*"])
def test_files_of_two_encryptions_do_not_mix(name: str, folder: Path, sharded: Path) -> None:
    other = folder.with_name("other")
    encrypt_model(str(sharded), other, KEY)
    [path] = other.glob(name)
    shutil.copy(path, folder / path.name)
    with pytest.raises(CheckpointError, match=r"was not encrypted together with .*config\.json"):
        load_all(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model-00002*"])
def test_a_missing_file_is_refused_even_if_a_model_could_do_without(
    name: str, folder: Path
) -> None:
    [path] = folder.glob(name)
    path.unlink()
    with pytest.raises(
        CheckpointError, match=f"no file .*{path.name}|lacks its file .*{path.name}"
    ):
        load_all(folder)


def test_a_file_that_was_added_is_not_read(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("Something else")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("Something else")
    shutil.copy(folder / "config.json", folder / "model.safetensors")
    files = model_files(folder, KEY)
    assert files.read("chat_template.jinja") is None
    assert files.names("additional_chat_templates") == []
    load_all(folder)


def test_a_plain_file_in_the_place_of_an_encrypted_one_is_refused(
    folder: Path, sharded: Path
) -> None:
    shutil.copy(sharded / "generation_config.json", folder)
    with pytest.raises(CheckpointError, match="is not encrypted, but"):
        load_all(folder)


def test_what_is_made_of_an_encrypted_model_is_not_kept_on_disk(
    encrypted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("TSQP_CACHE", str(cache))
    monkeypatch.setattr(hints_cache, "MIN_WEIGHTS", 0)
    with closing(open_checkpoint(str(encrypted), key=KEY)) as checkpoint:
        load_integers(checkpoint, lambda group, weights: None)
        shapes = {group: group.shape for group in linear_groups(checkpoint.config)}
        assert hints_path(checkpoint, shapes) is None
    assert not cache.exists()
    out = tmp_path / f"out{SUFFIX}"
    with pytest.raises(UsageError, match="a prepared file would hold its weights in plain"):
        prepare(str(encrypted), out)
    assert not out.exists()


def test_a_worker_of_a_split_mode_gets_the_key_and_a_warning_says_what_that_means(
    directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, key_file = tmp_path / "encrypted", tmp_path / "key"
    encrypt_model(str(directory), out, new_model_key(key_file))
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    with LLM(str(directory), privacy="tee") as llm:
        expected = llm.generate([[1, 2, 3]], params)[0].token_ids
    with LLM(str(out), privacy="open", worker="local", model_key_file=key_file) as llm:
        assert llm.generate([[1, 2, 3]], params)[0].token_ids == expected
    assert "workers hold the weights in plain" in caplog.text


def test_a_key_file_is_new_and_for_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "key"
    content = write(tmp_path / "file", b"content", new_model_key(path))
    assert path.stat().st_mode & 0o777 == 0o600
    assert read(content, read_model_key(path)) == b"content"
    with pytest.raises(UsageError, match="File exists"):
        new_model_key(path)
    path.chmod(0o640)
    with pytest.raises(UsageError, match="Other users have access"):
        read_model_key(path)


@pytest.mark.parametrize("text", ["", "tsqp-model-key 00\n", "0" * 64, "# only a comment\n"])
def test_a_file_without_a_key_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(UsageError, match="does not hold the key of a model"):
        read_model_key(path)
    with pytest.raises(UsageError, match="Cannot read the model's key"):
        read_model_key(tmp_path / "absent")


def test_no_text_form_of_a_key_shows_it() -> None:
    assert KEY._secret.hex() not in f"{KEY!r} {KEY}" and repr(KEY._secret) not in f"{KEY!r} {KEY}"


def test_what_cannot_be_encrypted_is_refused(directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    encrypt_model(str(directory), out, KEY)
    for model, to, message in (
        (str(directory), out, "exists"),
        (str(out), tmp_path / "again", "is encrypted already"),
        ("random:tiny", tmp_path / "again", "Random weights"),
    ):
        with pytest.raises(UsageError, match=message):
            encrypt_model(model, to, KEY)


def test_an_interrupted_encryption_leaves_nothing(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encrypting, "write_encrypted", fail)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="No space left on device"):
        encrypt_model(str(directory), tmp_path / "out", KEY)
    assert sorted(tmp_path.iterdir()) == before
