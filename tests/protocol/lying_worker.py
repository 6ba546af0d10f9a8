"""A worker that lies: a real process, the real protocol, and one misbehaviour a session.

    python lying_worker.py ENDPOINT ORDERS

ORDERS is a file that says what the next session's misbehaviour is; it is read at each handshake.
Whatever no misbehaviour touches is done by the real `Server` and the real `Worker`.

Shape suffixes: T tokens; D input and F output features of a group; B bytes of a row.
"""

import os
import select
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from lies import (
    MODEL,
    WRONG_MESSAGES,
    WRONG_PRODUCTS,
    WRONG_WELCOMES,
    Answer,
    Frames,
    Order,
    Place,
    flip,
)
from torch import Tensor

from tsqp.algebra import residue_bytes
from tsqp.algebra.params import FIELDS, Field
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.gpu.backends.cpu import CpuBackend
from tsqp.gpu.worker import Worker
from tsqp.gpu.worker_weights import load_integers, load_weights
from tsqp.wire.channel import kind_of
from tsqp.wire.codec import encode
from tsqp.wire.endpoint import parse_endpoint
from tsqp.wire.mailbox import MAILBOX_BYTES, Mailbox
from tsqp.wire.messages import (
    Attach,
    Call,
    FromTEE,
    Hello,
    Message,
    Operation,
    Product,
    Result,
    SealedRef,
    SeedProduct,
    Welcome,
)
from tsqp.wire.seeds import expand
from tsqp.wire.server import Server
from tsqp.wire.session import Session
from tsqp.wire.tensors import Spec

OTHER_MODEL = "random:tiny:1"
MEDDLE_S = 0.003  # how long memory keeps changing after the answer was posted
PAGE = 4096


