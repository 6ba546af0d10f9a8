"""Secrets that a server fetches from a key broker at its start, and keeps in memory.

An enclave runs one process, so no other one could fetch them before. The evidence that the broker
gets holds the same configuration as the server's own, so the broker's policy can demand settings.
"""

import logging
import os
from dataclasses import dataclass

from tsqp.api.claims import FIELDS
from tsqp.api.key_release import NO_MODEL
from tsqp.checkpoint.model_key import ModelKey, parse_model_key
from tsqp.errors import UsageError
from tsqp.runtime.fetch_secret import Asker, fetch_secret
from tsqp.runtime.options import Options
from tsqp.serve.configuration import effective_configuration
from tsqp.serve.options import ServeOptions, split_api_keys
from tsqp.tee.attest.choose import choose_provider

log = logging.getLogger("tsqp")


@dataclass(frozen=True, slots=True)
class Secrets:
    """What the broker gave; None and empty for what was not asked for."""

    model_key: ModelKey | None = None
    api_keys: tuple[str, ...] = ()


def fetch_secrets(options: Options, served: ServeOptions) -> Secrets:
    """Fetch the secrets that the options name.

    Raises:
        UsageError: options contradict each other, or a secret is of another kind.
        AttestationError: the broker cannot be reached or refuses, or there is no evidence.
    """
    if served.broker_url is None or served.broker_key is None or served.attest is None:
        return Secrets()
    if served.fetch_model_key is not None and options.model_key_file is not None:
        raise UsageError("Give --model-key-file or --fetch-model-key, but not both.")
    url, key = served.broker_url, bytes.fromhex(served.broker_key)
    provider, asker = choose_provider(served.attest), _asker(options, served)
    model_key: ModelKey | None = None
    api_keys: tuple[str, ...] = ()
    if (name := served.fetch_model_key) is not None:
        secret = fetch_secret(url, name, key, provider, asker)
        model_key = parse_model_key(secret, f"The broker's secret {name}")
        log.info("the broker gave the model's key")
    if (name := served.fetch_api_keys) is not None:
        text = fetch_secret(url, name, key, provider, asker).decode("utf-8", "replace")
        api_keys = tuple(split_api_keys(text, f"the broker's secret {name}"))
        log.info("the broker gave API keys: %d", len(api_keys))
    return Secrets(model_key, api_keys)


def _asker(options: Options, served: ServeOptions) -> Asker:
    """What the server says of itself before there is a model: which one it will accept."""
    has_field = options.masked and options.field in FIELDS
    return Asker(
        configuration=effective_configuration(options, served, os.environ),
        model_digest=options.expect_model or NO_MODEL,
        privacy=options.privacy,
        field=options.field if has_field else None,
    )
