"""No number from under a lattice mask leaves its group: not in logs, records, metrics or errors.

Such numbers are linear equations in the noise, and with it in the secret.
"""

import asyncio
import logging
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from mask_blocks import from_blocks
from tsqp import AsyncLLM, SamplingParams
from tsqp.algebra.fixed_point import Bounds
from tsqp.algebra.params import LATTICE
from tsqp.algebra.residue_blocks import BLOCK, halves
from tsqp.errors import IntegrityError, LatticeError
from tsqp.gpu.worker import Worker
from tsqp.model.linear_group import LinearGroup
from tsqp.runtime import build
from tsqp.serve.metrics import Metrics
from tsqp.tee.crypto import lattice_kernels
from tsqp.tee.crypto.freivalds import FailureLimit
from tsqp.tee.crypto.lattice import LatticeProvider
from tsqp.tee.crypto.pads import Pads
from tsqp.tee.offload import lattice_group
from tsqp.tee.offload.lattice_group import Switch

MODEL = "random:tiny"
GREEDY = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
DELTA = 2**26  # larger than needed, so that a residue mod Δ has eight digits if it is negative
DIGITS = 8  # fewer may be the same by chance
Q = LATTICE.p


class Numbers:
    """Of every element that is unmasked: z, u, v and v mod Δ."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: set[int] = set()
        unmask = lattice_kernels.unmask

        def noting(z_TF: np.ndarray, u_GTW: np.ndarray, *others: Any) -> int:
            u_TF, z = from_blocks(u_GTW, z_TF.shape[1]), z_TF[: u_GTW.shape[1]]
            v_TF = (z - u_TF) % Q
            v_TF = np.where(v_TF > Q // 2, v_TF - Q, v_TF)
            for values in (z, u_TF, np.abs(v_TF), v_TF % DELTA):
                self.seen.update(values.reshape(-1).tolist())
            return unmask(z_TF, u_GTW, *others)

        monkeypatch.setattr(lattice_kernels, "unmask", noting)

    def found_in(self, text: str) -> set[int]:
        """Those with DIGITS digits or more that the text has in decimal, or as bytes."""
        large = {value for value in self.seen if value >= 10 ** (DIGITS - 1)}
        assert len(large) > 1000
        decimal = {int(digits) for digits in re.findall(rf"\d{{{DIGITS},}}", text)}
        data = text.encode()
        pieces = {data[i : i + 6] for i in range(len(data) - 5)}
        pieces |= {bytes.fromhex(found) for found in re.findall(r"(?=([0-9a-f]{12}))", text)}
        return {v for v in large if v in decimal or v.to_bytes(6, "little") in pieces}


class Run:
    """A session, and everything that it says about itself."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self.said = ""

    async def run(self, fails: type[Exception] | None) -> None:
        async with AsyncLLM(
            MODEL,
            privacy="pad",
            field="lattice",
            worker="inproc",
            threads=1,
            pad_memory=0,
            rpc_log=self._log,
        ) as llm:
            metrics = Metrics("tiny", lambda: llm)
            stream = llm.add([3, 141, 59], GREEDY)
            if fails is None:
                await stream.completions()
            else:
                with pytest.raises(fails) as found:
                    await stream.completions()
                self.said += "".join(traceback.format_exception(found.value))
            self.said += metrics.text().decode()
            self.said += repr([llm.stats, vars(llm.stats), llm.rpc, llm.pads, llm.status])
        self.said += self._log.read_text()


@pytest.mark.parametrize("fails", [None, LatticeError, IntegrityError])
def test_no_log_record_metric_or_error_has_a_number_of_an_answer(
    fails: type[Exception] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    numbers, run, calls = Numbers(monkeypatch), Worker.run, list[int]()
    of, make = Bounds.delta, LatticeProvider.make
    monkeypatch.setattr(build, "process_limit", FailureLimit())
    switch = Switch()
    for module in (lattice_group, build):
        monkeypatch.setattr(module, "process_switch", switch)
    monkeypatch.setattr(
        Bounds, "delta", lambda self, field: DELTA if field is LATTICE else of(self, field)
    )

    def make_wrong(
        provider: LatticeProvider, group: LinearGroup, pads: Pads, place: list[int]
    ) -> None:
        make(provider, group, pads, place)
        if fails is LatticeError and (group.layer, group.name) == (1, "down"):
            halves(pads.u_NF)[-1, place, 2 * BLOCK] ^= 0x40

    def lying(
        worker: Worker, operation: object, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        run(worker, operation, inputs, outputs)  # type: ignore[arg-type]
        calls.append(1)
        if fails is IntegrityError and len(calls) == 12:
            outputs[0][-1, 0] ^= 1

    monkeypatch.setattr(LatticeProvider, "make", make_wrong)
    monkeypatch.setattr(Worker, "run", lying)
    session = Run(tmp_path / "calls.jsonl")
    with caplog.at_level(logging.DEBUG), caplog.at_level(logging.DEBUG, "tsqp"):
        asyncio.run(asyncio.wait_for(session.run(fails), 60))
    output = capfd.readouterr()
    assert numbers.found_in(session.said + caplog.text + output.out + output.err) == set()


def test_such_numbers_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = Numbers(monkeypatch)
    numbers.seen = {10**8 + i for i in range(2000)} | {123}
    assert numbers.found_in("123, or 0.100000007, or 99") == {100_000_007}
    text = (10**8 + 9).to_bytes(6, "little")
    assert numbers.found_in(f"x{text.hex()}") == {100_000_009}
    assert 0x020202020202 not in numbers.seen
    numbers.seen.add(0x020202020202)
    assert numbers.found_in("\x02" * 6) == {0x020202020202}
