"""The first line of `--rpc-log`: what ran, and on which machine."""

import time

import torch

from tsqp.model.config import ModelConfig
from tsqp.runtime.machine import describe_machine
from tsqp.runtime.options import Options
from tsqp.tee.call_lines import FORMAT, Geometry, Header


def run_header(
    version: str,
    model: str,
    options: Options,
    config: ModelConfig,
    dtype: torch.dtype,
    transport: str,
    digest: str | None,
) -> Header:
    """Describe a run without names that would tell whose model or machine it is.

    Args:
        version: version of tsqp.
        digest: digest of the weights, to name a model that is not well known; None without workers.
    """
    name = model if model == "demo" or model.startswith("random:") else ""
    if not name and digest is not None:
        name = f"weights {digest[:12]}"
    return Header(
        format=FORMAT,
        tsqp=version,
        privacy=options.privacy,
        field=options.field if options.masked else "",
        dtype=str(dtype).removeprefix("torch."),
        model=name,
        geometry=Geometry(
            config.num_layers, config.hidden_size, config.intermediate_size, config.vocab_size
        ),
        transport=transport,
        threads=torch.get_num_threads(),
        microbatches=options.microbatches,
        prefill_chunk=options.prefill_chunk,
        start=time.time(),
        machine=describe_machine(version),
    )
