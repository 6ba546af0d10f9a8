"""What a worker process saw, attacked: `open` gives the prompt away, `pad` gives nothing."""

import json
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest
import torch
from protocol_helpers import GIVES_UP_SOON, START_S, Commands, Main, Result, eventually, write_ids

from tsqp import LLM, SamplingParams
from tsqp.algebra.params import DIRECT_FIELDS, FIELDS
from tsqp.audit import auditor as audit
from tsqp.audit.auditor import Auditor, Report
from tsqp.audit.recording import open_recording
from tsqp.audit.uniformity import Uniformity
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.checkpoint.files import BinaryFile
from tsqp.checkpoint.safetensors_file import SafetensorsFile
from tsqp.runtime.local_worker import LocalWorker

TEXT = (
    "The old harbour master walked slowly along the quay every morning before sunrise, counting "
    "boats and greeting fishermen by name. Nobody remembered how long he had worked there, yet "
    "everyone trusted his forecasts about wind, tides and storms. One autumn day a letter arrived "
    "from the ministry, announcing that the harbour would close within months, and he wept."
)
TINY_PROMPT = [(37 * n + 11) % 512 for n in range(36)] + [11, 48, 11, 11]


class Recorded:
    """A worker that records, and prompts that it was asked; each run is a session."""

    def __init__(self, model: str, folder: Path) -> None:
        self.model = model
        self.folder = folder
        arguments = [model, "--dtype", "float32", "--record", str(folder)]
        self._worker = LocalWorker(arguments)
        self._worker.await_ready()

    @property
    def endpoint(self) -> str:
        return self._worker.endpoint

    def ask(self, ids: list[int], privacy: str, **options: object) -> Path:
        """The recording of one answer."""
        answer(ids, model=self.model, privacy=privacy, worker=self.endpoint, **options)
        return self.next_session()

    def next_session(self) -> Path:
        """Where the last session was recorded; one without a call may have come before it."""
        names = [path.name for path in self.folder.glob("session-*")]
        return self.folder / max(names, key=lambda name: int(name.removeprefix("session-")))

    def close(self) -> None:
        self._worker.close()


class Sharing:
    """Workers that record, each alone, and that get the shares of the same sessions."""

    def __init__(self, model: str, folder: Path, count: int) -> None:
        self._model = model
        self._workers: list[Recorded] = []
        with ExitStack() as stack:
            stack.callback(self.close)
            for number in range(count):
                self._workers.append(Recorded(model, folder / f"worker-{number}"))
            stack.pop_all()

    def ask(self, ids: list[int], **options: object) -> list[Path]:
        """What each worker recorded of one answer."""
        endpoints = [worker.endpoint for worker in self._workers]
        options = {"privacy": "shares", "insecure_same_host": True} | options
        answer(ids, model=self._model, worker=endpoints, **options)
        return [worker.next_session() for worker in self._workers]

    def close(self) -> None:
        for worker in self._workers:
            worker.close()


def answer(ids: list[int], **options: object) -> None:
    """Let workers compute an answer of four tokens."""
    with LLM(dtype="float32", **options) as llm:  # type: ignore[arg-type]
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        assert len(llm.generate([ids], params)[0].token_ids) == 4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    recorded = Recorded("random:tiny", tmp_path_factory.mktemp("tiny") / "recording")
    yield recorded
    recorded.close()


@pytest.fixture(scope="module")
def in_open(tiny: Recorded) -> Path:
    return tiny.ask(TINY_PROMPT, "open")


@pytest.fixture(scope="module")
def in_pad(tiny: Recorded) -> Path:
    return tiny.ask(TINY_PROMPT, "pad")


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    return write_ids(tmp_path / "ids.json", TINY_PROMPT)


def auditing(folder: Path, ids: Path, *arguments: object) -> list[object]:
    return ["audit", folder, "--model", "random:tiny", "--prompt-ids", ids, *arguments]


