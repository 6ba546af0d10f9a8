"""What a worker does with a call: check it against the weights it holds, and compute."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tsqp.errors import ProtocolError
from tsqp.gpu import kernels
from tsqp.gpu.weights import Weights
from tsqp.wire.messages import Embed, Hello, Linear, Operation, Welcome
from tsqp.wire.tensors import DTYPE_NAMES, Spec

ABILITIES = ("embedding", "linear")
MAX_ROWS = 2**20


class Worker:
    """A `tsqp.wire.channel.Service` over one model's weights. It keeps nothing between calls."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def welcome(self, hello: Hello) -> Welcome:
        """What this worker serves."""
        dtype = DTYPE_NAMES[self._weights.dtype]
        device = self._weights.device.type
        return Welcome(hello.nonce, self._weights.digest, dtype, ABILITIES, device, None)

    def check(self, operation: Operation, inputs: Sequence[Spec], outputs: Sequence[Spec]) -> None:
        """Raise ProtocolError unless the tensors have the shapes that `operation` wants."""
        rows = inputs[0].shape[0] if len(inputs) == 1 else 0
        if not 1 <= rows <= MAX_ROWS:
            raise ProtocolError(f"A call needs one input of 1 to {MAX_ROWS} rows.")
        dtype = self._weights.dtype
        match operation:
            case Linear(layer, group):
                weight_FD = self._weights.linear_FD.get((layer, group))
                if weight_FD is None:
                    raise ProtocolError(f"There is no group {group!r} in layer {layer}.")
                features, width = weight_FD.shape
                wanted_input = Spec((rows, width), dtype)
            case Embed():
                features = self._weights.config.hidden_size
                wanted_input = Spec((rows,), torch.int64)
        wanted_output = Spec((rows, features), dtype)
        if inputs[0] != wanted_input or list(outputs) != [wanted_output]:
            raise ProtocolError(
                f"{operation} wants {wanted_input} and gives {wanted_output}, not "
                f"{[str(spec) for spec in inputs]} and {[str(spec) for spec in outputs]}."
            )

    @torch.inference_mode()
    def run(
        self, operation: Operation, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        """Compute `operation`, which has passed `check`, into `outputs`.

        Raises:
            ProtocolError: a token id is not in the vocabulary.
        """
        match operation:
            case Linear(layer, group):
                kernels.linear(inputs[0], self._weights.linear_FD[layer, group], outputs[0])
            case Embed():
                token_ids_T = inputs[0].clone()  # what is checked must not change afterwards
                if token_ids_T.min() < 0 or token_ids_T.max() >= len(self._weights.embedding_VD):
                    raise ProtocolError("A token id lies outside the vocabulary.")
                kernels.embed(token_ids_T, self._weights.embedding_VD, outputs[0])
