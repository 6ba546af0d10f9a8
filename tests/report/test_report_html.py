"""The page of `tsqp report --html`: whole, on its own, and legible without colour."""

import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from report_helpers import START, call, header, run, write

from tsqp.errors import UsageError
from tsqp.report.methods import LogReport
from tsqp.report.page import page, write_page
from tsqp.report.plots import STYLES, spans, typical_step
from tsqp.report.read import LogFile, read_file
from tsqp.tee.call_lines import Stage

SVG = "http://www.w3.org/2000/svg"
VOID = {"meta", "br"}


class Checker(HTMLParser):
    """Every element is closed in its turn; no id is given twice."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.used: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] += 1
        for name, value in attrs:
            if name == "id":
                self.ids[value or ""] += 1
            pattern = r"#(.+)" if name == "href" else r"url\(#([^)]+)\)"
            self.used.update(re.findall(pattern, value or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> LogReport:
    calls = [
        call(step=step, phase=phase, method=method, time=START + 0.01 * step + 0.0002 * place)
        for step, phase in ((1, "prefill"), (2, "decode"), (3, "decode"))
        for place, method in enumerate(("product", "seed_product", "product"))
    ]
    summary = run(compute=0.5)
    summary = msgspec.structs.replace(summary, prefill=summary.decode)
    path = write(tmp_path_factory.mktemp("log") / "a <b> & c", [header(), *calls, summary])
    log = read_file(path)
    assert isinstance(log, LogFile)
    return LogReport.of(log)


@pytest.fixture(scope="module")
def html(report: LogReport) -> str:
    return page([report, report])


def test_the_page_is_well_formed_and_its_ids_are_unique(html: str) -> None:
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    assert checker.seen["svg"] == 2 * 5
    assert max(checker.ids.values()) == 1
    assert checker.used
    assert checker.used <= set(checker.ids)


def test_the_page_asks_nobody_for_anything(html: str) -> None:
    addresses = set(re.findall(r"\w+://[^\"' )<]+", html))
    assert addresses == {SVG}
    assert "<script" not in html
    assert not re.search(r"@import|\bsrc=|<link|\bon\w+=", html)


def test_a_name_from_outside_is_text(html: str) -> None:
    assert "a &lt;b&gt; &amp; c" in html
    assert "<b>" not in html


def test_the_pictures_say_with_words_what_they_say_with_colours(html: str) -> None:
    for group in STYLES:
        assert re.search(rf"<text[^>]*>{group}</text>", html), group
    for word in ("product, median", "seed_product, median", "to the worker", "prefill", "decode"):
        assert re.search(rf"<text[^>]*>{word}", html), word
    hatches = [hatch for _, hatch in STYLES.values()]
    assert len({colour for colour, _ in STYLES.values()}) == len(STYLES)
    assert len(set(hatches)) >= len(STYLES) - 1


def test_a_typical_step_is_the_one_of_median_length() -> None:
    calls = [call(step=step, wait_us=wait) for step, wait in ((1, 10.0), (2, 30.0), (3, 20.0))]
    assert typical_step(calls, "decode") == calls[2:]
    assert typical_step(calls, "prefill") == []


def test_the_time_line_holds_each_lap_once(report: LogReport) -> None:
    step = typical_step(report.log.calls, "decode")
    found = {group: sum(e - b for b, e in pieces) for group, pieces in spans(step).items()}
    assert found["worker compute"] == pytest.approx(3 * 40, abs=1.5)
    assert found["link"] == pytest.approx(3 * 31, abs=1.5)
    assert found["TEE masking"] == pytest.approx(3 * 20, abs=1.5)
    assert found["TEE own work"] == pytest.approx(2 * 100, abs=1.5)


@pytest.mark.parametrize("us", [0.0, 1e14])
def test_times_at_their_bounds_are_drawn(us: float, tmp_path: Path) -> None:
    times = {f"{stage}_us": us for stage in get_args(Stage)} | {"away_us": us, "overlap_us": us}
    log = read_file(write(tmp_path / "log", [header(), call(**times), call(**times), run()]))
    assert isinstance(log, LogFile)
    assert page([LogReport.of(log)]).count("<svg") == 4


def test_a_page_that_exists_is_kept(report: LogReport, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("precious")
    with pytest.raises(UsageError, match="exists; name a new file"):
        write_page(path, [report])
    assert path.read_text() == "precious"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium")
def test_a_browser_shows_the_page(report: LogReport, tmp_path: Path) -> None:
    path, picture = tmp_path / "page.html", tmp_path / "page.png"
    write_page(path, [report])
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--screenshot={picture}"]
    subprocess.run([*command, str(path)], check=True, timeout=60, capture_output=True)
    assert picture.stat().st_size > 10_000
