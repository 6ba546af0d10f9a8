"""`tsqp demo`: a private answer, then an audit of what the worker saw, compared with `open`."""

import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from rich.table import Table

from tsqp import LLM, SamplingParams
from tsqp.audit.audit_table import make_console, read_text, show_found, show_p
from tsqp.audit.auditor import NEAREST, REPEATS, ROW_SPACE, UNIFORM, Auditor, Report
from tsqp.cli.console import note
from tsqp.cli.printing import Printer
from tsqp.runtime.local_worker import LocalWorker
from tsqp.runtime.quiet import is_quiet
from tsqp.tee.text.tokenizer import Tokenizer

MODEL = "demo"


def run_demo(prompt: str) -> None:
    """Answer, then show how much of the prompt the worker could read in `pad` and in `open`."""
    note(f"Model   SmolLM2-135M-Instruct\nAsking  {prompt}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves no recording behind
    with tempfile.TemporaryDirectory(
        prefix="tsqp-demo-"
    ) as temporary:  # only this user can open it
        folder = Path(temporary)
        # Both load at once, while this process loads its own weights.
        with (
            _worker("private", folder / "pad") as private,
            _worker("open", folder / "open") as plain,
        ):
            note("starting two workers on this machine, in the same trust domain")
            ids = _answer(prompt, private)
            note("\nRunning the same prompt in open, to compare what the workers saw …")
            _prefill(ids, plain)
        auditor = Auditor(MODEL)
        _print([(mode, auditor.audit(folder / mode, ids)) for mode in ("pad", "open")])


def _worker(serve: str, record: Path) -> closing[LocalWorker]:
    return closing(LocalWorker([MODEL, "--serve", serve, "--record", str(record)]))


def _answer(prompt: str, worker: LocalWorker) -> list[int]:
    """Print the answer and the statistics; returns the ids of the prompt."""
    worker.await_ready()
    with LLM(MODEL, privacy="pad", worker=worker.endpoint) as llm:
        printer = Printer(llm, prompts=1, json_output=False)
        ids = llm.tokenize(prompt, chat=True)
        params = SamplingParams(temperature=0, max_tokens=256)
        printer.finish(llm.generate([ids], params, on_text=printer.on_text))
    return ids


def _prefill(ids: list[int], worker: LocalWorker) -> None:
    worker.await_ready()
    with LLM(MODEL, privacy="open", worker=worker.endpoint) as llm:
        llm.generate([ids], SamplingParams(temperature=0, max_tokens=1))


def _print(reports: Sequence[tuple[str, Report]]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("what the worker could find")
    for mode, _ in reports:
        table.add_column(f"in {mode}")
    for label, attack in (
        ("prompt tokens by nearest embedding", NEAREST),
        ("prompt tokens by row space", ROW_SPACE),
        ("repeated values or rows", REPEATS),
    ):
        table.add_row(label, *(show_found(report.named(attack)) for _, report in reports))
    table.add_row("are the values uniform?", *(_show_uniform(report) for _, report in reports))
    leaks = (f"{len(report.leaks)} of {len(report.attacks)}" for _, report in reports)
    table.add_row("attacks that found more than chance", *leaks)
    if is_quiet():
        return
    console = make_console(stderr=True)
    console.print()
    console.print(table)
    for mode, report in reports:
        if report.recovered is not None:
            text = " ".join(read_text(report.recovered, Tokenizer(MODEL)).split())
            console.print(f"\nThe prompt, as read by the worker in {mode}:\n  {text}")
    note("\n`tsqp audit` does the same for your own prompts: see docs/audit.md.")


def _show_uniform(report: Report) -> str:
    found = [finding for finding in report.findings if finding.attack == UNIFORM]
    return f"yes (chi-square p = {show_p(found[0].p)})" if found else "no, they are activations"
