"""`tsqp digest`."""

from tsqp.cli.app import app
from tsqp.cli.flags import Debug, Dtype, Model, Privacy, Quiet


@app.command()
def digest(
    model: Model,
    privacy: Privacy = "pad",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Print the digest of a model, for --expect-model: of all that the trusted side uses of it."""
    from tsqp.cli.printing import print_digest

    print_digest(model, privacy, dtype)
