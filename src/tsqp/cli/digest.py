"""`tsqp digest`."""

from pathlib import Path

from tsqp.cli.app import app
from tsqp.cli.flags import Debug, Model, Quiet
from tsqp.cli.with_options import with_options


@app.command()
@with_options("privacy", "dtype", "model_key_file")
def digest(
    *,
    model: Model,
    privacy: str,
    dtype: str,
    model_key_file: Path | None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Print the digest of a model, for --expect-model."""
    from tsqp.cli.printing import print_digest

    print_digest(model, privacy, dtype, model_key_file)
