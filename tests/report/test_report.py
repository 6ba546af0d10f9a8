"""Reading logs that may be anything, and what is said about them."""

import io
import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_helpers import call, decoding, header, run, write
from rich.console import Console

from tsqp.errors import ReportError
from tsqp.report.bench_tables import bench_notes, bench_ratios, bench_tables, numbers
from tsqp.report.bottleneck import GROUPS, bottleneck, group_seconds
from tsqp.report.methods import LogReport, ratios
from tsqp.report.phases import phases_of
from tsqp.report.read import BenchFile, LogFile, read_file
from tsqp.tee.call_lines import Method
from tsqp.wire.messages import Operation

BENCHMARKS = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.json"))
CALLS = [call(step=1), call(step=1, group="o"), call(step=2), call(step=2, group="o")]
WHOLE = [header(), *CALLS, run(compute=0.5)]


def read(path: Path) -> LogFile:
    log = read_file(path)
    assert isinstance(log, LogFile)
    return log


def report(path: Path, *lines: object) -> LogReport:
    return LogReport.of(read(write(path, lines)))  # type: ignore[arg-type]


def test_a_whole_log_is_read_without_a_note(tmp_path: Path) -> None:
    log = read(write(tmp_path / "log", WHOLE))
    assert (list(log.calls), log.summary, list(log.notes)) == (CALLS, WHOLE[-1], [])


def test_a_line_that_was_cut_is_left_out_and_said(tmp_path: Path) -> None:
    path = write(tmp_path / "log", WHOLE[:-1])
    path.write_bytes(path.read_bytes()[:-10])
    log = read(path)
    assert list(log.calls) == CALLS[:-1]
    assert log.notes[0] == "log ends within a line, which was left out."
    assert "has no last line" in log.notes[1]


@pytest.mark.parametrize(
    "line",
    [
        b"no json at all",
        b"{}",
        b"[" * 10_000,
        b"\xff\xfe",
        b'{"line":"call","time":1e400}',
        b"x" * 100_000,
        b"",
    ],
    ids=["text", "empty object", "deep", "no unicode", "infinite", "long", "nothing"],
)
def test_a_bad_line_is_named_by_its_number_and_skipped(line: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "log", WHOLE)
    lines = path.read_bytes().split(b"\n")
    lines.insert(2, line)
    path.write_bytes(b"\n".join(lines))
    log = read(path)
    assert list(log.calls) == CALLS
    assert list(log.notes) == ["log has bad lines, which were left out: 3."]


def test_more_than_a_few_bad_lines_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "log", WHOLE, b"bad\n" * 5)
    with pytest.raises(ReportError, match="is damaged, in lines 7, 8, 9, 10 at least"):
        read_file(path)


@pytest.mark.parametrize(
    "field",
    ["rows", "sent_bytes", "wait_us", "compute_us", "time", "layer", "endpoint", "step"],
)
@pytest.mark.parametrize("value", [-2, 1e30, "1", None, [1]])
def test_a_field_that_cannot_be_makes_a_bad_line(field: str, value: object, tmp_path: Path) -> None:
    if field == "layer" and value is None:
        return
    path = write(tmp_path / "log", WHOLE)
    lines = path.read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | {field: value})
    path.write_text("\n".join(lines) + "\n")
    assert list(read(path).notes) == ["log has bad lines, which were left out: 2."]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"once upon a time\n", "is neither a call log"),
        (b'{"a": 1}', "is neither a call log"),
        (b"[1, 2]", "is neither a call log"),
        (b'{"line":"header","format":2,"new":true}\n', "is a call log of format 2, and this"),
        (b'{"line":"header","format":1}\n', "The first line of .* is damaged"),
        (b'{"line":"header","format":1', "is neither a call log"),
        (bytes(1000), "is neither a call log"),
    ],
)
def test_what_is_no_log_is_refused_in_a_sentence(
    content: bytes, sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ReportError, match=sentence):
        read_file(path)


def test_a_file_that_is_not_there_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(ReportError, match="There is no file"):
            read_file(path)


def test_two_logs_in_one_file_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "log", WHOLE[:-1] + WHOLE)
    with pytest.raises(ReportError, match="a second log from line 6 on"):
        read_file(path)


def test_a_log_that_goes_on_after_its_end_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "log", [*WHOLE, call()])
    with pytest.raises(ReportError, match="continues after its summary line"):
        read_file(path)


@given(st.binary(max_size=2000))
def test_any_bytes_are_read_or_refused(noise: bytes) -> None:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        path = write(Path(folder) / "log", WHOLE, noise)
        try:
            LogReport.of(read(path)).as_json()
        except ReportError as exc:
            assert str(exc).endswith(".")


