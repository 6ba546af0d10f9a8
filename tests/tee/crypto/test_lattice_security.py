"""`scripts/lattice-security` agrees with published estimates; how hard lattice masks are."""

import importlib.util
import json
import math
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

from tsqp.algebra.params import DEGREE, LATTICE

SCRIPT = Path(__file__).parents[3] / "scripts" / "lattice-security"


@pytest.fixture(scope="module")
def security() -> ModuleType:
    loader = SourceFileLoader("lattice_security", str(SCRIPT))
    spec = importlib.util.spec_from_loader("lattice_security", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["lattice_security"] = module
    loader.exec_module(module)
    return module


# Block size and core-SVP bits, classical and quantum: Kyber's specification, round 3, table 4.
KYBER = {
    512: (math.sqrt(1.5), 403, 118, 107),
    768: (1.0, 625, 182, 165),
    1024: (1.0, 877, 256, 232),
}


@pytest.mark.parametrize("n", KYBER)
def test_the_estimate_of_kyber_is_the_published_one(n: int, security: ModuleType) -> None:
    sigma, block_size, classical, quantum = KYBER[n]
    primal, dual = security.estimate(n, math.log2(3329), sigma)
    assert primal.block_size == pytest.approx(block_size, abs=4)
    assert primal.classical_bits == pytest.approx(classical, abs=1.2)
    assert primal.quantum_bits == pytest.approx(quantum, abs=1.2)
    assert dual.block_size == pytest.approx(block_size, abs=13)


def test_the_limit_of_the_homomorphic_encryption_standard_is_about_as_hard_as_it_says(
    security: ModuleType,
) -> None:
    # Homomorphic Encryption Security Standard, 2018: q of 54 bits at N = 2048 and σ = 3.19 has 128
    # bits. Its model of BKZ counts 8d calls of a sieve that takes 2^(0.292 b + 16.4), where
    # core-SVP counts one call of 2^(0.292 b).
    for each in security.estimate(2048, 54, 3.19):
        bits = each.classical_bits + 16.4 + math.log2(8 * each.dimension)
        assert bits == pytest.approx(128, abs=10)


def test_lattice_masks_take_a_block_size_of_440_at_least(security: ModuleType) -> None:
    attacks = security.estimate(DEGREE, math.log2(LATTICE.p), math.sqrt(8))
    for attack in attacks:
        assert attack.block_size >= 440
        assert attack.classical_bits > 128
        assert attack.quantum_bits > 116


def test_more_samples_than_the_best_number_help_no_attack(security: ModuleType) -> None:
    few, many = (security.estimate(512, 20, 2.8, times * 512) for times in (2, 8))
    assert few == many


@pytest.mark.parametrize(("change", "is_harder"), [((46, 3.5), True), ((50, 2.8), False)])
def test_more_noise_is_harder_and_a_larger_q_is_easier(
    change: tuple[float, float], is_harder: bool, security: ModuleType
) -> None:
    for before, after in zip(
        security.estimate(2048, 46, 2.8), security.estimate(2048, *change), strict=True
    ):
        assert (after.classical_bits > before.classical_bits) is is_harder


def test_it_prints_a_table_and_a_line_of_json() -> None:
    found = subprocess.run([SCRIPT], capture_output=True, text=True, timeout=60, check=True).stdout
    result = json.loads(found.splitlines()[-1])
    assert (result["degree"], round(result["log_q"])) == (2048, 46)
    assert [attack["name"] for attack in result["attacks"]] == ["primal", "dual"]
