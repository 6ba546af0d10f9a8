"""The Ray actor that runs one worker. It holds public weights and no secret of a TEE."""

import ipaddress
import os
from collections.abc import Sequence
from typing import NamedTuple

from tsqp.cluster.supervisor import State, Supervisor


class Report(NamedTuple):
    """What an actor says.

    Attributes:
        arguments: of its `tsqp worker`.
        state: of that process.
        node: the address of its machine.
        checks_tokens: whether its Ray demands a token of everybody.
    """

    arguments: tuple[str, ...]
    state: State
    node: str
    checks_tokens: bool


class WorkerActor:
    """Runs `tsqp worker` as a process on a free port of its node, as long as the actor lives."""

    def __init__(self, arguments: Sequence[str]) -> None:
        from ray.util import get_node_ip_address

        self._arguments = tuple(arguments)
        self._node: str = get_node_ip_address()
        is_v6 = isinstance(ipaddress.ip_address(self._node), ipaddress.IPv6Address)
        host = f"[{self._node}]" if is_v6 else self._node
        self._supervisor = Supervisor(self._arguments, f"tcp://{host}:0")

    def report(self) -> Report:
        """The state of the worker now."""
        # Ray gives its own setting to the processes of actors.
        checks_tokens = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
        return Report(self._arguments, self._supervisor.state(), self._node, checks_tokens)

    def stop(self) -> None:
        """Stop the worker for good."""
        self._supervisor.close()
