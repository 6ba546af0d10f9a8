"""The worker's operations: each call is checked against the weights, then computed."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tsqp.algebra.params import FIELDS
from tsqp.errors import HandshakeError, ProtocolError
from tsqp.gpu.backends import residues
from tsqp.gpu.backends.backend import Backend
from tsqp.gpu.client_session import KvSession, KvStore
from tsqp.gpu.self_test import check_device
from tsqp.gpu.worker_weights import IntegerModel, ModelWeights, Weights
from tsqp.model.linear_group import LinearGroup
from tsqp.model.macs import dearest_row_macs
from tsqp.wire.call_limit import call_macs, check_call, check_residues
from tsqp.wire.channel import Completion, kind_of
from tsqp.wire.messages import (
    Embed,
    Hello,
    Linear,
    Operation,
    Product,
    SeedProduct,
    Stateless,
    WeightsDtype,
    Welcome,
    place_of,
)
from tsqp.wire.tensors import WEIGHTS_DTYPES, Spec

OPEN_ABILITIES = ("embedding", "linear")
ATTENTION_ABILITY = "attention"  # keeps keys and values, and computes with them
LAYER_ABILITY = "layer"  # runs whole layers
SPLIT_ABILITIES = (ATTENTION_ABILITY, LAYER_ABILITY)  # that a session of `open` may ask for besides
PRIVATE_ABILITIES = ("product", "seed_product")
LATTICE_ABILITY = "lattice_product"  # knows the residues of lattice masks
MAX_ROWS = 2**20


class Worker:
    """A `tsqp.wire.channel.Service` over one model's weights.

    Its operations keep no state between calls; operations with state are in `WorkerSession`.

    Args:
        weights: for `open`, or None.
        integers: for the private modes, or None.
        max_call_macs: most multiply-accumulates of one call; None: as the device allows.
        kv_shares: one session may take this part of the memory for keys and values.
    """

    def __init__(
        self,
        weights: Weights | None,
        integers: IntegerModel | None = None,
        max_call_macs: int | None = None,
        kv_shares: int = 2,
    ) -> None:
        assert weights is not None or integers is not None
        self._max_call_macs = max_call_macs or _default_call_macs(weights, integers)
        self._weights = weights
        self._integers = integers
        held = [each for each in (weights, integers) if each is not None]
        [self._shard] = {each.shard for each in held}
        self._groups = {place_of(group): group for each in held for group in each.linear_FD}
        self._store: KvStore | None = None  # a shard has no whole layers
        if isinstance(weights, ModelWeights):
            self._store = KvStore(weights, self._max_call_macs, kv_shares)
        if integers is not None:
            integers.backend.prepare()

    @property
    def _backend(self) -> Backend:
        """The one backend of all weights."""
        held = self._weights or self._integers
        assert held is not None
        return held.backend

    def check_device(self) -> None:
        """Raise IntegrityError unless the device multiplies the integer weights rightly."""
        if self._integers is not None:
            check_device(self._integers)

    @property
    def layers(self) -> int:
        """How many layers' weights it holds."""
        return len({group.layer for group in self._groups.values()} - {None})

    def __str__(self) -> str:
        served = [] if self._shard.is_whole else [str(self._shard)]
        if self._integers is not None:
            served.append(f"private modes (weights {self._integers.digest[:12]}…)")
        if self._weights is not None:
            dtype = WEIGHTS_DTYPES[self._weights.dtype]
            served.append(f"open in {dtype} (weights {self._weights.digest[:12]}…)")
        return ", ".join(served)

    def welcome(self, hello: Hello) -> Welcome:
        """Describe this worker to a client that needs weights of `hello.dtype`.

        Raises:
            HandshakeError: the worker does not hold weights of this kind.
        """
        if hello.dtype == "int8":
            if self._integers is None:
                raise HandshakeError(
                    "the worker holds no integer weights; start it with --serve private or all."
                )
            device, digest = self._integers.backend.name, self._integers.digest
            can = (*PRIVATE_ABILITIES, LATTICE_ABILITY)
            return self._welcome(hello, "int8", digest, can, device)
        if self._weights is None:
            raise HandshakeError(
                "the worker serves private modes only; use one of them, or start it with "
                "--serve open or all."
            )
        dtype, device = WEIGHTS_DTYPES[self._weights.dtype], self._weights.backend.name
        can = (*OPEN_ABILITIES, *(SPLIT_ABILITIES if self._store else ()))
        return self._welcome(hello, dtype, self._weights.digest, can, device)

    def _welcome(
        self,
        hello: Hello,
        dtype: WeightsDtype,
        digest: str,
        abilities: tuple[str, ...],
        device: str,
    ) -> Welcome:
        return Welcome(
            hello.nonce,
            digest,
            dtype,
            abilities,
            device,
            self._max_call_macs,
            None,
            shard=self._shard.number,
            shards=self._shard.count,
        )

    def open(self) -> "WorkerSession":
        """A session for one client's calls."""
        kv = None if self._store is None else KvSession(self._store)
        return WorkerSession(self, self._backend, kv)

    def check(self, operation: Stateless, inputs: Sequence[Spec], outputs: Sequence[Spec]) -> None:
        """Raise ProtocolError unless the tensors have the shapes that `operation` wants.

        Even if it is more work than one call may ask for.
        """
        if isinstance(operation, SeedProduct):
            rows = operation.rows
        else:
            rows = inputs[0].shape[0] if len(inputs) == 1 else 0
        if not 1 <= rows <= MAX_ROWS:
            raise ProtocolError(f"A call needs one input of 1 to {MAX_ROWS} rows.")
        wanted_inputs, wanted_output = self._specs(operation, rows)
        if list(inputs) != wanted_inputs or list(outputs) != [wanted_output]:
            raise ProtocolError(
                f"A call of {kind_of(operation)} takes {_list(wanted_inputs)} and gives "
                f"{_list([wanted_output])}, not {_list(inputs)} and {_list(outputs)}."
            )
        if not isinstance(operation, Embed):
            features, width = self._weight(operation).shape
            check_call(rows * features * width, self._max_call_macs)
            if not isinstance(operation, Linear):
                check_residues(rows * (features + width))

    def received(self, operation: Operation, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The inputs of a call, in private memory: activations, token ids, or residues."""
        if isinstance(operation, Product | SeedProduct):
            return [self._residues(operation, inputs)]
        return [tensor.clone() for tensor in inputs]

    @torch.inference_mode()
    def run(
        self, operation: Stateless, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        """Compute `operation`, which has passed `check`, into `outputs`.

        Raises:
            ProtocolError: a token id is not in the vocabulary.
        """
        match operation:
            case Linear(layer, group):
                weight_FD = self._float_weight(layer, group)
                self._open_weights.backend.linear(inputs[0], weight_FD, outputs[0])
            case Embed():
                self._embed(inputs[0], outputs[0])
            case Product(layer, group, field):
                weight_FD = self._integer_weight(layer, group)
                self._integer_model.backend.residue_product(
                    inputs[0], weight_FD, FIELDS[field], outputs[0]
                )
            case SeedProduct(layer, group, field, _, seed):
                weight_FD = self._integer_weight(layer, group)
                self._integer_model.backend.seed_product(seed, weight_FD, FIELDS[field], outputs[0])

    def _residues(self, operation: Product | SeedProduct, inputs: Sequence[Tensor]) -> Tensor:
        """c, [T, D] of the field's dtype: expanded, or as sent, with what is not a residue."""
        field = FIELDS[operation.field]
        if isinstance(operation, Product):
            return residues.unpack(inputs[0], field)
        width = self._integer_weight(operation.layer, operation.group).shape[1]
        return residues.expand(operation.seed, operation.rows, width, field)

    def _specs(self, operation: Stateless, rows: int) -> tuple[list[Spec], Spec]:
        """The inputs and the output that `operation` needs."""
        match operation:
            case Linear(layer, group):
                features, width = self._float_weight(layer, group).shape
                dtype = self._open_weights.dtype
                return [Spec((rows, width), dtype)], Spec((rows, features), dtype)
            case Embed():
                width = self._open_weights.embedding_VD.shape[1]
                dtype = self._open_weights.dtype
                return [Spec((rows,), torch.int64)], Spec((rows, width), dtype)
            case Product(layer, group, field) | SeedProduct(layer, group, field):
                features, width = self._integer_weight(layer, group).shape
                each = FIELDS[field].residue_bytes
                share = Spec((rows, each * width), torch.uint8)
                answer = Spec((rows, each * features), torch.uint8)
                return [] if isinstance(operation, SeedProduct) else [share], answer

    @property
    def _open_weights(self) -> Weights:
        if self._weights is None:
            raise ProtocolError("This worker serves private modes only.")
        return self._weights

    def _weight(self, operation: Linear | Product | SeedProduct) -> Tensor:
        find = self._float_weight if isinstance(operation, Linear) else self._integer_weight
        return find(operation.layer, operation.group)

    def _float_weight(self, layer: int, group: str) -> Tensor:
        return self._find(self._open_weights.linear_FD, layer, group)

    @property
    def _integer_model(self) -> IntegerModel:
        if self._integers is None:
            raise ProtocolError("This worker holds no integer weights.")
        return self._integers

    def _integer_weight(self, layer: int, group: str) -> Tensor:
        return self._find(self._integer_model.linear_FD, layer, group)

    def _find(self, weights_FD: Mapping[LinearGroup, Tensor], layer: int, name: str) -> Tensor:
        """The weight of the group that a call names."""
        group = self._groups.get((layer, name))
        if group is None or group not in weights_FD:
            raise ProtocolError(f"There is no group {name!r} in layer {layer}.")
        return weights_FD[group]

    def _embed(self, ids: Tensor, out_TD: Tensor) -> None:
        token_ids_T = ids.clone()  # it must not change after the check
        table_VD = self._open_weights.embedding_VD
        if token_ids_T.min() < 0 or token_ids_T.max() >= len(table_VD):
            raise ProtocolError("A token id lies outside the vocabulary.")
        self._open_weights.backend.embed(token_ids_T, table_VD, out_TD)


class WorkerSession:
    """One client's calls. Its keys and values are its own; the weights are shared by all clients.

    Args:
        backend: of the worker's weights.
        kv: None on a worker of the private modes.
    """

    def __init__(self, worker: Worker, backend: Backend, kv: KvSession | None) -> None:
        self._worker = worker
        self._backend = backend
        self._stream = backend.open_stream()
        self._kv = kv

    def use_memory(self, memory: Tensor) -> None:
        """Prepare shared memory for fast copies; see `tsqp.wire.channel.UsesMemory`."""
        self._stream.use_memory(memory)

    def forget_memory(self) -> None:
        """End `use_memory`, after all calls."""
        self._stream.forget_memory()

    def check(self, operation: Operation, inputs: Sequence[Spec], outputs: Sequence[Spec]) -> None:
        """Raise ProtocolError unless the client may ask for this, with these tensors."""
        if isinstance(operation, Stateless):
            self._worker.check(operation, inputs, outputs)
        elif self._kv is None:
            raise ProtocolError(
                "This worker keeps no keys and values: it serves private modes only, or a shard."
            )
        else:
            self._kv.check(operation, inputs, outputs)

    @torch.inference_mode()
    def run(
        self, operation: Operation, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> Completion | None:
        """Compute `operation`, which has passed `check`, into `outputs`.

        Returns:
            None if they are written, or what tells when they are.
        """
        with self._backend.on(self._stream):
            if isinstance(operation, Stateless):
                self._worker.run(operation, inputs, outputs)
            elif self._kv is not None:
                self._kv.run(operation, inputs, outputs)
            return self._stream.completion()

    def close(self) -> None:
        """Free what this client kept, after its calls."""
        self._stream.drain()
        if self._kv is not None:
            self._kv.close()


def _default_call_macs(weights: Weights | None, integers: IntegerModel | None) -> int:
    """As much as the device allows, and at least the dearest row."""
    rows = [0 if weights is None else dearest_row_macs(weights.config)]
    if integers is not None:
        rows += [weight_FD.numel() for weight_FD in integers.linear_FD.values()]
    held = weights or integers
    assert held is not None
    return call_macs(held.backend.name, max(rows))


def _list(specs: Sequence[Spec]) -> str:
    return ", ".join(map(str, specs)) or "no tensor"
