"""The loop of `tsqp chat`: reads lines and prints answers.

Answers go to standard output, and all other messages to standard error.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import Protocol

from tsqp.cli.console import note, say
from tsqp.errors import PromptTooLong, ServerError, TSQPError, WorkerError
from tsqp.tee.sampling import SamplingParams

HELP = """\
/reset         forget the conversation, but keep the system message
/system TEXT   set the system message; without TEXT, remove it
/undo          remove the last message and its answer
/retry         answer the last message again
/save FILE     write the conversation to a new JSON file
/stats         show where the time went
/exit          end the chat; Ctrl-D does the same
//TEXT         send a message that begins with a slash
Ctrl-C stops the answer that is being written, and keeps what is there."""


class Answer(Protocol):
    """An answer as it ended; `finish_reason` is "abort" if it was stopped."""

    @property
    def text(self) -> str: ...
    @property
    def finish_reason(self) -> str: ...


class Answerer(Protocol):
    """What answers: a model in this process, or a server."""

    def answer(
        self,
        messages: Sequence[dict[str, str]],
        params: SamplingParams,
        should_stop: Callable[[], bool],
    ) -> Answer:
        """Print an answer as it comes, until it ends or should stop.

        Raises:
            TSQPError: there is no answer, or not all of it.
        """

    def forget(self) -> None:
        """Drop what is kept of the conversation."""

    def print_statistics(self) -> None:
        """Print where the time of the answers went."""


class Repl:
    """One conversation.

    Args:
        params: sampling parameters. `seed` is for the first answer; each later answer uses the
            next number.
        system: the system message; empty for none.
        interactive: whether a person is at the terminal and can react to a failure. If not, a
            worker or a server that fails ends the chat.
    """

    def __init__(
        self,
        answerer: Answerer,
        params: SamplingParams,
        *,
        system: str = "",
        interactive: bool,
    ) -> None:
        self._answerer = answerer
        self._params = params
        self._system = system
        self._interactive = interactive
        self._exchanges: list[tuple[str, str]] = []  # messages and their answers
        self._asked = 0
        self._interrupted = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: say(HELP),
            "/reset": self._reset,
            "/system": self._set_system,
            "/undo": self._undo,
            "/retry": self._retry,
            "/save": self._save,
            "/stats": lambda _: self._answerer.print_statistics(),
        }

    def run(self) -> None:
        """Run until /exit or the end of standard input.

        Raises:
            WorkerError, ServerError: the worker or the server failed, and the chat is not
                interactive.
        """
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # one bad line must not end the chat
        before = signal.signal(signal.SIGINT, self._interrupt)
        try:
            for line in self._lines():
                command, _, rest = line.strip().partition(" ")
                if command == "/exit":
                    return
                if command.startswith("//"):  # a message that begins with a slash
                    self._ask(line.strip().removeprefix("/"))
                elif command.startswith("/"):
                    self._commands.get(command, _say_unknown)(rest.strip())
                elif command:
                    self._ask(line.strip())
        finally:
            signal.signal(signal.SIGINT, before)

    def _lines(self) -> Iterator[str]:
        """Lines of valid Unicode. Ctrl-C drops the line being typed; twice, it ends the chat."""
        dropped = False
        while True:
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                if self._interrupted:  # after the last line was handled
                    self._interrupted = False
                    raise KeyboardInterrupt
                line = self._read()
                signal.signal(signal.SIGINT, self._interrupt)
                line.encode()
            except EOFError:
                if self._interactive:
                    say("")  # the shell's prompt starts on a new line
                return
            except UnicodeEncodeError:
                say("This line is not valid UTF-8, and was ignored.")
                continue
            except KeyboardInterrupt:
                if dropped:
                    return
                dropped = True
                say("\nCtrl-C once more, or Ctrl-D, ends the chat.")
                continue
            dropped = False
            yield line

    def _read(self) -> str:
        prompt = "> " if self._interactive else ""
        if sys.modules.get("readline") is None:
            # Then `input` writes it to descriptor 2 itself: see `hide_native_messages`.
            print(prompt, end="", file=sys.stderr, flush=True)
            prompt = ""
        return input(prompt)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """The first Ctrl-C stops the answer; a second one interrupts the program."""
        if self._interrupted:
            signal.default_int_handler(number, frame)
        self._interrupted = True

    def _ask(self, message: str) -> bool:
        """Answer a message. Returns whether an answer was added to the conversation."""
        try:
            answer = self._answer(message)
        except PromptTooLong as exc:
            say(
                f"With this message the conversation has {exc.tokens} tokens, but the model's "
                f"context is {exc.limit}, including the answer: /reset starts over, /undo makes "
                "some room."
            )
            return False
        except TSQPError as exc:
            if isinstance(exc, WorkerError | ServerError) and not self._interactive:
                raise
            say(f"\nerror: {exc}")
            return False
        finally:
            self._interrupted = False
        if answer.finish_reason == "abort" and not answer.text:
            note("[stopped before the answer; the message is not kept]")
            return False
        print(flush=True)
        self._exchanges.append((message, answer.text))
        if answer.finish_reason == "abort":
            note("[stopped; the answer so far is kept]")
        elif answer.finish_reason == "length":
            note("[cut off by --max-tokens or the model's context length]")
        elif answer.finish_reason == "content_filter":
            note("[cut off by the server's content filter]")
        return True

    def _answer(self, message: str) -> Answer:
        messages = [*self._messages(), {"role": "user", "content": message}]
        params = self._params
        if params.seed is not None:
            params = replace(params, seed=params.seed + self._asked)
        self._asked += 1
        return self._answerer.answer(messages, params, lambda: self._interrupted)

    def _messages(self) -> list[dict[str, str]]:
        messages = [{"role": "system", "content": self._system}] if self._system else []
        for message, answer in self._exchanges:
            messages.append({"role": "user", "content": message})
            messages.append({"role": "assistant", "content": answer})
        return messages

    def _reset(self, _: str) -> None:
        self._exchanges.clear()
        self._answerer.forget()
        note("Started a new conversation.")

    def _set_system(self, text: str) -> None:
        self._system = text
        note("The system message is set." if text else "There is no system message now.")

    def _undo(self, _: str) -> None:
        if not self._exchanges:
            say("There is nothing to undo.")
            return
        self._exchanges.pop()
        note(f"Removed the last message and its answer; {len(self._exchanges)} remain.")

    def _retry(self, _: str) -> None:
        if not self._exchanges:
            say("There is nothing to retry.")
            return
        if self._params.temperature == 0:
            note("At --temperature 0 the answer will be the same.")
        last = self._exchanges.pop()
        if not self._ask(last[0]):
            self._exchanges.append(last)

    def _save(self, name: str) -> None:
        if not name:
            say("/save needs the name of a new file.")
            return
        content = json.dumps({"messages": self._messages()}, ensure_ascii=False) + "\n"
        try:
            path = Path(name).expanduser()
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(content)
        except FileExistsError:
            say("That file exists and is not overwritten; name a new file.")
        except (OSError, ValueError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else "this is not a valid file name"
            say(f"Cannot write that file: {reason}.")
        else:
            note("Saved the conversation. Anyone who controls this disk can read it.")


def _say_unknown(_: str) -> None:
    say("There is no such command; /help lists the commands.")
