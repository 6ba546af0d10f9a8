"""Roles that a chat template does not know, under the names that it does."""

from collections.abc import Mapping, Sequence
from typing import Any

OLDER_NAMES = {"developer": "system"}

Messages = Sequence[Mapping[str, Any]]
Template = str | Mapping[str, str] | None


def with_known_roles(messages: Messages, template: Template) -> list[Mapping[str, Any]]:
    """The messages; those of a developer are the system's unless the template has that role.

    Args:
        template: the source of the chat template, or several by name.
    """
    sources = [template] if isinstance(template, str) else list((template or {}).values())
    roles = {
        new: old for new, old in OLDER_NAMES.items() if not any(new in each for each in sources)
    }
    return [_renamed(message, roles) for message in messages]


def _renamed(message: Mapping[str, Any], roles: Mapping[str, str]) -> Mapping[str, Any]:
    role = message.get("role")
    older = roles.get(role) if isinstance(role, str) else None
    return message if older is None else {**message, "role": older}
