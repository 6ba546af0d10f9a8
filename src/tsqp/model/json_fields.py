"""Typed access to a JSON object from outside; every refusal names the key.

A key that is absent or null takes its default. If it has no default, it is refused.
"""

from typing import Any

from tsqp.errors import CheckpointError, UnsupportedModel

Json = dict[str, Any]


def integer(config: Json, key: str, low: int, high: int, default: int | None = None) -> int:
    value = _value(config, key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise wrong_type(key, "an integer", value)
    if not low <= value <= high:
        raise _out_of_bounds(key, value, low, high)
    return value


def number(config: Json, key: str, low: float, high: float, default: float | None = None) -> float:
    value = _value(config, key, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise wrong_type(key, "a number", value)
    if not low <= value <= high:  # NaN and the infinities fail this too
        raise _out_of_bounds(key, value, low, high)
    return float(value)


def optional_number(config: Json, key: str, low: float, high: float) -> float | None:
    return None if config.get(key) is None else number(config, key, low, high)


def boolean(config: Json, key: str, default: bool = False) -> bool:
    value = _value(config, key, default)
    if not isinstance(value, bool):
        raise wrong_type(key, "true or false", value)
    return value


def choice(config: Json, key: str, choices: tuple[str, ...], default: str | None = None) -> str:
    value = _value(config, key, default)
    if not isinstance(value, str):
        raise wrong_type(key, "a string", value)
    if value not in choices:
        raise UnsupportedModel(
            f"The model has {key} {show(value)}, but TSQP supports {', '.join(choices)}."
        )
    return value


def _value(config: Json, key: str, default: Any) -> Any:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(f"The model config has no {key}.")
    return value


def wrong_type(key: str, wanted: str, value: object) -> CheckpointError:
    return CheckpointError(f"The model config has {key} {show(value)}, which must be {wanted}.")


def _out_of_bounds(key: str, value: float, low: float, high: float) -> CheckpointError:
    return CheckpointError(
        f"The model config has {key} {show(value)}, which must lie between {low} and {high}."
    )


def show(value: object) -> str:
    """A short form of a value from outside, safe to print."""
    try:
        text = ascii(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; deep nesting
        return f"({type(value).__name__} too large to print)"
    return text if len(text) <= 80 else text[:77] + "..."