@pytest.mark.slow
def test_a_real_prompt_is_read_in_open_and_is_not_in_pad(
    demo_path: Path, tmp_path: Path, main: Main
) -> None:
    recorded = Recorded("demo", tmp_path / "recording")
    try:
        with LLM("demo", privacy="tee") as llm:
            ids = llm.tokenize(TEXT)[:64]
        plain, padded, again = (recorded.ask(ids, each) for each in ("open", "pad", "pad"))
    finally:
        recorded.close()
    assert len(ids) == 64
    auditor = Auditor("demo")
    report = auditor.audit(plain, ids)
    assert report.recovered is not None
    hits = sum(a == b for a, b in zip(report.recovered, ids, strict=True))
    assert hits >= 0.95 * 64
    assert report.named(audit.NEAREST).found == hits
    assert report.named(audit.ROW_SPACE).found >= 0.95 * len(set(ids))

    report = auditor.audit(padded, ids, again=again)
    assert report.leaks == []
    assert report.recovered is None
    assert len(report.attacks) == 10
    assert report.named(audit.NEAREST).found <= 2
    assert report.named(audit.EQUAL).of == 6_393_600

    ids_file = write_ids(tmp_path / "ids.json", ids)
    result = main("audit", plain, "--model", "demo", "--prompt-ids", ids_file)
    assert result.status == 1
    assert TEXT[:300] in result.stdout
    assert "harbour" not in result.stderr


def test_open_exits_with_one_and_prints_the_ids_where_there_is_no_text(
    main: Main, in_open: Path, ids: Path
) -> None:
    result = main(*auditing(in_open, ids))
    assert result.status == 1
    assert " ".join(map(str, TINY_PROMPT)) in result.stdout
    assert "ABOVE CHANCE" in result.stdout
    assert "40 of 40 tokens" in result.stdout


@pytest.mark.parametrize("field", list(FIELDS))
def test_pad_exits_with_zero_and_prints_no_prompt(
    field: str, main: Main, tiny: Recorded, ids: Path
) -> None:
    first, second = (tiny.ask(TINY_PROMPT, "pad", field=field) for _ in range(2))
    result = main(*auditing(first, ids, "--again", second))
    assert result.status == 0, result.stdout
    assert "ABOVE CHANCE" not in result.stdout
    assert "None of 10 attacks found more than noise would" in result.stdout
    assert "The prompt, as read" not in result.stdout


def test_shares_are_noise_to_each_worker_and_the_prompt_to_all(
    main: Main, ids: Path, tmp_path: Path
) -> None:
    with closing(Sharing("random:tiny", tmp_path, 3)) as sharing:
        first, *others = sharing.ask(TINY_PROMPT, prefill_chunk=16)
    named = [argument for folder in others for argument in ("--shares", folder)]
    result = main(*auditing(first, ids, *named, "--json"))
    assert result.status == 0, result.stderr
    assert result.json["leaks"] == 0
    assert result.json["recovered_ids"] == TINY_PROMPT
    assert result.json["recovered_from"] == "all 3 together"
    assert "this mode relies on workers that do not share what they receive" in (result.stderr)


@pytest.mark.parametrize("field", ["compact", pytest.param("wide", marks=pytest.mark.slow)])
def test_two_shares_of_one_prompt_have_no_more_in_common_than_chance(
    field: str, tmp_path: Path
) -> None:
    with closing(Sharing("random:tiny", tmp_path, 2)) as sharing:
        first, second = (sharing.ask(TINY_PROMPT, field=field) for _ in range(2))
    auditor = Auditor("random:tiny")
    for one, other in [*zip(first, second, strict=True), (first[0], second[1])]:
        report = auditor.audit(one, TINY_PROMPT, again=other)
        assert report.leaks == []
        equal = report.named(audit.EQUAL)
        assert equal.of is not None and equal.of > 10_000
        assert equal.found <= 2  # where chance gives a thousandth of one, or less


def test_json_is_the_only_line_of_standard_output(main: Main, in_open: Path, ids: Path) -> None:
    result = main(*auditing(in_open, ids, "--json"))
    assert result.status == 1
    assert result.stdout.count("\n") == 1
    assert result.json["recovered_ids"] == TINY_PROMPT
    assert result.json["leaks"] == len(result.json["attacks"]) == 6
    assert {"attack", "found", "of", "chance", "p", "above_chance"} <= set(
        result.json["attacks"][0]
    )
    assert str(TINY_PROMPT[:3])[1:-1] not in result.stderr


