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
    """Complete several prompts and return their answers in order; nothing else may be queued.

    Args:
        prompts: token ids.
        on_text: called with the place of an answer among all and each new piece of it.
        on_progress: called after each step with prompt tokens: how many have been computed, and
            how many are to be.
        should_stop: asked before each step; once true, every answer ends with what it has.
        conversation: see `Engine.add`; for one answer.

    Raises:
        PromptError: see `Engine.add`; then no prompt is run.
        TSQPError: the error of the first request that failed; then none of them goes on.
    """
    assert conversation is None or len(prompts) == params.n == 1
    engine.abort_all()  # what an interrupt may have left of the last call
    stats = engine.stats
    completions: dict[int, Completion] = {}
    places: dict[int, int] = {}
    read_before = stats.prefill_tokens
    to_read = params.n * sum(map(len, prompts)) + stats.reused_tokens
    done = 0
    try:
        for prompt in prompts:
            for index in range(params.n):
                number = engine.add(prompt, params.of_answer(index), conversation=conversation)
                places[number] = len(places)
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
