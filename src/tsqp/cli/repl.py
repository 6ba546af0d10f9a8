"""The loop of `tsqp chat`: lines in, answers out.

Answers go to standard output, and everything that is said about them to standard error.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from types import FrameType

from tsqp.cli.printing import note, print_statistics, prompt_progress, say
from tsqp.errors import PromptTooLong, TSQPError, WorkerError
from tsqp.runtime.llm import LLM
from tsqp.tee.sampling import Completion, SamplingParams

HELP = """\
/reset         forget the conversation, but for the system message
/system TEXT   set the message before the conversation; without TEXT, have none
/undo          take back the last message and its answer
/retry         answer the last message once more
/save FILE     write the conversation to a new file, in JSON
/stats         where the time went
/exit          end, as Ctrl-D does
//TEXT         send a message that begins with a slash
Ctrl-C ends an answer that is being written, and keeps it so far."""


class Repl:
    """One conversation.

    Args:
        params: `seed` is the first answer's; each answer after it has the next one.
        system: the message before the conversation; empty for none.
        split_special: keep what is typed from becoming control tokens.
        interactive: whether a person sees a prompt and can act upon a failure; without one, a
            worker that fails ends the chat.
    """

    def __init__(
        self,
        llm: LLM,
        params: SamplingParams,
        *,
        system: str = "",
        split_special: bool = False,
        interactive: bool,
    ) -> None:
        self._llm = llm
        self._params = params
        self._system = system
        self._split_special = split_special
        self._interactive = interactive
        self._exchanges: list[tuple[str, str]] = []  # messages and their answers
        self._conversation = llm.conversation()
        self._asked = 0
        self._interrupted = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: say(HELP),
            "/reset": self._reset,
            "/system": self._set_system,
            "/undo": self._undo,
            "/retry": self._retry,
            "/save": self._save,
            "/stats": lambda _: print_statistics(self._llm),
        }

    def run(self) -> None:
        """Until /exit, or the end of standard input.

        Raises:
            WorkerError: a worker failed, and nobody is there to be told.
        """
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # one bad line is not the end
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
        """Lines of valid Unicode. Ctrl-C drops one that has been begun; twice, it is the end."""
        dropped = False
        while True:
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                if self._interrupted:  # since the last line was done with
                    self._interrupted = False
                    raise KeyboardInterrupt
                line = input("> " if self._interactive else "")
                signal.signal(signal.SIGINT, self._interrupt)
                line.encode()
            except EOFError:
                if self._interactive:
                    say("")  # the shell goes on in a line of its own
                return
            except UnicodeEncodeError:
                say("This line is not valid UTF-8, and nothing was done with it.")
                continue
            except KeyboardInterrupt:
                if dropped:
                    return
                dropped = True
                say("\nCtrl-C once more, or Ctrl-D, ends the chat.")
                continue
            dropped = False
            yield line

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """The first Ctrl-C is for the answer, the next for a program that does not react."""
        if self._interrupted:
            signal.default_int_handler(number, frame)
        self._interrupted = True

    def _ask(self, message: str) -> bool:
        """Answer a message; whether there is an answer, which is then part of the conversation."""
        try:
            answer = self._answer(message)
        except PromptTooLong as exc:
            say(
                f"The conversation would have {exc.tokens} tokens, and the model's context is "
                f"{exc.limit}, the answer included: /reset begins anew, /undo makes some room."
            )
            return False
        except TSQPError as exc:
            if isinstance(exc, WorkerError) and not self._interactive:
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
            note("[cut off: --max-tokens or the model's context allows no more]")
        return True

    def _answer(self, message: str) -> Completion:
        messages = [*self._messages(), {"role": "user", "content": message}]
        params = self._params
        if params.seed is not None:
            params = replace(params, seed=params.seed + self._asked)
        self._asked += 1
        with prompt_progress() as on_progress:
            return self._llm.chat(
                messages,
                params,
                on_text=lambda _, text: print(text, end="", flush=True),
                on_progress=on_progress,
                should_stop=lambda: self._interrupted,
                conversation=self._conversation,
                split_special=self._split_special,
            )

    def _messages(self) -> list[dict[str, str]]:
        messages = [{"role": "system", "content": self._system}] if self._system else []
        for message, answer in self._exchanges:
            messages.append({"role": "user", "content": message})
            messages.append({"role": "assistant", "content": answer})
        return messages

    def _reset(self, _: str) -> None:
        self._exchanges.clear()
        self._conversation.close()
        self._conversation = self._llm.conversation()
        note("The conversation begins anew.")

    def _set_system(self, text: str) -> None:
        self._system = text
        note("The system message is set." if text else "There is no system message now.")

    def _undo(self, _: str) -> None:
        if not self._exchanges:
            say("There is nothing to take back.")
            return
        self._exchanges.pop()
        note(f"The last message and its answer are taken back; {len(self._exchanges)} remain.")

    def _retry(self, _: str) -> None:
        if not self._exchanges:
            say("There is nothing to retry.")
            return
        if self._params.temperature == 0:
            note("At --temperature 0 the answer is the same again.")
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
            say("That file exists, and is not overwritten: name a new file.")
        except (OSError, ValueError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else "no file can have this name"
            say(f"Cannot write that file: {reason}.")
        else:
            note("The conversation is saved, for whoever can read this disk.")


def _say_unknown(_: str) -> None:
    say("There is no such command; /help lists them.")
