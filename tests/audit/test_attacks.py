"""Each attack fires on a leak that it is for, and none of them on noise."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from audit_helpers import (
    COMPACT,
    FIRST,
    MODEL,
    PROMPT,
    WIDE,
    WIDTHS,
    activations,
    as_residues,
    farthest_from_uniform,
    noise,
    plus,
    true_rows,
    uniform,
    write,
)
from torch import Tensor

from tsqp.algebra.params import Field
from tsqp.audit import auditor as audit
from tsqp.audit.attacks import Vocabulary, match_in_any_order, match_in_place, match_row_space
from tsqp.audit.auditor import Auditor, Report
from tsqp.audit.finding import Finding
from tsqp.audit.uniformity import Agreement, Related, Repeats, Uniformity
from tsqp.checkpoint.checkpoint import open_checkpoint

SEED = 5
SIMULATIONS = 300
NAMES = {
    audit.NEAREST,
    audit.ANY_ORDER,
    audit.SORTED,
    audit.ROW_SPACE,
    audit.REPEATS,
    audit.RELATED,
    audit.UNIFORM,
    audit.EQUAL,
    audit.CORRELATED,
    audit.RELATED_IN_BOTH,
}


@pytest.fixture(scope="module")
def auditor() -> Auditor:
    return Auditor(MODEL)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.of(open_checkpoint(MODEL))


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fired(report: Report) -> set[str]:
    return {finding.attack for finding in report.leaks}


def masked(rows_TD: Tensor, seed: int = SEED) -> Tensor:
    return plus(as_residues(rows_TD), uniform(random(seed), rows_TD.shape))


# Each leak: what the first group received, in a recording that is noise otherwise.


def unmasked() -> Tensor:
    return as_residues(true_rows(PROMPT))


def permuted_tokens() -> Tensor:
    return unmasked()[torch.randperm(len(PROMPT), generator=random(SEED))]


def permuted_features() -> Tensor:
    return unmasked()[:, torch.randperm(WIDTHS[FIRST], generator=random(SEED))]


def one_mask_for_all_rows() -> Tensor:
    return plus(unmasked(), uniform(random(SEED), (1, WIDTHS[FIRST])))


def one_mask_for_two_rows() -> Tensor:
    rows = masked(true_rows(PROMPT))
    pad = (rows[3].long() - unmasked()[3]) % WIDE.p
    rows[7] = plus(unmasked()[7], pad.int())
    return rows


LEAKS: list[tuple[Callable[[], Tensor], set[str], set[str]]] = [
    # what is received, what must fire, what must not
    (
        unmasked,
        {audit.NEAREST, audit.ANY_ORDER, audit.SORTED, audit.ROW_SPACE, audit.UNIFORM},
        set(),
    ),
    (permuted_tokens, {audit.ANY_ORDER, audit.ROW_SPACE}, {audit.NEAREST}),
    (permuted_features, {audit.SORTED}, {audit.NEAREST, audit.ANY_ORDER, audit.ROW_SPACE}),
    (one_mask_for_all_rows, {audit.REPEATS, audit.RELATED}, {audit.NEAREST}),
    (one_mask_for_two_rows, {audit.RELATED}, {audit.NEAREST, audit.REPEATS, audit.UNIFORM}),
]


@pytest.mark.parametrize(
    ("leak", "must", "must_not"), LEAKS, ids=[leak.__name__ for leak, _, _ in LEAKS]
)
def test_a_planted_leak_is_found(
    leak: Callable[[], Tensor],
    must: set[str],
    must_not: set[str],
    auditor: Auditor,
    tmp_path: Path,
) -> None:
    report = auditor.audit(write(tmp_path / "a", noise(1) | {FIRST: leak()}, WIDE), PROMPT)
    assert must <= fired(report)
    assert not must_not & fired(report)


def test_rows_mixed_by_an_invertible_matrix_keep_their_row_space(
    auditor: Auditor, tmp_path: Path
) -> None:
    mixing = torch.randn(len(PROMPT), len(PROMPT), generator=random(SEED), dtype=torch.float64)
    mixed = (mixing @ true_rows(PROMPT).double()).float()
    report = auditor.audit(write(tmp_path / "a", activations() | {FIRST: mixed}, None), PROMPT)
    assert audit.ROW_SPACE in fired(report)
    assert report.named(audit.ROW_SPACE).found == len(set(PROMPT))
    assert not {audit.NEAREST, audit.SORTED} & fired(report)


def test_pads_that_serve_two_recordings_of_equal_numbers_are_found(
    auditor: Auditor, tmp_path: Path
) -> None:
    rows = masked(true_rows(PROMPT))
    first = write(tmp_path / "a", noise(1) | {FIRST: rows}, WIDE)
    second = write(tmp_path / "b", noise(2) | {FIRST: rows}, WIDE)
    found = fired(auditor.audit(first, PROMPT, again=second))
    assert found == {audit.EQUAL, audit.CORRELATED, audit.RELATED_IN_BOTH}


def test_pads_that_serve_two_recordings_of_other_numbers_are_found(
    auditor: Auditor, tmp_path: Path
) -> None:
    rows, others = masked(true_rows(PROMPT)), masked(true_rows(PROMPT[::-1]))
    first = write(tmp_path / "a", noise(1) | {FIRST: rows}, WIDE)
    second = write(tmp_path / "b", noise(2) | {FIRST: others}, WIDE)
    found = fired(auditor.audit(first, PROMPT, again=second))
    assert {audit.CORRELATED, audit.RELATED_IN_BOTH} <= found


def test_one_pad_that_serves_two_recordings_is_found(auditor: Auditor, tmp_path: Path) -> None:
    rows, others = masked(true_rows(PROMPT)), masked(true_rows(PROMPT[::-1]), SEED + 1)
    others[7] = masked(true_rows(PROMPT[::-1]))[7]
    first = write(tmp_path / "a", noise(1) | {FIRST: rows}, WIDE)
    second = write(tmp_path / "b", noise(2) | {FIRST: others}, WIDE)
    assert fired(auditor.audit(first, PROMPT, again=second)) == {audit.RELATED_IN_BOTH}


def test_a_biased_generator_is_found(auditor: Auditor, tmp_path: Path) -> None:
    rows = noise(1)
    for each in rows.values():
        even = torch.rand(each.shape, generator=random(SEED)) < 0.2
        each[even] &= ~1
    assert fired(auditor.audit(write(tmp_path / "a", rows, WIDE), PROMPT)) == {audit.UNIFORM}


def test_a_value_that_is_no_residue_is_found(auditor: Auditor, tmp_path: Path) -> None:
    rows = noise(1, COMPACT)
    rows[FIRST][0, 0] = COMPACT.p
    report = auditor.audit(write(tmp_path / "a", rows, COMPACT), PROMPT)
    assert fired(report) == {audit.UNIFORM}
    assert report.named(audit.UNIFORM).note == "1 values are outside [0, p)"


def test_plain_activations_give_the_prompt(auditor: Auditor, tmp_path: Path) -> None:
    report = auditor.audit(write(tmp_path / "a", activations(), None), PROMPT)
    assert report.recovered == PROMPT
    assert {audit.NEAREST, audit.REPEATS, audit.RELATED} <= fired(report)


def test_plain_activations_look_alike_in_two_recordings(auditor: Auditor, tmp_path: Path) -> None:
    first = write(tmp_path / "a", activations(1), None)
    second = write(tmp_path / "b", activations(2), None)
    found = fired(auditor.audit(first, PROMPT, again=second))
    assert {audit.EQUAL, audit.CORRELATED} <= found


@pytest.mark.parametrize("field", [WIDE, COMPACT])
def test_no_attack_fires_on_noise(field: Field, auditor: Auditor, tmp_path: Path) -> None:
    names = set()
    for seed in range(12):
        first = write(tmp_path / f"a{seed}", noise(seed, field), field)
        second = write(tmp_path / f"b{seed}", noise(seed + 1000, field), field)
        report = auditor.audit(first, PROMPT, again=second)
        assert not report.leaks
        assert report.recovered is None
        names |= {finding.attack for finding in report.attacks}
    assert names == NAMES


def test_shares_are_noise_alone_and_the_prompt_together(auditor: Auditor, tmp_path: Path) -> None:
    folders = write_shares(tmp_path, unmasked())
    report = auditor.audit(folders[0], PROMPT, shares=folders[1:])
    assert not report.leaks
    assert report.recovered == PROMPT
    assert report.recovered_from == "all 3 together"
    assert {finding.subject for finding in report.attacks} == {
        *map(str, folders), *(f"all but {folder}" for folder in folders)
    }  # fmt: skip


def test_a_sum_of_all_but_one_share_that_leaks_is_found(auditor: Auditor, tmp_path: Path) -> None:
    folders = write_shares(tmp_path, unmasked())
    useless = write(tmp_path / "useless", noise(77), WIDE)
    report = auditor.audit(folders[0], PROMPT, shares=[*folders[1:], useless])
    assert {finding.subject for finding in report.leaks} == {f"all but {useless}"}
    assert report.recovered == PROMPT


def test_without_one_of_the_shares_the_sum_is_no_prompt(auditor: Auditor, tmp_path: Path) -> None:
    folders = write_shares(tmp_path, unmasked())
    report = auditor.audit(folders[0], PROMPT, shares=folders[1:2])
    assert report.recovered is None
    assert not report.leaks


def write_shares(folder: Path, first_group: Tensor) -> list[Path]:
    """Three shares of that and, elsewhere, of zeros."""
    rows = {key: torch.zeros_like(each) for key, each in noise(0).items()} | {FIRST: first_group}
    a, b = noise(10), noise(11)
    last = {
        key: ((each.long() - a[key].long() - b[key].long()) % WIDE.p).int()
        for key, each in rows.items()
    }
    named = {"one": a, "two": b, "three": last}
    return [write(folder / name, share, WIDE) for name, share in named.items()]


def test_with_as_many_rows_as_features_the_row_space_says_nothing(
    vocabulary: Vocabulary,
) -> None:
    ids = list(range(64))
    finding = match_row_space(vocabulary, true_rows(ids), ids, "", "")
    assert finding.p is None
    assert finding.note == "not applicable: the rows span 64 of 64 dimensions"


def test_a_finding_counts_when_it_is_rarer_than_one_in_a_million_among_all_attacks() -> None:
    rare, demonstration = Finding("rare", "", "", p=0.3e-6), Finding("sum", "", "", p=0.0)
    demonstration = replace(demonstration, counted=False)
    others = [Finding("other", "", "", p=0.5), Finding("not applicable", "", "")]
    for number, leaks in ((0, 1), (2, 1), (3, 0)):
        report = Report("", "", 1, 1, [rare, demonstration, *others[:1] * number, others[1]])
        assert len(report.attacks) == 1 + number
        assert report.leaks == [rare] * leaks


def test_too_few_values_are_no_test_of_uniformity() -> None:
    test = Uniformity(WIDE)
    test.add(uniform(random(1), (10, 64)))
    assert test.finding("", "").p is None


# p-values of noise: uniform where they are continuous, and at least not too small elsewhere.


def test_chi_square_p_values_of_noise_are_uniform() -> None:
    for field in (WIDE, COMPACT):
        tails: list[list[float]] = []
        for seed in range(120):
            test = Uniformity(field)
            test.add(uniform(random(seed), (30, 1000), field))
            tails.append(test.p_values())
        for each in zip(*tails, strict=True):
            assert farthest_from_uniform(each) < 1.95


def test_correlation_p_values_of_noise_are_uniform() -> None:
    tails = []
    for seed in range(200):
        agreement = Agreement(WIDE)
        agreement.add(uniform(random(2 * seed), (10, 64)), uniform(random(2 * seed + 1), (10, 64)))
        tails.append(agreement.correlation("", "").p or 0.0)
    assert farthest_from_uniform(tails) < 1.95


def test_p_values_of_noise_are_small_no_oftener_than_they_say(vocabulary: Vocabulary) -> None:
    by_value = vocabulary.sorted()
    # Tokens that a random row is near to oftener than to others are the hard case.
    ids = [int(each) for each in vocabulary.noise_V.topk(20).indices]
    ids += [int(each) for each in by_value.noise_V.topk(4).indices]
    tails: dict[str, list[float]] = {}
    for seed in range(SIMULATIONS):
        rows_TD = torch.rand(24, 64, generator=random(seed)) - 0.5
        near, nearest = match_in_place(vocabulary, rows_TD, ids, "in place", "")
        related, repeats, agreement = Related(None), Repeats(COMPACT), Agreement(None)
        related.add(rows_TD)
        agreement.add(rows_TD, torch.rand(24, 64, generator=random(seed + 1000)) - 0.5)
        repeats.add(uniform(random(seed), (200, 64), COMPACT))
        for finding in (
            near,
            match_in_any_order(vocabulary, nearest, ids, "any order", ""),
            match_in_place(by_value, rows_TD, ids, "sorted", "")[0],
            match_row_space(vocabulary, rows_TD, ids, "row space", ""),
            related.finding("related", ""),
            agreement.related("related in both", ""),
            repeats.finding("repeats", ""),
        ):
            assert finding.p is not None
            tails.setdefault(finding.attack, []).append(finding.p)
    for attack, found in tails.items():
        for level in (0.01, 0.05, 0.2):
            below = sum(p <= level for p in found)
            assert below <= SIMULATIONS * level + 4 * (SIMULATIONS * level) ** 0.5, (
                attack,
                level,
                below,
            )
        assert min(found) < 0.2, attack  # and they are no constants
