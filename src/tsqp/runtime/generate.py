"""Complete prompts on an engine and wait for the answers, which is what `LLM` does."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from tsqp.tee.conversation import Conversation
from tsqp.tee.engine.engine import Engine
from tsqp.tee.sampling import Completion, SamplingParams


def generate(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    on_text: Callable[[int, str], None] | None = None,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    conversation: Conversation | None = None,
) -> list[Completion]:
    """Complete several prompts and return their answers in order. No other request may be queued.

    Args:
        prompts: token ids.
        on_text: called with the position of an answer in the result and each new piece of its text.
        on_progress: called after each step that includes prompt tokens, with the number computed so
            far and their total.
        should_stop: called before each step. Once it returns true, every answer ends as it is.
        conversation: see `Engine.add`; for one answer.

    Raises:
        PromptError: see `Engine.add`; then no prompt is run.
        TSQPError: the error of the first request that failed; then none of them goes on.
    """
    assert conversation is None or len(prompts) == params.n == 1
    engine.abort_all()  # an interrupt may have left sequences of the last call
    stats = engine.stats
    completions: dict[int, Completion] = {}
    places: dict[int, int] = {}
    read_before = stats.prefill_tokens
    to_read = params.n * sum(map(len, prompts)) + stats.reused_tokens
    done = 0
    try:
        for prompt in prompts:
            first: int | None = None
            for index in range(params.n):
                answer = params.of_answer(index)
                number = engine.add(prompt, answer, conversation=conversation, sibling=first)
                places[number] = len(places)
                first = number if first is None else first
        while engine.has_unfinished:
            is_over = should_stop is not None and should_stop()
            outputs = engine.stop() if is_over else engine.step()
            if on_progress is not None and stats.prefill_tokens > read_before + done:
                done = stats.prefill_tokens - read_before
                on_progress(done, to_read - stats.reused_tokens)
            for output in outputs:
                if output.error is not None:
                    raise output.error
                place = places[output.sequence]
                if on_text is not None and output.text:
                    on_text(place, output.text)
                if output.completion is not None:
                    index = place % params.n
                    completions[place] = replace(output.completion, index=index)
    finally:
        engine.abort_all()  # does nothing unless something was raised
    return [completions[place] for place in range(len(places))]
