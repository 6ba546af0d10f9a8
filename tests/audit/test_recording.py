"""What is written down can be read back, and nothing else can be taken for it."""

import json
import os
from pathlib import Path

import pytest
import torch
from audit_helpers import (
    COMPACT,
    CONFIG,
    FIRST,
    MODEL,
    PROMPT,
    WIDE,
    WIDTHS,
    activations,
    noise,
    write,
)
from safetensors.torch import load_file, save_file

from tsqp.audit.auditor import Auditor
from tsqp.audit.recording import Recording, add, open_recording
from tsqp.errors import PromptError, RecordingError, UsageError
from tsqp.gpu.record import INDEX, Recorder
from tsqp.wire.messages import (
    Allocate,
    AttentionScores,
    Embed,
    Free,
    Linear,
    Span,
    Weighted,
    WeightedValues,
    place_of,
)

SESSION = "session-1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "recording", noise(1), WIDE)


def read(folder: Path) -> Recording:
    return open_recording(folder, CONFIG, MODEL)


def change(folder: Path, line: int, **fields: object) -> None:
    path = folder / SESSION / INDEX
    lines = path.read_text().splitlines()
    lines[line] = json.dumps(json.loads(lines[line]) | fields)
    path.write_text("\n".join(lines) + "\n")


def test_what_was_written_is_read(folder: Path) -> None:
    recording = read(folder)
    assert recording.groups() == list(WIDTHS)
    assert recording.field == WIDE
    assert recording.prompt_tokens == len(PROMPT)
    for key, rows_ND in noise(1).items():
        assert torch.equal(recording.rows(key), rows_ND)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activations_are_read_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    rows = {key: each.to(dtype) for key, each in activations().items()}
    recording = read(write(tmp_path / "a", rows, None))
    assert recording.field is None
    assert torch.equal(recording.numbers(FIRST), rows[FIRST].float())


def test_residues_are_centred(tmp_path: Path) -> None:
    rows = noise(1, COMPACT)
    rows[FIRST][0, :4] = torch.tensor([0, COMPACT.half, COMPACT.half + 1, COMPACT.p - 1])
    numbers = read(write(tmp_path / "a", rows, COMPACT)).numbers(FIRST)
    assert numbers[0, :4].tolist() == [0, COMPACT.half, -COMPACT.half, -1]


def test_an_embedding_call_is_written_and_not_read(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "a")
    recorder.note(1, Embed(), [torch.tensor([4, 5])])
    recorder.note(1, Linear(*place_of(FIRST)), [torch.ones(2, 64)])
    assert (tmp_path / "a" / SESSION / "000001.safetensors").is_file()
    assert [call.group for call in read(tmp_path / "a").calls] == [FIRST]


def test_calls_about_kept_keys_and_values_are_written_whole_and_not_read(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "a")
    q, k, v = torch.rand(5, 4, 16), torch.rand(5, 2, 16), torch.rand(5, 2, 16)
    recorder.note(1, Allocate(7, 100), [])
    recorder.note(1, AttentionScores(0, (Span(7, 0, 2), Span(8, 3, 3))), [q, k, v])
    recorder.note(1, WeightedValues(0, (Weighted(7, 2, 2),)), [torch.ones(16)])
    recorder.note(1, Linear(*place_of(FIRST)), [torch.ones(2, 64)])
    recorder.note(1, Free(7), [])
    session = tmp_path / "a" / SESSION
    lines = [json.loads(line) for line in (session / INDEX).read_text().splitlines()]
    assert [line["operation"] for line in lines] == [
        "allocate", "attention_scores", "weighted_values", "linear", "free"
    ]  # fmt: skip
    assert [line["sequences"] for line in lines] == [
        [[7, 100]], [[7, 0, 2], [8, 3, 3]], [[7, 2, 2]], [], [[7]]
    ]  # fmt: skip
    found = load_file(session / lines[1]["tensor"])
    assert all(torch.equal(found[name], x) for name, x in {"q": q, "k": k, "v": v}.items())
    assert [call.group for call in read(tmp_path / "a").calls] == [FIRST]


def test_each_session_has_its_folder(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "a")
    for session in (1, 2, 1):
        recorder.note(session, Linear(*place_of(FIRST)), [torch.full((1, 64), float(session))])
    error = r"holds 2 sessions; name one, as .*/session-1"
    with pytest.raises(RecordingError, match=error):
        read(tmp_path / "a")
    for session, rows in ((1, 2), (2, 1)):
        recording = read(tmp_path / "a" / f"session-{session}")
        assert recording.rows(FIRST).tolist() == [[float(session)] * 64] * rows


def test_a_recording_is_for_this_user_alone(folder: Path) -> None:
    assert folder.stat().st_mode & 0o077 == 0
    assert (folder / SESSION).stat().st_mode & 0o077 == 0


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(UsageError, match="is not empty; record in a new folder"):
        Recorder(tmp_path)


def test_a_folder_in_place_of_which_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecordingError, match=r"Cannot record in .*/file: File exists"):
        Recorder(tmp_path / "file")


def test_half_a_line_at_the_end_is_passed_over(folder: Path) -> None:
    path = folder / SESSION / INDEX
    whole = read(folder).calls
    path.write_bytes(path.read_bytes()[:-20])
    assert read(folder).calls == whole[:-1]


