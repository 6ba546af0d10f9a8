"""What `tsqp cluster up` is to run: the workers, their command lines and their keys."""

import re
from dataclasses import dataclass
from pathlib import Path

from tsqp.errors import UsageError
from tsqp.model.shard import MAX_SHARDS, all_shards
from tsqp.wire.keys import PUBLIC_FILE, SECRET_FILE, read_public_key

MAX_WORKERS = 1024
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")


def check_name(name: str) -> None:
    """Raise UsageError unless `name` can name a cluster."""
    if _NAME.match(name) is None:
        raise UsageError("--name takes up to 63 letters, digits, dots, dashes and underscores.")


@dataclass(frozen=True, slots=True)
class Plan:
    """Replicas of all shards of one model.

    Attributes:
        options: options of `tsqp worker` that all workers have.
        keys: the folder that holds a folder with a key pair for each worker; None for links
            without encryption. Workers read their secret key there, at the same path on each node.
        resource: the Ray resource that each worker takes one unit of, such as "GPU".
    """

    model: str
    shards: int
    replicas: int
    options: tuple[str, ...]
    keys: Path | None
    resource: str

    def __post_init__(self) -> None:
        if not 1 <= self.shards <= MAX_SHARDS:
            raise UsageError(f"--shards must be from 1 to {MAX_SHARDS}.")
        if not 1 <= self.replicas <= MAX_WORKERS // self.shards:
            raise UsageError(
                f"--replicas must be 1 or more, with at most {MAX_WORKERS} workers in all."
            )

    def workers(self) -> dict[str, tuple[str, ...]]:
        """The arguments of `tsqp worker` for each worker, by its name, without --listen."""
        found = {}
        for shard in all_shards(self.shards):
            for replica in range(1, self.replicas + 1):
                name = f"shard{shard.number}-replica{replica}"
                part = () if shard.is_whole else ("--shard", f"{shard.number}/{shard.count}")
                found[name] = (self.model, *self.options, *part, *self._link(name))
        return found

    def public_keys(self) -> dict[str, str]:
        """The public key of each worker, by its name; empty without keys.

        Raises:
            UsageError: a key is missing, or two workers have the same.
        """
        if self.keys is None:
            return {}
        found = {name: read_public_key(self.keys / name / PUBLIC_FILE) for name in self.workers()}
        if len(set(found.values())) < len(found):
            raise UsageError(
                f"Two workers have the same key in {self.keys}; run `tsqp keygen` for each."
            )
        return found

    def _link(self, name: str) -> tuple[str, ...]:
        if self.keys is None:
            return ("--insecure",)
        return ("--keyfile", str(self.keys / name / SECRET_FILE))