class Liar:
    """The service of one session: the worker's own, but for what the order says."""

    def __init__(self, honest: Worker, other: Worker, order: Order, previous: "Liar | None"):
        self.order = order
        self.is_lying = False  # in the call that is being answered
        self.outputs: Sequence[Tensor] = ()
        self.answers: dict[Place, Tensor] = {}
        self.segment: int | None = None
        self._worker = other if order.lie == "hides other weights" else honest
        self._session = self._worker.open()
        self._heard = {} if previous is None else previous.answers
        self._calls = 0

    def welcome(self, hello: Hello) -> Welcome:
        welcome = self._worker.welcome(hello)
        if self.order.lie == "hides other weights":
            return msgspec.structs.replace(welcome, weights_digest=hello.weights_digest)
        return welcome

    def open(self) -> "Liar":
        return self

    def check(self, operation: Operation, inputs: Sequence[Spec], outputs: Sequence[Spec]) -> None:
        self._session.check(operation, inputs, outputs)

    def run(
        self, operation: Operation, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        order = self.order
        self._calls += 1
        self.outputs = outputs
        place = getattr(operation, "layer", None), getattr(operation, "group", kind_of(operation))
        self.is_lying = place == (order.layer, order.group) and self._calls > order.after
        if self.is_lying and order.lie == "fails":
            raise RuntimeError("this worker has better things to do")
        if self.is_lying and order.lie == "writes nothing":
            return
        self._session.run(operation, inputs, outputs)
        if self.is_lying and order.lie == "not a number":
            outputs[0].view(-1)[-1] = torch.nan
        if isinstance(operation, Product):
            self._replace(operation, read(inputs[0], FIELDS[operation.field]), outputs[0])
        elif isinstance(operation, SeedProduct):
            width = self._worker._integer_weight(operation.layer, operation.group).shape[1]
            self._replace(operation, share(operation, width), outputs[0])

    def _replace(self, operation: Product | SeedProduct, c_TD: Tensor, z_TB: Tensor) -> None:
        field, key = FIELDS[operation.field], (operation.layer, operation.group)
        answer = self._answer(field, key, c_TD, read(z_TB, field))
        self.answers[key] = answer.z_TF
        if not self.is_lying:
            return
        if self.order.lie == "one bit flipped":
            flip(z_TB, self.order.bit)
        elif (change := WRONG_PRODUCTS.get(self.order.lie)) is not None:
            wrong_TF = change(answer)
            if wrong_TF is not None:
                residue_bytes.pack(wrong_TF.numpy().astype(field.dtype), field, z_TB.numpy())

    def _answer(self, field: Field, key: Place, c_TD: Tensor, z_TF: Tensor) -> Answer:
        def fitting(found_TF: Tensor | None) -> Tensor | None:
            return found_TF if found_TF is not None and found_TF.shape == z_TF.shape else None

        others = [fitting(found_TF) for other, found_TF in self.answers.items() if other != key]
        other_TF = next((found_TF for found_TF in others if found_TF is not None), None)
        before_TF, session_TF = self.answers.get(key), self._heard.get(key)
        return Answer(field, c_TD, z_TF, fitting(before_TF), other_TF, fitting(session_TF))

    def messages(self, frames: Frames) -> Sequence[Frames]:
        """What is said instead of an answer."""
        change = WRONG_MESSAGES.get(self.order.lie)
        return [frames] if change is None or not self.is_lying else change(frames)

    def before_posting(self) -> None:
        if self.is_lying and self.order.lie.startswith("truncates "):
            assert self.segment is not None
            try:
                os.ftruncate(self.segment, 2 * PAGE)  # the rings stay, the tensors go
            except PermissionError as exc:
                print(f"cannot truncate: {exc.strerror}", file=sys.stderr, flush=True)

    def after_posting(self) -> None:
        if self.is_lying and self.order.lie == "changes its answer afterwards":
            threading.Thread(target=meddle, args=(self.outputs[0], self.order.bit)).start()

    def close(self) -> None:
        self._session.close()

    def forget(self) -> None:
        """Let go of the session's memory."""
        self.outputs = ()
        if self.segment is not None:
            os.close(self.segment)


class LyingMailbox(Mailbox):
    """Posts what its liar says instead of each answer."""

    def __init__(self, memory: memoryview, liar: Liar) -> None:
        super().__init__(memory, "worker")
        self._liar = liar

    def post(self, frame: bytes) -> bool:
        self._liar.before_posting()
        asleep = [super(LyingMailbox, self).post(m[0]) for m in self._liar.messages([frame])]
        self._liar.after_posting()
        return any(asleep)


class LyingServer(Server):
    """The real server, whose sessions each have a liar for a service."""

    def __init__(self, endpoint: str, orders: Path, honest: Worker, other: Worker) -> None:
        super().__init__(parse_endpoint(endpoint))
        self._orders = orders
        self._asked = orders.with_suffix(".sessions").open("ab", buffering=0)
        self._workers = honest, other
        self._liars: dict[bytes, Liar] = {}
        self._last: Liar | None = None
        self._held: tuple[int, Call] | None = None

    def _begin(self, identity: bytes, hello: Hello) -> None:
        if hello.abilities:  # else it is a question, not a session
            self._asked.write(b".")
        order = msgspec.json.decode(self._orders.read_bytes(), type=Order)
        self._last = liar = Liar(*self._workers, order, self._last)
        self._service = self._liars[identity] = liar
        super()._begin(identity, hello)
        session = self.sessions[identity]
        if session.segment is not None and order.lie.startswith("truncates "):
            ref = session.segment.ref
            sealed = isinstance(ref, SealedRef)
            path = f"/proc/self/fd/{ref.descriptor}" if sealed else f"/dev/shm/{ref.name}"
            liar.segment = os.open(path, os.O_RDWR)

    def _share_memory(self, session: Session, *, may_seal: bool) -> str:
        named = session.service.order.lie == "truncates a segment with a name"
        return super()._share_memory(session, may_seal=may_seal and not named)

    def _dispatch(self, identity: bytes, ticket: int, message: FromTEE, posted: bool) -> None:
        super()._dispatch(identity, ticket, message, posted)
        session = self.sessions.get(identity)
        if isinstance(message, Attach) and session and session.segment and session.mailbox:
            memory = session.segment.memory(MAILBOX_BYTES)
            session.mailbox = LyingMailbox(memory, self._liars[identity])

    def _call(
        self, identity: bytes, session: Session, ticket: int, call: Call, posted: bool
    ) -> None:
        self._service = liar = self._liars[identity]
        calls = [(ticket, call)]
        if liar.order.lie == "exchanges two answers":
            calls = self._exchange(liar.order, ticket, call)
        for each, changed in calls:
            super()._call(identity, session, each, changed, posted)

    def _exchange(self, order: Order, ticket: int, call: Call) -> list[tuple[int, Call]]:
        """Hold a call until another of its group is there, and answer each in the other's place."""
        operation = call.operation
        if not isinstance(operation, Product | SeedProduct) or operation.group != order.group:
            return [(ticket, call)]
        if self._held is None:
            self._held = ticket, call
            return []
        (first, held), self._held = self._held, None
        return [
            (first, msgspec.structs.replace(held, outputs=call.outputs)),
            (ticket, msgspec.structs.replace(call, outputs=held.outputs)),
        ]

    def _send(
        self, identity: bytes, message: Message, ticket: int, inline: Sequence[memoryview] = ()
    ) -> None:
        liar = self._liars.get(identity)
        if isinstance(message, Welcome) and liar and liar.order.lie in WRONG_WELCOMES:
            message = WRONG_WELCOMES[liar.order.lie](message)
        if not isinstance(message, Result) or liar is None:
            super()._send(identity, message, ticket, inline)
            return
        for frames in liar.messages([encode(message, ticket), *inline]):
            self._socket.send(identity, frames, wait=True)

    def _end(self, identity: bytes, why: str) -> None:
        super()._end(identity, why)
        liar = self._liars.pop(identity, None)
        if liar is not None:
            liar.forget()


def read(bytes_TB: Tensor, field: Field) -> Tensor:
    rows, length = bytes_TB.shape
    residues_TN = np.empty((rows, length // field.residue_bytes), field.dtype)
    residue_bytes.unpack(bytes_TB.numpy(), field, residues_TN)
    return torch.from_numpy(residues_TN).long()


def share(operation: SeedProduct, width: int) -> Tensor:
    """The residues that a seed stands for."""
    field = FIELDS[operation.field]
    c_TD = np.empty((operation.rows, width), field.dtype)
    expand(operation.seed, c_TD.reshape(-1), field)
    return torch.from_numpy(c_TD).long()


def meddle(bytes_TB: Tensor, bit: int) -> None:
    """Change memory back and forth, for a moment."""
    end = time.monotonic() + MEDDLE_S
    while time.monotonic() < end:
        flip(bytes_TB, bit)


def load(model: str) -> Worker:
    checkpoint = open_checkpoint(model)
    cpu = CpuBackend()
    return Worker(load_weights(checkpoint, torch.float32, cpu), load_integers(checkpoint, cpu))


def main(endpoint: str, orders: str) -> None:
    honest = load(MODEL)
    server = LyingServer(endpoint, Path(orders), honest, load(OTHER_MODEL))
    print("serving ", file=sys.stderr, flush=True)
    try:
        # Standard input ends when the tests do, however they end.
        server.serve(honest, lambda: bool(select.select([sys.stdin], [], [], 0)[0]))
    finally:
        server.close()


if __name__ == "__main__":
    sys.setswitchinterval(1e-5)  # so that memory changes while the other thread serves
    main(*sys.argv[1:])
