"""Checks the text of a JSON object as it grows."""

import re

_SPACE = " \t\n\r"
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_NUMBER_CHARACTERS = frozenset("0123456789+-.eE")
_WORDS = ("true", "false", "null")
_HEX = frozenset("0123456789abcdefABCDEF")


class JsonObject:
    """Reads a JSON object character by character.

    Attributes:
        is_complete: its last bracket has been read.
    """

    def __init__(self) -> None:
        self.is_complete = False
        self._open = ""  # the brackets that are open
        self._expected = "begin"
        self._token = ""  # of a number or word
        self._escape = ""  # of a character in a string
        self._string_is_key = False

    def push(self, character: str) -> bool:
        """Take the next character; False if the text is not that of an object."""
        assert not self.is_complete
        if self._expected == "string":
            return self._in_string(character)
        if self._token:
            if self._goes_on(character):
                self._token += character
                return True
            if not (self._token in _WORDS or _NUMBER.fullmatch(self._token)):
                return False
            self._token = ""
            self._expected = "separator"
        return character in _SPACE or self._structure(character)

    def _goes_on(self, character: str) -> bool:
        """Whether a number or a word goes on."""
        if self._token[0].isalpha():
            return any(word.startswith(self._token + character) for word in _WORDS)
        return character in _NUMBER_CHARACTERS and len(self._token) < 400

    def _in_string(self, character: str) -> bool:
        if self._escape:
            self._escape += character
            if self._escape[1] != "u":
                self._escape = ""
                return character in '"\\/bfnrt'
            is_known = self._escape == "\\u" or character in _HEX
            if len(self._escape) == 6:
                self._escape = ""
            return is_known
        if character == "\\":
            self._escape = character
        elif character == '"':
            self._expected = "colon" if self._string_is_key else "separator"
        return character >= " "

    def _structure(self, character: str) -> bool:
        """Take a character outside of strings, numbers and words."""
        expected = self._expected
        if expected == "begin":
            return character == "{" and self._begin(character)
        if expected == "colon":
            self._expected = "value"
            return character == ":"
        if character in "}]":
            is_last = expected in ("separator", "first key", "first value")
            return is_last and self._end(character)
        if expected == "separator":
            self._expected = "key" if self._open[-1] == "{" else "value"
            return character == ","
        is_key = expected in ("key", "first key")
        if character == '"':
            self._string_is_key = is_key
            self._expected = "string"
            return True
        if is_key:
            return False
        if character in "{[":
            return self._begin(character)
        self._token = character
        return character in "-0123456789tfn"

    def _begin(self, bracket: str) -> bool:
        self._open += bracket
        self._expected = "first key" if bracket == "{" else "first value"
        return len(self._open) <= 100

    def _end(self, bracket: str) -> bool:
        matches = self._open[-1] == ("{" if bracket == "}" else "[")
        self._open = self._open[:-1]
        self._expected = "separator"
        self.is_complete = not self._open
        return matches
