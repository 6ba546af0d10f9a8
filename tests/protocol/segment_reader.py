"""Whoever maps a segment of shared memory, and looks at it all the time.

Run as a program, this file is a process beside the worker, with the worker's rights.
"""

import json
import mmap
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, Self

ENOUGH = 3000  # looks at places
LOOKS_AT_PLACES = 100  # for one at everything, which takes longer


class Reader:
    """A process that reads from `with` to its end.

    Args:
        descriptor: of the segment.
        places: offsets where `content` is to lie, and nothing else at any time.
        secrets: what is to be nowhere in the segment.
    """

    def __init__(
        self, descriptor: int, places: Sequence[int], content: bytes, secrets: Sequence[bytes]
    ) -> None:
        self._descriptor = descriptor
        self._task = {
            "descriptor": descriptor,
            "places": list(places),
            "content": content.hex(),
            "secrets": [secret.hex() for secret in secrets],
        }
        self.seen: dict[str, int] = {}

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[self._descriptor],
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(self._task), file=self._process.stdin, flush=True)
        assert self._process.stdout.readline() == "reading\n"
        return self

    def has_looked(self) -> bool:
        """Whether it has looked often enough, since it began."""
        assert self._process.stdout is not None
        return bool(select.select([self._process.stdout], [], [], 0)[0])

    def __exit__(self, *_: object) -> None:
        said, _ = self._process.communicate(timeout=30)
        self.seen = json.loads(said.splitlines()[-1])


def read(memory: mmap.mmap, task: dict[str, Any]) -> dict[str, int]:
    """Look until standard input ends; how often, and how often at what."""
    content = bytes.fromhex(task["content"])
    secrets = [bytes.fromhex(secret) for secret in task["secrets"]]
    looks = others = leaks = 0
    has_said = False
    print("reading", flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        for place in task["places"] * LOOKS_AT_PLACES:
            looks += 1
            others += memory[place : place + len(content)] != content
        everything = memory[:]
        if looks >= ENOUGH and not has_said:
            has_said = True
            print("looked", flush=True)
        leaks += any(secret in everything for secret in secrets)
    return {"looks": looks, "others": others, "leaks": leaks}


def main() -> None:
    task = json.loads(sys.stdin.readline())
    size = os.fstat(task["descriptor"]).st_size
    with mmap.mmap(task["descriptor"], size, prot=mmap.PROT_READ) as memory:
        print(json.dumps(read(memory, task)))


if __name__ == "__main__":
    main()