def test_the_prompt_in_pieces_is_audited_whole(main: Main, tiny: Recorded, ids: Path) -> None:
    folder = tiny.ask(TINY_PROMPT, "open", prefill_chunk=7)
    result = main(*auditing(folder, ids, "--json"))
    assert result.json["recovered_ids"] == TINY_PROMPT


def test_with_attention_on_the_worker_the_prompt_is_read_as_well(
    main: Main, tiny: Recorded, ids: Path
) -> None:
    folder = tiny.ask(TINY_PROMPT, "open", attention="gpu", prefill_chunk=30)
    lines = [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]
    weights = [line for line in lines if line["operation"] == "weighted_values"]
    first = [line["rows"] for line in weights if line["layer"] == 0]
    assert first == [30, 10, 1, 1, 1]
    result = main(*auditing(folder, ids, "--json"))
    assert result.json["recovered_ids"] == TINY_PROMPT


def test_whole_layers_are_recorded_and_not_audited(main: Main, tiny: Recorded, ids: Path) -> None:
    folder = tiny.ask(TINY_PROMPT, "open", fuse="layer")
    lines = [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]
    layers = [line for line in lines if line["operation"] == "layer"]
    assert [line["rows"] for line in layers] == [40, 40, 1, 1, 1, 1, 1, 1]
    assert layers[1]["sequences"] == [[0, 0, 40]]
    assert SafetensorsFile(BinaryFile(folder / layers[1]["tensor"])).shape("input") == (40, 64)
    result = main(*auditing(folder, ids))
    assert (result.status, result.stdout) == (1, "")
    assert "holds calls of whole layers, which the worker reads completely" in result.error


def test_what_is_wrong_is_one_sentence(
    main: Main, in_open: Path, in_pad: Path, ids: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.json").write_text("hello")
    several = write_ids(tmp_path / "several.json", [1], [2])
    short = write_ids(tmp_path / "short.json", TINY_PROMPT[:-1])
    cases = {
        "holds no recording": auditing(tmp_path, ids),
        "sessions; name one": auditing(in_open.parent, ids),
        "Cannot read token ids": auditing(in_open, tmp_path / "text.json"),
        "holds 2 prompts; an audit needs exactly one": auditing(in_open, several),
        "The prompt has 39 tokens": auditing(in_open, short),
        "compare recordings of one mode": auditing(in_open, ids, "--again", in_pad),
        "are not shares": auditing(in_open, ids, "--shares", in_pad),
        "was not recorded with random:smollm2-135m": [
            "audit", in_open, "--model", "random:smollm2-135m", "--prompt-ids", ids
        ],
    }  # fmt: skip
    for sentence, command in cases.items():
        result = main(*command)
        assert result.status == 1
        assert result.stdout == ""
        assert sentence in result.error


def generate(commands: Commands) -> Result:
    ids = write_ids(commands.folder / "ids.json", TINY_PROMPT)
    return commands.run(
        "generate", "random:tiny", "--worker", commands.ipc(), "--prompt-ids", ids,
        "--max-tokens", 200, "--ignore-eos", env=GIVES_UP_SOON,
    )  # fmt: skip


def test_the_calls_of_a_killed_worker_can_be_read(commands: Commands) -> None:
    folder = commands.folder / "recording"
    worker = commands.worker("random:tiny", commands.ipc(), "--record", folder)
    ids = write_ids(commands.folder / "ids.json", TINY_PROMPT)
    asking = commands.start(
        "generate", "random:tiny", "--worker", commands.ipc(), "--prompt-ids", ids,
        "--max-tokens", 400, "--ignore-eos", env=GIVES_UP_SOON,
    )  # fmt: skip
    index = folder / "session-1" / "calls.jsonl"
    assert eventually(lambda: index.exists() and index.stat().st_size > 10_000, START_S)
    worker.send(signal.SIGKILL)
    asking.ends()
    (commands.folder / "worker.sock").unlink()
    recording = open_recording(folder, open_checkpoint("random:tiny").config, "random:tiny")
    assert recording.prompt_tokens == len(TINY_PROMPT)
    assert sum(len(recording.rows(key)) for key in recording.groups()) == sum(
        call.rows for call in recording.calls
    )


def test_a_recording_folder_in_use_is_refused(main: Main, in_open: Path) -> None:
    command = ["worker", "random:tiny", "--listen", "ipc:///unused", "--record", in_open]
    result = main(*command)
    assert result.status == 2
    assert "is not empty; record in a new folder" in result.error


def may_mount() -> bool:
    try:
        return not subprocess.run(["unshare", "--mount", "true"], check=False).returncode
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("options", "error"),
    [("size=64k", "No space left on device; free some space"), ("ro", "Cannot record in ")],
)
def test_a_disk_that_is_full_or_read_only_ends_the_worker(
    options: str, error: str, commands: Commands
) -> None:
    if not may_mount():
        pytest.skip("this user may not mount file systems")
    folder = commands.folder / "disk"
    folder.mkdir()
    mount = f'mount -t tmpfs -o {options} tmpfs {folder} && exec "$@"'
    worker = commands.start(
        "worker", "random:tiny", "--listen", commands.ipc(), "--record", folder,
        before=["unshare", "--mount", "sh", "-c", mount, "sh"],
    )  # fmt: skip
    if options != "ro":
        worker.says("serving ")
        result = generate(commands)
        assert result.status == 1
        assert result.error
    result = worker.ends(START_S)
    assert result.status == 1
    assert error in result.error


