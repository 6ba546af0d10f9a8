"""Matches the tensors of a checkpoint with those of the model, whatever prefix their names have."""

from collections.abc import Iterable
from dataclasses import replace

from tsqp.errors import CheckpointError
from tsqp.model.config import EMBEDDING, FINAL_NORM, HEAD, ModelConfig, tensor_shapes

_MAX_PREFIXES = 2  # as in "model.language_model." and "language_model.model."

StoredNames = dict[str, str]  # a tensor's name in the checkpoint, by its name in the model


def find_tensors(
    stored: Iterable[str], config: ModelConfig, checkpoint: str, *, is_wrapper: bool
) -> tuple[StoredNames, ModelConfig]:
    """The tensors by their names in the model, and the config with the head that the tensors show.

    Tensors outside the layers that the model does not have are ignored, as in transformers, for
    example a vision part or a head for another task.

    Args:
        stored: all names in the checkpoint's files.
        checkpoint: for messages.
        is_wrapper: whether the files hold a model of text and images.

    Raises:
        CheckpointError: two tensors for one place; a tensor of a layer that the config leaves
            out; or no output projection if the config does not tie it to the embedding.
    """
    stored = list(stored)
    prefixes = ("model.", "language_model.") if is_wrapper else ("model.",)
    found = _by_model_name(stored, config, checkpoint, prefixes)
    if FINAL_NORM not in found and not is_wrapper:
        # The language model of a wrapper, saved with the wrapper's prefix.
        found = _by_model_name(stored, config, checkpoint, ("model.", "language_model."))
    return found, _settle_head(found, config, checkpoint)


def _by_model_name(
    stored: list[str], config: ModelConfig, checkpoint: str, prefixes: tuple[str, ...]
) -> StoredNames:
    known = tensor_shapes(replace(config, tie_word_embeddings=False))
    found: StoredNames = {}
    unknown = {}
    for name in stored:
        bare = _without(name, prefixes)
        plain = bare if bare in known else f"model.{bare}"
        if plain not in known:
            unknown[name] = bare
            continue
        if plain in found:
            raise CheckpointError(
                f"{checkpoint} has tensors {found[plain][:200]!a} and {name[:200]!a}, which mean"
                " the same weights: remove one."
            )
        found[plain] = name
    for name, bare in unknown.items():
        _check_unknown(name, bare, checkpoint)
    return found


def _without(name: str, prefixes: tuple[str, ...]) -> str:
    for _ in range(_MAX_PREFIXES):
        for prefix in prefixes:
            if name.startswith(prefix):
                name = name.removeprefix(prefix)
                break
    return name


def _check_unknown(name: str, bare: str, checkpoint: str) -> None:
    """Refuse tensors that belong to a part of the computation that the config does not have."""
    in_layers = bare.startswith("layers.") or bare == "lm_head.bias"
    # Older checkpoints hold frequencies, which follow from the config.
    if in_layers and not bare.endswith(".rotary_emb.inv_freq"):
        raise CheckpointError(
            f"{checkpoint} holds tensor {name[:200]!a}, for which its config.json has no place:"
            " fetch both again."
        )


def _settle_head(found: StoredNames, config: ModelConfig, checkpoint: str) -> ModelConfig:
    """Tie the output projection to the embedding exactly when transformers does.

    If the files hold both, they are not tied, whatever the config says. If the files hold only the
    output projection of a tied pair, it is the embedding.
    """
    if HEAD in found and EMBEDDING in found:
        return replace(config, tie_word_embeddings=False)
    if not config.tie_word_embeddings:
        if HEAD not in found:
            raise CheckpointError(
                f"{checkpoint} lacks tensor {HEAD}, and its config.json does not tie it to the"
                " embedding (tie_word_embeddings): fetch both again."
            )
    elif HEAD in found:
        found[EMBEDDING] = found.pop(HEAD)
    return config
