"""Prints the result of an audit: tables and a verdict, or one JSON line."""

import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from tsqp.audit.auditor import Report
from tsqp.audit.finding import ABOVE_CHANCE, Finding
from tsqp.tee.text.tokenizer import Tokenizer
from tsqp.wire.codec import printable


def print_report(report: Report, model: str, *, json_output: bool) -> None:
    """Print tables, then the verdict, and the prompt if it was recovered.

    With `json_output`, stdout is one JSON object, and only that object contains the prompt.
    """
    console = make_console(stderr=json_output)
    console.print(
        f"{report.subject}: {report.mode}, {report.rows:,} rows, "
        f"a prompt of {report.prompt_tokens} tokens"
    )
    subjects = list(dict.fromkeys(finding.subject for finding in report.findings))
    for subject in subjects:
        findings = [finding for finding in report.findings if finding.subject == subject]
        if len(subjects) > 1:
            console.print(f"\n{subject}")
        console.print(_table(report, findings))
        if not findings[0].counted:
            console.print(
                "Added up they give the prompt: this mode relies on workers that do not share what "
                "they receive."
                if any(report.is_above_chance(finding) for finding in findings)
                else "Added up they do not give the prompt: the recording of a worker is missing."
            )
    text = None if report.recovered is None else read_text(report.recovered, Tokenizer(model))
    console.print(f"\n{_verdict(report)}")
    if json_output:
        print(json.dumps(report.as_json() | {"recovered_text": text}))
    elif text is not None:
        console.print(f"\nThe prompt, as read from {report.recovered_from}:\n{text}")


def read_text(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Tokens as text that is safe to print, or as ids if the model has no tokenizer."""
    if not tokenizer.exists:
        return " ".join(map(str, ids))
    return printable(tokenizer.decode(ids), keep="\n")


def show_found(finding: Finding) -> str:
    """Format what an attack found, with its unit."""
    if finding.p is None:
        return finding.note
    if finding.note and finding.chance is None:
        return finding.note
    if isinstance(finding.found, int):
        of = "" if finding.of is None else f" of {finding.of:,}"
        return f"{finding.found:,}{of} {finding.unit}"
    return f"{finding.found:+.4f}"


def show_p(p: float | None) -> str:
    """Format a p-value with few digits."""
    if p is None:
        return ""
    if p < 1e-300:
        return "< 1e-300"
    return f"{p:.2f}" if p >= 0.01 else f"{p:.0e}"


def make_console(*, stderr: bool) -> Console:
    """A console without markup, highlighting and wrapping."""
    return Console(stderr=stderr, highlight=False, markup=False, soft_wrap=True, width=100)


def _table(report: Report, findings: list[Finding]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("attack", "found", "by chance", "p-value", ""):
        table.add_column(name, justify="right" if name in ("by chance", "p-value") else "left")
    for finding in findings:
        chance = "" if finding.chance is None else f"{finding.chance:.2g}"
        verdict = "ABOVE CHANCE" if report.is_above_chance(finding) else ""
        cells = (show_found(finding), chance, show_p(finding.p), verdict)
        table.add_row(finding.attack, *cells)
    return table


def _verdict(report: Report) -> str:
    attacks, leaks = len(report.attacks), len(report.leaks)
    if leaks:
        return f"{leaks} of {attacks} attacks found more than noise gives: this recording leaks."
    return (
        f"None of {attacks} attacks found more than noise "
        f"would, at p < {ABOVE_CHANCE:.0e} for all of them together."
    )
