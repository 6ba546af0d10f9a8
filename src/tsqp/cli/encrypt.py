"""`tsqp encrypt`."""

from pathlib import Path
from typing import Annotated

import typer

from tsqp.cli.app import app
from tsqp.cli.flags import Debug, Model, Quiet


@app.command()
def encrypt(
    model: Model,
    out: Annotated[
        Path,
        typer.Argument(
            help="The folder to write, or the .gguf file. It must not exist.", show_default=False
        ),
    ],
    model_key_file: Annotated[
        Path,
        typer.Option(
            envvar="TSQP_MODEL_KEY_FILE",
            help="File with the key. If there is no such file, a new key is made and written to "
            "it.",
        ),
    ],
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write an encrypted copy of a model. Run it on a machine that may see the model."""
    from tsqp.checkpoint.encrypt_model import encrypt_model
    from tsqp.checkpoint.model_key import new_model_key, read_model_key
    from tsqp.cli.console import note
    from tsqp.cli.printing import loading_progress

    if model_key_file.exists():
        key = read_model_key(model_key_file)
    else:
        key = new_model_key(model_key_file)
        note(f"made a new key in {model_key_file}; without it, the copy cannot be read")
    with loading_progress("Encrypting") as encrypting:
        names = encrypt_model(model, out, key, encrypting)
    note(f"{out}: {', '.join(names)}")
    note(f"Serve it with: tsqp serve {out} --privacy tee --model-key-file {model_key_file}")
