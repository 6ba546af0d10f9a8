"""Random JSON schemas that a short answer can satisfy."""

import random
from typing import Any

Schema = dict[str, Any]

_NAMES = ["a", "name", "größe", "two words", 'a"quote', "back\\slash", "漢", "x_1", "", "$ref"]
_TEXTS = ["", "red", "größer", 'say "hi"', "line\nbreak", "\\", "😀", "漢字"]
_PATTERNS = ["^[a-c]{1,4}$", "^[A-Z][a-z]{0,3}-[0-9]{2}$", "^(ab|cd){1,2}$", "^é?$"]
_FORMATS = ["date", "time", "uuid", "ipv4", "date-time"]


def random_schema(seed: int) -> Schema:
    """The same schema for the same seed: an object, a list or a plain value."""
    draw = random.Random(seed)
    schema = _any(draw, 3)
    if draw.random() < 0.3:
        schema = {"type": "object", "properties": {"value": schema}, "required": ["value"]}
        schema["additionalProperties"] = False
        if draw.random() < 0.5:  # through a reference
            part = schema["properties"]["value"]
            schema["properties"]["value"] = {"$ref": "#/$defs/part"}
            schema["$defs"] = {"part": part}
    return schema


def _any(draw: random.Random, depth: int) -> Schema:
    kinds = [_string, _integer, _number, _constant, _choice, _plain]
    if depth:
        kinds += [_object, _object, _object, _list, _list, _tuple, _union]
    made: Schema = draw.choice(kinds)(draw, depth - 1)
    return made


def _string(draw: random.Random, _: int) -> Schema:
    kind = draw.randrange(3)
    if kind == 0:
        return {"type": "string", "pattern": draw.choice(_PATTERNS)}
    if kind == 1:
        return {"type": "string", "format": draw.choice(_FORMATS)}
    least = draw.randrange(4)
    return {"type": "string", "minLength": least, "maxLength": least + draw.randrange(6)}


def _integer(draw: random.Random, _: int) -> Schema:
    least = draw.randrange(-1000, 1000)
    schema = {"type": "integer", "minimum": least, "maximum": least + draw.randrange(2000)}
    if draw.random() < 0.3:
        schema = {"type": "integer", "exclusiveMinimum": least, "exclusiveMaximum": least + 40}
        schema["multipleOf"] = draw.choice([2, 3, 7])
    return schema


def _number(draw: random.Random, _: int) -> Schema:
    least = draw.randrange(-50, 50) / 4
    return {"type": "number", "minimum": least, "maximum": least + draw.randrange(1, 9)}


def _constant(draw: random.Random, _: int) -> Schema:
    return {"const": draw.choice([*_TEXTS, 1, -2.5, None, True, [1, "a"], {"k": [None]}])}


def _choice(draw: random.Random, _: int) -> Schema:
    return {"enum": draw.sample([*_TEXTS, 0, 12, None, False, {"a": 1}], draw.randrange(1, 5))}


def _plain(draw: random.Random, _: int) -> Schema:
    return {"type": draw.choice(["boolean", "null", ["boolean", "null"]])}


def _object(draw: random.Random, depth: int) -> Schema:
    names = draw.sample(_NAMES, draw.randrange(0, 4))
    schema: Schema = {
        "type": "object",
        "properties": {name: _any(draw, depth) for name in names},
        "required": [name for name in names if draw.random() < 0.7],
        "additionalProperties": False,
    }
    if not names and draw.random() < 0.5:
        schema["patternProperties"] = {"^[a-c]{1,3}$": _any(draw, 0)}
        schema["maxProperties"] = draw.randrange(1, 3)
    return schema


def _list(draw: random.Random, depth: int) -> Schema:
    least = draw.randrange(3)
    items = {"items": _any(draw, depth)}
    return {"type": "array", "minItems": least, "maxItems": least + draw.randrange(3)} | items


def _tuple(draw: random.Random, depth: int) -> Schema:
    count = draw.randrange(1, 3)
    first = [_any(draw, depth) for _ in range(count)]
    return {"type": "array", "prefixItems": first, "items": False, "minItems": count}


def _union(draw: random.Random, depth: int) -> Schema:
    return {"anyOf": [_any(draw, depth) for _ in range(draw.randrange(2, 4))]}