def test_a_call_without_its_line_is_passed_over(folder: Path) -> None:
    (folder / SESSION / "000999.safetensors").touch()
    (folder / SESSION / "001000.part").touch()
    assert len(read(folder).calls) == len(WIDTHS)


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        "",
        "nonsense",
        "[" * 100_000,
        "\u0000",
        '{"call":2,"session":1,"operation":"product","layer":0,"group":"qkv","field":"wide",'
        '"rows":99999999999,"tensor":"000002.safetensors"}',
        '{"call":2,"session":1,"operation":"product","layer":0,"group":"qkv","field":"wide",'
        '"rows":4,"tensor":"../000002.safetensors"}',
        '{"call":2,"session":1,"operation":"product","layer":0,"group":"qkv","field":"mine",'
        '"rows":4,"tensor":"000002.safetensors"}',
    ],
)
def test_a_damaged_line_is_named(line: str, folder: Path) -> None:
    path = folder / SESSION / INDEX
    first, _, *others = path.read_text().splitlines()
    path.write_text("\n".join([first, line, *others]) + "\n")
    with pytest.raises(RecordingError, match=r"Line 2 of .*calls\.jsonl is damaged"):
        read(folder)


def test_calls_out_of_order_are_refused(folder: Path) -> None:
    change(folder, 3, call=9)
    with pytest.raises(RecordingError, match=r"Line 4 of .* is not call 4"):
        read(folder)


@pytest.mark.parametrize("fields", [{"layer": 2}, {"group": "kv"}, {"layer": -1}])
def test_a_group_that_the_model_lacks_is_another_model(
    fields: dict[str, object], folder: Path
) -> None:
    change(folder, 0, **fields)
    with pytest.raises(RecordingError, match="was not recorded with random:tiny"):
        read(folder)


def test_two_modes_in_one_session_are_refused(folder: Path) -> None:
    change(folder, 1, field="compact")
    with pytest.raises(RecordingError, match="mixes privacy modes or fields"):
        read(folder)


@pytest.mark.parametrize(
    ("contents", "error"),
    [
        ({"input": torch.zeros(40, 65, dtype=torch.int32)}, "was not recorded with random:tiny"),
        ({"input": torch.zeros(40, 64)}, "is damaged"),
        ({"other": torch.zeros(40, 64, dtype=torch.int32)}, "is damaged"),
        (None, "lacks its file"),
        (b"", "is damaged"),
        (b"\xff" * 100, "is damaged"),
        (b"\x02" + bytes(7) + b"{}", "is damaged"),
    ],
)
def test_a_tensor_that_is_not_what_its_line_says_is_named(
    contents: object, error: str, folder: Path
) -> None:
    path = folder / SESSION / "000001.safetensors"
    if contents is None:
        path.unlink()
    elif isinstance(contents, bytes):
        path.write_bytes(contents)
    else:
        save_file(contents, path)  # type: ignore[arg-type]
    with pytest.raises(RecordingError, match=rf"000001\.safetensors.*{error}|{error}.*000001"):
        read(folder).rows(FIRST)


def test_a_tensor_cut_short_is_named(folder: Path) -> None:
    path = folder / SESSION / "000001.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(RecordingError, match="is damaged"):
        read(folder).rows(FIRST)


def test_activations_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    rows = activations()
    rows[FIRST][3, 4] = float("nan")
    recording = read(write(tmp_path / "a", rows, None))
    with pytest.raises(RecordingError, match="holds NaN or infinity"):
        recording.rows(FIRST)


def test_a_folder_without_a_recording_is_named(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RecordingError, match="holds no recording; name a folder"):
            read(folder)


def test_a_pipe_in_place_of_an_index_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / SESSION).mkdir()
    os.mkfifo(tmp_path / SESSION / INDEX)
    for folder in (tmp_path, tmp_path / SESSION):
        with pytest.raises(RecordingError, match="holds no recording; name a folder"):
            read(folder)


def test_a_recording_that_ends_within_the_prompt_is_no_audit(tmp_path: Path) -> None:
    rows = {key: each for key, each in noise(1).items() if key.layer is not None}
    recording = read(write(tmp_path / "a", rows, WIDE))
    with pytest.raises(RecordingError, match="holds no complete prompt"):
        _ = recording.prompt_tokens


def test_shares_of_two_answers_cannot_be_added(folder: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", noise(2, rows=4), WIDE)
    with pytest.raises(RecordingError, match="are not shares of one answer"):
        add([read(folder), read(other)])


@pytest.mark.parametrize("ids", [PROMPT[:-1], [*PROMPT, 1]])
def test_a_prompt_of_another_length_is_refused(ids: list[int], folder: Path) -> None:
    error = f"The prompt has {len(ids)} tokens, but the one in .* has 40"
    with pytest.raises(PromptError, match=error):
        Auditor(MODEL).audit(folder, ids)


@pytest.mark.parametrize("wrong", [-1, 512, 2**70])
def test_a_token_outside_the_vocabulary_is_refused(wrong: int, folder: Path) -> None:
    with pytest.raises(PromptError, match="outside the vocabulary of random:tiny"):
        Auditor(MODEL).audit(folder, [*PROMPT[:-1], wrong])


def test_recordings_of_two_modes_are_not_compared(folder: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", noise(2, COMPACT), COMPACT)
    error = "holds wide residues and .* compact residues; compare recordings of one mode"
    with pytest.raises(RecordingError, match=error):
        Auditor(MODEL).audit(folder, PROMPT, again=other)


@pytest.mark.parametrize("name", [".", "../recording", SESSION, "../link"])
def test_one_recording_given_twice_is_refused(name: str, folder: Path) -> None:
    (folder.parent / "link").symlink_to(folder / SESSION)
    for second in ({"again": folder / name}, {"shares": [folder / name]}):
        with pytest.raises(UsageError, match="given twice"):
            Auditor(MODEL).audit(folder, PROMPT, **second)  # type: ignore[arg-type]
