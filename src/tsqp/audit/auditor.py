"""`tsqp audit`: runs published attacks on a worker's recording, given the true prompt.

An attack that finds significantly more than it would find in noise shows a leak. The threshold is
corrected for the number of attacks, so that more attacks do not cause more false alarms.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from tsqp.audit.attacks import (
    Vocabulary,
    match_in_any_order,
    match_in_place,
    match_row_space,
)
from tsqp.audit.finding import ABOVE_CHANCE, Finding
from tsqp.audit.recording import Recording, add, open_recording, session_folder
from tsqp.audit.uniformity import Agreement, Related, Repeats, Uniformity
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.errors import PromptError, RecordingError, UsageError

NEAREST = "nearest token"
ANY_ORDER = "nearest token, any order"
SORTED = "nearest token, sorted values"
ROW_SPACE = "row space"
REPEATS = "repeats"
RELATED = "related rows"
UNIFORM = "uniform values"
EQUAL = "equal in both"
CORRELATED = "correlation of both"
RELATED_IN_BOTH = "related rows in both"


@dataclass(slots=True)
class Report:
    """The findings of all attacks of one audit.

    Attributes:
        recovered: the prompt, if an attack recovered it from a recording, else None.
        recovered_from: the worker whose recording it was.
    """

    subject: str
    mode: str
    prompt_tokens: int
    rows: int
    findings: list[Finding] = field(default_factory=list)
    recovered: list[int] | None = None
    recovered_from: str = ""

    @property
    def attacks(self) -> list[Finding]:
        """The findings that decide the verdict."""
        return [finding for finding in self.findings if finding.counted and finding.p is not None]

    def is_above_chance(self, finding: Finding) -> bool:
        """Whether the p-value is below 10⁻⁶, corrected for the number of attacks."""
        return finding.p is not None and finding.p * max(len(self.attacks), 1) < ABOVE_CHANCE

    @property
    def leaks(self) -> list[Finding]:
        """The findings that are above chance."""
        return [finding for finding in self.attacks if self.is_above_chance(finding)]

    def named(self, attack: str) -> Finding:
        """The first finding of the attack of this name."""
        return next(finding for finding in self.findings if finding.attack == attack)

    def as_json(self) -> dict[str, object]:
        """Ready for JSON."""
        findings = [
            asdict(finding) | {"above_chance": self.is_above_chance(finding)}
            for finding in self.findings
        ]
        return {
            "recording": self.subject,
            "mode": self.mode,
            "prompt_tokens": self.prompt_tokens,
            "rows": self.rows,
            "attacks": findings,
            "leaks": len(self.leaks),
            "recovered_ids": self.recovered,
            "recovered_from": self.recovered_from or None,
        }


class Auditor:
    """Attacks recordings of one model, whose weights are public."""

    def __init__(self, model: str) -> None:
        """Read the embedding table.

        Args:
            model: name or path, as in `LLM`.
        """
        self._model = model
        checkpoint = open_checkpoint(model)
        try:
            self._config = checkpoint.config
            self._vocabulary = Vocabulary.of(checkpoint)
        finally:
            checkpoint.close()
        self._sorted = self._vocabulary.sorted()

    def audit(
        self,
        folder: Path,
        ids: Sequence[int],
        *,
        again: Path | None = None,
        shares: Sequence[Path] = (),
    ) -> Report:
        """Attack one recording.

        Args:
            folder: folder of the recording.
            ids: the true prompt.
            again: another recording of the same prompt.
            shares: recordings of the other workers of the same session.

        Raises:
            RecordingError: a recording is damaged, or does not fit the others or the model.
            UsageError: one recording is given twice.
            PromptError: the ids are not a prompt of this model and this recording.
        """
        folders = [folder, *shares, *([] if again is None else [again])]
        if len({session_folder(path).resolve() for path in folders}) < len(folders):
            raise UsageError("The same recording is given twice; name different folders.")
        recordings = [self._open(path) for path in (folder, *shares)]
        first = recordings[0]
        self._check(ids, first)
        rows = sum(call.rows for call in first.calls)
        report = Report(first.name, first.mode, len(ids), rows)
        if again is not None:
            self._compare(report, first, self._open(again), ids)
        everything = add(recordings) if shares else None
        for recording in recordings:
            self._attack(report, recording, ids)
        if everything is not None:
            self._attack_sums(report, recordings, everything, ids)
        return report

    def _attack_sums(
        self,
        report: Report,
        recordings: Sequence[Recording],
        everything: Recording,
        ids: Sequence[int],
    ) -> None:
        """Attack the sum of all workers but one; then, as a demonstration, the sum of all."""
        if len(recordings) > 2:
            for left_out in recordings:
                others = [each for each in recordings if each is not left_out]
                self._attack(report, replace(add(others), name=f"all but {left_out.name}"), ids)
        together = Report("", "", 0, 0)
        self._attack(together, replace(everything, name=f"all {len(recordings)} together"), ids)
        report.findings += [replace(finding, counted=False) for finding in together.findings]
        if report.recovered is None:
            report.recovered = together.recovered
            report.recovered_from = together.recovered_from

    def _open(self, folder: Path) -> Recording:
        return open_recording(folder, self._config, self._model)

    def _check(self, ids: Sequence[int], recording: Recording) -> None:
        if not ids:
            raise PromptError("The prompt has no tokens; give the ids of the recorded one.")
        if any(not 0 <= each < self._config.vocab_size for each in ids):
            raise PromptError(f"A token id lies outside the vocabulary of {self._model}.")
        if len(ids) != recording.prompt_tokens:
            raise PromptError(
                f"The prompt has {len(ids)} tokens, but the one in {recording.name} has "
                f"{recording.prompt_tokens}; give the ids of the recorded prompt."
            )

    def _compare(
        self, report: Report, first: Recording, second: Recording, ids: Sequence[int]
    ) -> None:
        if first.mode != second.mode:
            raise RecordingError(
                f"{first.name} holds {first.mode} and {second.name} {second.mode}; compare "
                "recordings of one mode."
            )
        self._check(ids, second)
        agreement = Agreement(first.field)
        others = set(second.groups())
        for group in first.groups():
            if group in others:
                agreement.add(first.rows(group), second.rows(group))
        subject = "both recordings"
        report.findings += [
            agreement.equal(EQUAL, subject),
            agreement.correlation(CORRELATED, subject),
            agreement.related(RELATED_IN_BOTH, subject),
        ]

    def _attack(self, report: Report, recording: Recording, ids: Sequence[int]) -> None:
        name = recording.name
        rows_TD = recording.numbers(recording.first)[: len(ids)]
        near, nearest = match_in_place(self._vocabulary, rows_TD, ids, NEAREST, name)
        by_value, sorted_nearest = match_in_place(self._sorted, rows_TD, ids, SORTED, name)
        report.findings += [
            near,
            match_in_any_order(self._vocabulary, nearest, ids, ANY_ORDER, name),
            by_value,
            match_row_space(self._vocabulary, rows_TD, ids, ROW_SPACE, name),
        ]
        report.findings += _noise_findings(recording)
        for finding, tokens in ((near, nearest), (by_value, sorted_nearest)):
            if report.recovered is None and report.is_above_chance(finding):
                report.recovered, report.recovered_from = tokens, name


def _noise_findings(recording: Recording) -> list[Finding]:
    """Run the tests of uniformity in one pass over all rows."""
    repeats, related = Repeats(recording.field), Related(recording.field)
    uniformity = None if recording.field is None else Uniformity(recording.field)
    for group in recording.groups():
        rows_ND = recording.rows(group)
        repeats.add(rows_ND)
        related.add(rows_ND)
        if uniformity is not None:
            uniformity.add(rows_ND)
    name = recording.name
    findings = [repeats.finding(REPEATS, name), related.finding(RELATED, name)]
    if uniformity is not None:
        findings.append(uniformity.finding(UNIFORM, name))
    return findings
