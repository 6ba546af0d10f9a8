"""`tsqp demo`: a private answer; then the audit of what its GPU saw, beside a run in `open`."""

import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from rich.table import Table

from tsqp import LLM, SamplingParams
from tsqp._local_worker import LocalWorker
from tsqp._printing import Printer, say
from tsqp.bench.audit import NEAREST, REPEATS, ROW_SPACE, UNIFORM, Auditor, Report
from tsqp.bench.audit_table import make_console, read_text, show_found, show_p

MODEL = "demo"


def run_demo(prompt: str) -> None:
    """Answer, then show what the worker could read of the prompt, in `pad` and in `open`."""
    say(f"Model   SmolLM2-135M-Instruct\nAsking  {prompt}")
    # Readable by this user alone: what `open` sends is the prompt.
    with tempfile.TemporaryDirectory(prefix="tsqp-demo-") as temporary:
        folder = Path(temporary)
        ids = _answer(prompt, folder / "pad")
        say("\nThe same prompt once more, in open, to compare what the worker saw …")
        _prefill(ids, folder / "open")
        auditor = Auditor(MODEL)
        _print([(mode, auditor.audit(folder / mode, ids)) for mode in ("pad", "open")])


def _answer(prompt: str, record: Path) -> list[int]:
    """Print the answer and the statistics; the ids of the prompt."""
    arguments = [MODEL, "--serve", "private", "--record", str(record)]
    with closing(LocalWorker(arguments)) as worker:
        worker.await_ready()
        with LLM(MODEL, privacy="pad", worker=worker.endpoint) as llm:
            printer = Printer(llm, prompts=1, json_output=False)
            ids = llm.tokenize(prompt, chat=True)
            params = SamplingParams(temperature=0, max_tokens=256)
            printer.finish(llm.generate([ids], params, on_text=printer.on_text))
    return ids


def _prefill(ids: list[int], record: Path) -> None:
    arguments = [MODEL, "--serve", "open", "--record", str(record)]
    with closing(LocalWorker(arguments)) as worker:
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
        ("values or rows that come again", REPEATS),
    ):
        table.add_row(label, *(show_found(report.named(attack)) for _, report in reports))
    table.add_row("are the values uniform?", *(_show_uniform(report) for _, report in reports))
    leaks = (f"{len(report.leaks)} of {len(report.attacks)}" for _, report in reports)
    table.add_row("attacks that found more than chance", *leaks)
    console = make_console(stderr=True)
    console.print()
    console.print(table)
    for mode, report in reports:
        if report.recovered is not None:
            text = " ".join(read_text(report.recovered, MODEL).split())
            console.print(f"\nThe prompt, as read by the worker in {mode}:\n  {text}")
    say("\n`tsqp audit` does the same for your own prompts: see docs/audit.md.")


def _show_uniform(report: Report) -> str:
    found = [finding for finding in report.findings if finding.attack == UNIFORM]
    return f"yes (chi-square p = {show_p(found[0].p)})" if found else "no, they are activations"
