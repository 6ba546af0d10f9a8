"""The chat templates of a Hugging Face folder, as Jinja source."""

from typing import Any

from tsqp.checkpoint.files import parse_json
from tsqp.checkpoint.model_files import ModelFiles, additional_templates
from tsqp.errors import TokenizerError


def read_templates(files: ModelFiles, configured: object) -> str | dict[str, str] | None:
    """A folder's chat template, or several by name; None if there is none.

    Files in Jinja count before what tokenizer_config.json holds, as in transformers. Older
    models of images keep theirs in chat_template.json only.

    Args:
        configured: "chat_template" of tokenizer_config.json.

    Raises:
        TokenizerError: a template is not a text.
        CheckpointError: a file cannot be read.
    """
    found = additional_templates(files)
    templates = {
        name: _text(raw, path)
        for name, path in ({"default": "chat_template.jinja"} | found).items()
        if (raw := files.read(path)) is not None
    }
    if templates:
        return templates["default"] if templates.keys() == {"default"} else templates
    if configured is None and (raw := files.read("chat_template.json")) is not None:
        configured = parse_json(raw, files.folder / "chat_template.json").get("chat_template")
    return _configured(configured)


def _configured(value: object) -> str | dict[str, str] | None:
    if value is None or isinstance(value, str):
        return value
    found: dict[str, str] = {}
    for each in value if isinstance(value, list) else [value]:
        entry: dict[str, Any] = each if isinstance(each, dict) else {}
        name, template = entry.get("name"), entry.get("template")
        if not isinstance(name, str) or not isinstance(template, str):
            raise TokenizerError(
                "The chat_template of tokenizer_config.json is neither text nor a list of names and"
                " templates: correct it, or send a plain prompt instead."
            )
        found[name] = template
    return found or None


def _text(raw: bytes, path: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as exc:
        raise TokenizerError(f"The chat template {path} is not UTF-8: correct it.") from exc
