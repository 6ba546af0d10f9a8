"""`tsqp digest`."""

from tsqp.cli.app import app
from tsqp.cli.flags import Debug, Model, Quiet
from tsqp.cli.with_options import with_options


@app.command()
@with_options("privacy", "dtype")
def digest(
    *, model: Model, privacy: str, dtype: str, quiet: Quiet = False, debug: Debug = False
) -> None:
    """Print the digest of a model, for --expect-model."""
    from tsqp.cli.printing import print_digest

    print_digest(model, privacy, dtype)
