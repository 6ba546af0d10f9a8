"""Reads one tool call, `{"name": "...", "arguments": {...}}`, as it grows."""

import json
from collections.abc import Collection, Iterator
from enum import Enum

from tsqp.serve.tools.json_object import JsonObject

_SPACE = " \t\n\r"
_MOST_NAME = 400  # characters between the quotes
ARGUMENTS_KEYS = ("arguments", "parameters")


class Found(Enum):
    """What a character of a call is."""

    NOTHING = 0  # a part of the frame around name and arguments
    NAME = 1  # the name is known, and this character begins the arguments
    ARGUMENTS = 2  # a part of the arguments
    END = 3  # the end of the call
    WRONG = 4  # it cannot be a call of one of the tools


class CallObject:
    """One call of a tool. The name comes before the arguments, and an "id" may follow them.

    Attributes:
        name: of the tool, once it is known.
    """

    def __init__(self, names: Collection[str]) -> None:
        """Begin before the first bracket.

        Args:
            names: the names of the tools that there are.
        """
        self.name = ""
        self._names = names
        self._arguments = JsonObject()
        self._string: str | None = None  # the characters of the string that is being read
        self._text = ""  # the last string
        self._steps = self._walk()
        self._wanted = next(self._steps)

    def push(self, character: str) -> Found:
        """Take the next character. After END and WRONG there is no next one."""
        if self._wanted == "arguments":
            if not self._arguments.push(character):
                return Found.WRONG
            if self._arguments.is_complete:
                self._wanted = next(self._steps)
            return Found.ARGUMENTS
        if self._string is not None:
            return self._in_string(character)
        if character in _SPACE:
            return Found.NOTHING
        if self._wanted == "string" and character == '"':
            self._string = '"'
            return Found.NOTHING
        if character not in self._wanted or self._wanted == "string":
            return Found.WRONG
        if character == "{" and self.name:
            self._arguments.push(character)
            self._wanted = next(self._steps)
            return Found.NAME
        if character == "}":
            return Found.END
        self._wanted = next(self._steps)
        return Found.NOTHING

    def _in_string(self, character: str) -> Found:
        assert self._string is not None
        self._string += character
        if len(self._string) > _MOST_NAME:
            return Found.WRONG
        before = self._string[:-1]
        if character != '"' or (len(before) - len(before.rstrip("\\"))) % 2:  # or an escaped one
            return Found.NOTHING
        try:
            self._text = json.loads(self._string)
        except ValueError:
            return Found.WRONG
        self._string = None
        try:
            self._wanted = next(self._steps)
        except StopIteration:
            return Found.WRONG
        return Found.NOTHING

    def _walk(self) -> Iterator[str]:
        """What may come next: one of these characters, "string", or "arguments"."""
        yield "{"
        yield "string"
        if self._text != "name":
            return
        yield ":"
        yield "string"
        name = self._text
        if name not in self._names:
            return
        yield ","
        yield "string"
        if self._text not in ARGUMENTS_KEYS:
            return
        yield ":"
        self.name = name
        yield "{"
        yield "arguments"
        while True:
            yield ",}"
            yield "string"
            if self._text not in ("id", "type"):
                return
            yield ":"
            yield "string"
