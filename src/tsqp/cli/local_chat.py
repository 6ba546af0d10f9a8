"""The answers of `tsqp chat MODEL`: of a model in this process."""

from collections.abc import Callable, Sequence

from tsqp.cli.console import for_terminal
from tsqp.cli.printing import print_statistics, prompt_progress
from tsqp.runtime.llm import LLM
from tsqp.tee.sampling import Completion, SamplingParams


class LocalModel:
    """A loaded model; see `tsqp.cli.repl.Answerer`.

    Args:
        split_special: treat control tokens in the user's input as plain text.
    """

    def __init__(self, llm: LLM, *, split_special: bool) -> None:
        self._llm = llm
        self._split_special = split_special
        self._conversation = llm.conversation()

    def answer(
        self,
        messages: Sequence[dict[str, str]],
        params: SamplingParams,
        should_stop: Callable[[], bool],
    ) -> Completion:
        """Print an answer as it comes. Raises what `LLM.chat` raises."""
        with prompt_progress() as on_progress:
            return self._llm.chat(
                messages,
                params,
                on_text=lambda _, text: print(for_terminal(text), end="", flush=True),
                on_progress=on_progress,
                should_stop=should_stop,
                conversation=self._conversation,
                split_special=self._split_special,
            )

    def forget(self) -> None:
        """Drop the keys and values of the conversation."""
        self._conversation.close()
        self._conversation = self._llm.conversation()

    def print_statistics(self) -> None:
        """Print times and traffic."""
        print_statistics(self._llm)
