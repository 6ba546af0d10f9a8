"""Residues from the generator are uniform on [0, p), by exact rejection."""

import math

import numpy as np
import pytest
from crypto_helpers import chi_square_p
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from tsqp.algebra.params import COMPACT, FIELDS, LATTICE, WIDE, Field
from tsqp.algebra.rejection import accept
from tsqp.tee.crypto.rng import uniform
from tsqp.wire import seeds

EVERY = (WIDE, COMPACT, LATTICE)
EACH = pytest.mark.parametrize("field", EVERY, ids=[field.name for field in EVERY])
BINS = 4096


def bins_of(residues: np.ndarray, field: Field) -> np.ndarray:
    """Counts of equal parts of [0, p), and of the lowest bits."""
    high = np.bincount(residues.astype(np.int64) * BINS // field.p, minlength=BINS)
    low = np.bincount(residues & (BINS - 1), minlength=BINS)
    return np.stack([high, low])


@EACH
def test_the_stream_is_the_accepted_words_of_aes_in_counter_mode(
    field: Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = bytes(range(32))
    aes = Cipher(algorithms.AES256(seed), modes.CTR(bytes(16))).encryptor()
    size = 4 if field.bits < 32 else 8
    stream = aes.update(bytes(size * 5000))
    words = np.frombuffer(stream, f"<u{size}") & ((1 << field.bits) - 1)
    expected = words[words < field.p][:4000]
    found = np.empty(4000, field.dtype)
    monkeypatch.setattr(seeds, "CHUNK_WORDS", 333)
    seeds.expand(seed, found, field)
    assert (found == expected).all()


@EACH
def test_candidates_of_p_or_more_are_skipped_in_order(field: Field) -> None:
    words = np.array([5, field.p, 7, field.p - 1, (1 << field.bits) - 1, 9])
    words = words.astype(np.uint32 if field.bits < 32 else np.uint64)
    kept = np.empty(6, field.dtype)
    assert accept(words, field.bits, field.p, kept) == 4
    assert kept[:4].tolist() == [5, 7, field.p - 1, 9]


@EACH
def test_residues_fill_the_field_evenly(field: Field) -> None:
    for counts in bins_of(uniform((2_000_000,), field), field):
        assert 1e-6 < chi_square_p(counts) < 1 - 1e-6


@EACH
def test_the_test_of_evenness_would_notice_a_bias(field: Field) -> None:
    biased = uniform((2_000_000,), field)
    biased[: biased.size // 20] //= 2
    assert chi_square_p(bins_of(biased, field)[0]) < 1e-6


@pytest.mark.slow
@EACH
def test_a_hundred_million_residues_are_as_even_as_chance(field: Field) -> None:
    counts = sum(bins_of(uniform((10_000_000,), field), field) for _ in range(11))
    for part in np.asarray(counts):
        assert 1e-6 < chi_square_p(part) < 1 - 1e-6
        assert part.sum() >= 10**8


def test_every_call_has_a_seed_of_its_own() -> None:
    field = FIELDS["wide"]
    rows = uniform((50, 200), field), uniform((50, 200), field)
    assert not np.intersect1d(*rows).size > math.ceil(50 * 200 * 50 * 200 / field.p) + 10