def test_methods_are_counted_and_their_quantiles_are_those_of_numpy(tmp_path: Path) -> None:
    waits = [10.0 * number for number in range(200)]
    calls = [call(wait_us=wait, compute_us=0.0) for wait in waits]
    found = report(tmp_path / "log", header(), *calls, call(method="seed_product", sent_bytes=0))
    product, seeds, every = found.methods
    assert (product.name, seeds.name, every.name) == ("product", "seed_product", "all")
    assert (product.calls, product.rows, product.sent_bytes) == (200, 200, 200 * 256)
    took = np.array(waits) + 40
    expected = [np.quantile(took, q) for q in (0.5, 0.95, 0.99)]
    assert [product.median_us, product.p95_us, product.p99_us] == pytest.approx(expected)
    assert product.total_s == pytest.approx(took.sum() / 1e6)
    assert every.calls == 201


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("worker compute", {"compute": 0.6, "link": 0.2}),
        ("link", {"compute": 0.2, "link": 0.4, "send": 0.1, "receive": 0.1}),
        ("serialisation", {"compute": 0.2, "serialise": 0.6}),
        ("TEE pads", {"compute": 0.2, "pads": 0.6}),
        ("TEE masking", {"compute": 0.3, "mask": 0.3, "unmask": 0.3}),
        ("TEE own work", {"compute": 0.3}),
    ],
)
def test_the_largest_group_is_the_bottleneck(
    name: str, seconds: dict[str, float], tmp_path: Path
) -> None:
    found = report(tmp_path / "log", header(), *CALLS, run(**seconds))
    [phase], [bound] = found.phases, found.bottlenecks
    assert bound.name == name
    groups = group_seconds(phase)
    assert set(groups) == set(GROUPS)
    assert sum(groups.values()) == pytest.approx(phase.wall_s) == 1.0
    assert bound.at_most == pytest.approx(1 / (1 - groups[name]))
    assert 1 < bound.faster <= bound.at_most
    assert f"{groups[name]:.3f} s {name}" in bound.arithmetic


@pytest.mark.parametrize("name", GROUPS)
def test_no_part_is_in_two_groups(name: str) -> None:
    others = [part for other, parts in GROUPS.items() if other != name for part in parts]
    assert not set(GROUPS[name]) & set(others)


def test_the_remedy_for_a_link_knows_the_transport(tmp_path: Path) -> None:
    advice = []
    for transport in ("poll", "inline"):
        log = read(
            write(tmp_path / transport, [header(transport=transport), *CALLS, run(link=0.9)])
        )
        advice.append(bottleneck(phases_of(log)[0], log.header).advice)
    assert "prompts together" in advice[0]
    assert "shared memory" in advice[1]


def test_without_a_last_line_the_calls_speak_alone(tmp_path: Path) -> None:
    found = report(tmp_path / "log", header(), *CALLS)
    [phase] = found.phases
    assert phase.wall_s == pytest.approx(4 * 100e-6)
    assert phase.parts_s["worker compute"] == pytest.approx(4 * 40e-6)
    assert phase.parts_s["link"] == pytest.approx(4 * 20e-6)


def test_ratios_are_of_the_same_quantities_of_two_runs(tmp_path: Path) -> None:
    fast = report(tmp_path / "fast", header(), *CALLS, run(compute=0.4))
    slow = report(
        tmp_path / "slow", header(), *(call(mask_us=105.0) for _ in CALLS), run(compute=0.8)
    )
    found = ratios(slow, fast)
    assert found["decode: worker compute, s a step"] == pytest.approx(2.0)
    assert found["decode, s a token"] == pytest.approx(1.0)
    assert found["product: median, µs"] == pytest.approx(2.0)


def test_the_published_benchmarks_are_read() -> None:
    assert len(BENCHMARKS) >= 3
    for path in BENCHMARKS:
        file = read_file(path)
        assert isinstance(file, BenchFile)
        assert list(bench_tables(file))
        assert numbers(file.values)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**400),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text(), inner)
        | st.fixed_dictionaries(dict.fromkeys(("median", "least", "most"), inner))
    ),
)


@settings(max_examples=30)
@given(st.dictionaries(st.text(), JSON))
def test_any_object_with_a_command_is_printed(values: dict[str, object]) -> None:
    file = BenchFile("any", {"command": "x"} | values)
    console = Console(file=io.StringIO(), markup=False)
    console.print(*bench_tables(file), *bench_notes(file))
    assert all(isinstance(ratio, float) for ratio in bench_ratios(file, file).values())


def test_a_call_of_an_unknown_method_is_a_bad_line(tmp_path: Path) -> None:
    calls = [*CALLS, call(method="mine_bitcoin")]
    log = read(write(tmp_path / "log", [header(), *calls, run(compute=0.5)]))
    assert list(log.calls) == CALLS
    assert list(log.notes) == ["log has bad lines, which were left out: 6."]


def test_the_methods_of_a_log_are_the_operations_of_the_wire() -> None:
    tags = {each.__struct_config__.tag for each in get_args(Operation)}
    assert set(get_args(Method)) == tags


@pytest.mark.parametrize("wall_s", [5e-324, 1e-320, 9e-7])
def test_a_phase_shorter_than_any_clock_can_tell_is_left_out(wall_s: float, tmp_path: Path) -> None:
    found = report(tmp_path / "log", header(), decoding(0, wall_s, {}, {}))
    assert (found.phases, found.bottlenecks) == ([], [])


def test_tiny_times_make_no_infinite_figure(tmp_path: Path) -> None:
    tiny = {"send": 1e-320, "wait": 0.0}
    log = [header(), call(sent_bytes=2**53), decoding(1, 1.0, tiny, {})]
    short = report(tmp_path / "short", *log)
    long = report(tmp_path / "long", *log[:-1], run(link=0.5))
    found = json.dumps([short.as_json(), ratios(long, short)])
    assert "Infinity" not in found and "NaN" not in found


def test_a_ratio_that_no_float_can_hold_is_left_out() -> None:
    one = BenchFile("one", {"command": "x", "s": {"a": 1e299, "b": 4}})
    two = BenchFile("two", {"command": "x", "s": {"a": 1e-290, "b": 2}})
    assert bench_ratios(one, two) == {"s.b": 2.0}


def test_two_benchmarks_are_compared_figure_by_figure() -> None:
    one = BenchFile("one", {"command": "x", "s": {"a": {"median": 4, "least": 1, "most": 9}}})
    two = BenchFile("two", {"command": "x", "s": {"a": {"median": 2, "least": 1, "most": 9}}})
    assert bench_ratios(one, two) == {"s.a": 2.0}