# One token again and again: what is not masked would show at once. Two answers of one prompt.
SLOW_PROMPTS = [[5] * 500, [5] * 500, [7] * 500]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("field", list(FIELDS))
def test_a_hundred_million_values_are_uniform(field: str, demo_path: Path, tmp_path: Path) -> None:
    with closing(Recorded("demo", tmp_path / "recording")) as recorded:
        folders = [recorded.ask(ids, "pad", field=field) for ids in SLOW_PROMPTS]
    check_noise(field, folders)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("field", [field.name for field in DIRECT_FIELDS])
def test_a_hundred_million_values_of_each_share_are_uniform(
    field: str, demo_path: Path, tmp_path: Path
) -> None:
    with closing(Sharing("demo", tmp_path, 2)) as sharing:
        answers = [sharing.ask(ids, field=field, timeout=60) for ids in SLOW_PROMPTS]
    for folders in zip(*answers, strict=True):
        check_noise(field, folders)


def check_noise(field_name: str, folders: Sequence[Path]) -> None:
    """Check what a real worker received for SLOW_PROMPTS, by the p-values of many groups."""
    field = FIELDS[field_name]
    config = open_checkpoint("demo").config
    recordings = [open_recording(folder, config, "demo") for folder in folders]
    values, tails = 0, []
    for recording in recordings:
        for key in recording.groups():
            test = Uniformity(field)
            rows_ND = recording.rows(key)
            test.add(rows_ND)
            values += rows_ND.numel()
            if rows_ND.numel() > 100_000:
                tails.append(test.p_values())
    assert values > 1e8
    for each in zip(*tails, strict=True):
        ordered = np.sort(each)
        count = len(ordered)
        steps = np.arange(count + 1) / count
        gap = max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max())
        assert gap * count**0.5 < 2.5  # Kolmogorov: more once in 130,000 times
        assert ordered[0] > 1e-8

    auditor = Auditor("demo")
    report: Report = auditor.audit(folders[0], SLOW_PROMPTS[0], again=folders[1])
    assert report.leaks == []
    equal = report.named(audit.EQUAL)
    assert equal.of is not None and equal.of > 3e7
    assert equal.p is not None and equal.p > 1e-8
    assert json.dumps(report.as_json())
    assert torch.isfinite(torch.tensor([finding.found for finding in report.findings])).all()
