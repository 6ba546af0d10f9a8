"""Finds the tool calls in an answer's text as it grows."""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

from tsqp.serve.tools.call_object import CallObject, Found

_SPACE = " \t\n\r"


@dataclass(frozen=True, slots=True)
class Delta:
    """What a piece of text adds to an answer: some content, the name of a call, or arguments.

    Attributes:
        content: text of the answer that is not part of a call.
        call: number of the call that the name or the arguments belong to, from 0.
        name: the tool of a call that begins here. Its arguments follow in other deltas.
        arguments: a piece of JSON text.
    """

    content: str = ""
    call: int | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands around the calls in a template style.

    Attributes:
        openings: each of these texts begins a call, or a list of calls in brackets.
        closing: ends it; empty for styles without such a text.
        may_begin_bare: a call without an opening may be the beginning of the answer.
    """

    openings: tuple[str, ...]
    closing: str = ""
    may_begin_bare: bool = False


class ToolParser:
    """Splits an answer's text into content and tool calls.

    Text that is not a call of a known tool is content: broken JSON, other names, and tags without a
    call. How the text is split into pieces does not change the result. Whitespace next to a call
    is dropped. If the arguments of a call turn out to be broken, what was already given out stays,
    and the rest is content.
    """

    def __init__(self, frame: Frame, names: Collection[str]) -> None:
        """Begin an answer.

        Args:
            names: the names of the tools.
        """
        self._frame = frame
        self._names = names
        self._calls = 0
        # What was found: a name; arguments of a call, by its number; or content, under None.
        self._pieces: list[tuple[str | int | None, list[str]]] = []
        self._is_bare = frame.may_begin_bare  # a call may begin here without an opening
        self._space = ""  # whitespace that is dropped if a call follows
        self._mark = ""  # perhaps the beginning of an opening
        self._unread = ""  # of a call: what becomes content if it is not one
        self._call: CallObject | None = None
        self._between = ""  # calls: "" outside, else what is expected next
        self._is_list = False

    def feed(self, text: str) -> list[Delta]:
        """Take the next piece of the answer's text, and return what it adds."""
        waiting = deque(text)
        while waiting:
            again = self._push(waiting.popleft())
            waiting.extendleft(reversed(again))
        return self._take()

    def finish(self) -> list[Delta]:
        """What was held back, at the end of the answer."""
        rest = self._unread + self._space + self._mark
        self._unread = self._space = self._mark = ""
        if not (self._calls and rest.isspace()):
            self._content(rest)
        return self._take()

    def _push(self, character: str) -> str:
        """Take one character; returns characters that must be read again, as content."""
        if self._call is not None:
            return self._in_call(self._call, character)
        if self._between:
            return self._between_calls(character)
        self._in_content(character)
        return ""

    def _in_content(self, character: str) -> None:
        if self._is_bare and not self._mark:
            if character in _SPACE:
                self._space += character
                return
            self._is_bare = False
            if character == "{":
                self._begin_call(character)
                return
        mark = self._mark + character
        while not any(opening.startswith(mark) for opening in self._frame.openings):
            if mark[0] in _SPACE:
                self._space += mark[0]
            else:
                self._content(self._space + mark[0])
                self._space = ""
            mark = mark[1:]
            if not mark:
                break
        self._mark = mark
        if mark in self._frame.openings:
            self._unread, self._mark = self._space + mark, ""
            self._space = ""
            self._is_list = False
            self._between = "first"

    def _begin_call(self, character: str) -> None:
        self._unread += self._space + character
        self._space = ""
        self._call = CallObject(self._names)
        self._call.push(character)

    def _in_call(self, call: CallObject, character: str) -> str:
        self._unread += character
        found = call.push(character)
        if found is Found.WRONG:
            return self._give_up()
        if found is Found.NAME:
            self._calls += 1
            self._pieces.append((call.name, []))
            self._pieces.append((self._calls - 1, [character]))
            self._unread = ""
        elif found is Found.ARGUMENTS:
            self._add(self._calls - 1, character)
            self._unread = ""
        elif found is Found.END:
            self._call, self._unread = None, ""
            if self._is_list:
                self._between = "separator"
            else:
                self._between = self._frame.closing
        return ""

    def _between_calls(self, character: str) -> str:
        """Take a character between an opening, the calls, and the closing."""
        expected = self._between
        if expected in ("first", "next"):
            if character == "{":
                self._between = ""
                self._begin_call(character)
                return ""
            self._unread += character
            if character == "[" and expected == "first":
                self._is_list = True
                self._between = "next"
                return ""
        elif expected == "separator":
            self._unread += character
            if character in ",]":
                self._between = "next" if character == "," else self._frame.closing
                if character == "]":
                    self._unread, self._is_list = "", False
                return ""
        else:  # the rest of the closing
            self._unread += character
            if character == expected[0]:
                self._between = expected[1:]
                if not self._between:
                    self._unread = ""
                return ""
            if expected != self._frame.closing:
                return self._give_up()
        return "" if character in _SPACE else self._give_up()

    def _give_up(self) -> str:
        """Make content of what was read of a call; returns what comes after its beginning."""
        text, self._unread = self._unread, ""
        self._call, self._between, self._is_list = None, "", False
        begins = text.lstrip(_SPACE)
        opening = next((each for each in self._frame.openings if begins.startswith(each)), None)
        taken = len(text) - len(begins) + (len(opening) if opening else 1)
        self._content(text[:taken])
        return text[taken:]

    def _content(self, text: str) -> None:
        if text:
            self._is_bare = False
            self._add(None, text)

    def _add(self, call: int | None, text: str) -> None:
        """Give out content, or arguments of a call."""
        if not self._pieces or self._pieces[-1][0] != call:
            self._pieces.append((call, []))
        self._pieces[-1][1].append(text)

    def _take(self) -> list[Delta]:
        pieces, self._pieces = self._pieces, []
        deltas = []
        for place, (kind, texts) in enumerate(pieces):
            text = "".join(texts)
            if kind is None:
                deltas.append(Delta(content=text))
            elif isinstance(kind, int):
                deltas.append(Delta(call=kind, arguments=text))
            else:  # a name; the arguments of the same call come next
                call = pieces[place + 1][0]
                assert isinstance(call, int)
                deltas.append(Delta(call=call, name=kind))
        return deltas
