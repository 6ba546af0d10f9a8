"""An LLM that nobody closed: the program ends as if it had been, and leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys

import exits
import pytest
from protocol_helpers import Commands, eventually

WITH_WORKERS = [name for name in exits.CASES if name.endswith("_with_a_worker")]
QUICK = ["end_of_main", "interrupt", "daemon_that_generates"]
OTHERS = [name for name in exits.CASES if name not in WITH_WORKERS + QUICK]
STATUS = {
    "exit_3": 3,
    "exception": 1,
    "interrupt": -signal.SIGINT,
    "interrupt_with_a_worker": -signal.SIGINT,
}
SAID = {
    "exception": ["ValueError: it leaves main"],
    "interrupt": ["KeyboardInterrupt"],
    "interrupt_with_a_worker": ["KeyboardInterrupt"],
    "daemon_that_generates": ["tsqp.errors.UsageError: This LLM is closed; make a new one."],
}


@pytest.mark.timeout(300)  # a dozen programs, on a machine that may be busy
@pytest.mark.parametrize(
    "names",
    [
        QUICK,
        pytest.param(OTHERS, marks=pytest.mark.slow),
        pytest.param(WITH_WORKERS, marks=pytest.mark.slow),  # each worker loads torch anew
    ],
    ids=["quick", "others", "with workers"],
)
def test_a_program_that_does_not_close_its_llm_ends_as_any_other(
    names: list[str], commands: Commands
) -> None:
    result = subprocess.run(
        [sys.executable, exits.__file__, *names],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | commands.tag,
        check=True,
    )
    ended = json.loads(result.stdout)
    assert [(name, status) for name, status, _ in ended] == [
        (name, STATUS.get(name, 0)) for name in names
    ], ended
    for name, _, said in ended:
        last = said.strip().splitlines()[-1:]
        if name == "daemon_that_generates" and last != SAID[name]:
            # Python ends the thread wherever it is, also while it writes its traceback.
            assert not said or said.startswith("Exception in thread Thread-1 (<lambda>):\n"), said
            assert "Fatal" not in said and "Error" not in said, said
            continue
        assert last == SAID.get(name, []), said
    left = [each for each in commands.processes() if each.pid != os.getpid()]
    assert eventually(lambda: not any(each.is_running() for each in left))
