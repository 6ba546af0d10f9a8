"""One digest of a model: every byte of it that the TEE uses.

Users who rely on a model can pin this digest. It covers the files that define the computation, the
text and the end of answers (config, generation config, tokenizer, chat templates; for a GGUF file
its whole header), and every tensor as it is used. It does not cover how tensors are distributed
over files, so the same model in other shards has the same digest.

There is one digest for each model and numeric form. A form is the dtype of the run, and whether
linear layers are computed with integers, as in the private modes and with --fixed-point. All modes
of one form have the same digest.
"""

import hashlib
import json
import re
from collections.abc import Mapping

import torch

from tsqp.checkpoint.checkpoint import Checkpoint
from tsqp.checkpoint.integer_cache import load_integers
from tsqp.checkpoint.progress import Progress, part_of, silent
from tsqp.checkpoint.quantize import integer_bytes
from tsqp.checkpoint.weights_digest import weights_digest
from tsqp.errors import UnexpectedModel, UsageError
from tsqp.model.config import trusted_shapes

LABEL = "tsqp-model-1"  # names what is hashed, and how; any change needs a new label
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")


def model_digest(
    files: Mapping[str, str],
    dtype: torch.dtype,
    weights: str,
    trusted: str | None = None,
) -> str:
    """Put the digest together.

    It is the SHA-256 of the label and, sorted by their names, a line of SHA-256 and name for each
    part of the model.

    Args:
        files: the SHA-256 of each file except those of tensors, by name; hexadecimal digits.
        dtype: the dtype of the run.
        weights: the digest of what a worker may hold too: all tensors, or the integers.
        trusted: the digest of the other tensors, if `weights` is that of integers.

    Returns:
        "sha256:" and 64 hexadecimal digits.
    """
    form = str(dtype).removeprefix("torch.") + ("" if trusted is None else " and integers")
    entries = {f"file {name}": digest for name, digest in files.items()}
    entries |= {"form": hashlib.sha256(form.encode()).hexdigest(), "weights": weights}
    if trusted is not None:
        entries["trusted weights"] = trusted
    lines = [LABEL, *(f"{digest} {json.dumps(name)}" for name, digest in sorted(entries.items()))]
    return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()


def compute_digest(
    checkpoint: Checkpoint,
    files: Mapping[str, str],
    dtype: torch.dtype,
    *,
    integers: bool,
    progress: Progress = silent,
) -> str:
    """The digest that a run would have. Holds one group of weights at a time.

    Args:
        files: as for `model_digest`.
        integers: compute the form of the private modes; this reads and fills their cache.
        progress: called with the bytes of integers, or of weights, and their total.

    Raises:
        CheckpointError: a tensor is missing, cut short, of another shape, or not finite.
    """
    if not integers:
        return model_digest(files, dtype, weights_digest(checkpoint, dtype, progress=progress))
    total = integer_bytes(checkpoint.config)
    weights = load_integers(checkpoint, lambda key, group: None, part_of(progress, 0, total))
    shapes = trusted_shapes(checkpoint.config)
    return model_digest(files, dtype, weights, weights_digest(checkpoint, dtype, shapes=shapes))


def check_digest(digest: str) -> str:
    """The digest that a user gave. Raises UsageError if it is malformed."""
    if not _DIGEST.match(digest):
        raise UsageError(
            "--expect-model takes sha256: and 64 hexadecimal digits, as `tsqp digest` prints them."
        )
    return digest


def check_expected(found: str, expected: str | None, model: str) -> None:
    """Raise UnexpectedModel unless the digests are equal, or none is expected."""
    if expected not in (None, found):
        raise UnexpectedModel(
            f"{model} has the digest {found}, but --expect-model asks for {expected}: use the"
            " model, the --dtype and the kind of --privacy that the digest was computed for."
        )
