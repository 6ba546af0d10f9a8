"""Output of `generate`, `chat` and `demo`: the answer while it is generated, then statistics."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from tsqp.checkpoint import demo_model
from tsqp.checkpoint.checkpoint import open_checkpoint
from tsqp.checkpoint.hints_file import write_hints
from tsqp.checkpoint.model_digest import compute_digest
from tsqp.checkpoint.model_key import read_model_key
from tsqp.checkpoint.prepared import PreparedFile, prepare
from tsqp.checkpoint.progress import Rate
from tsqp.checkpoint.weights import parse_dtype
from tsqp.cli.console import note, say
from tsqp.cli.console import stderr as _stderr
from tsqp.errors import UsageError
from tsqp.runtime.llm import LLM
from tsqp.runtime.options import PRIVACY_MODES
from tsqp.runtime.quiet import is_quiet
from tsqp.tee.sampling import Completion
from tsqp.tee.stats import KINDS, OPERATIONS

PLACED = {
    "embedding": "embedding",
    "linear": "linear layers",
    "qk_product": "Q·Kᵀ",
    "softmax": "softmax",
    "pv_product": "P·V",
    "rms_norm": "RMSNorm",
    "rotary": "rotary embedding",
    "activation": "SiLU or GeLU",
    "sampling": "sampling",
}


class Printer:
    """Streams a single answer, prints several when all are done, and prints JSON as a last line."""

    def __init__(self, llm: LLM, *, prompts: int, n: int = 1, json_output: bool) -> None:
        self._llm = llm
        self._n = n
        self._json_output = json_output
        self._stream = prompts * n == 1 and not json_output

    def on_text(self, number: int, text: str) -> None:
        """Print a new piece of an answer, if it streams."""
        if self._stream:
            print(text, end="", flush=True)

    def finish(self, completions: Sequence[Completion]) -> None:
        """Print what has not streamed, and the statistics."""
        if self._json_output:
            if not is_quiet():
                print_statistics(self._llm)
            print(json.dumps(as_json(self._llm, completions)))
            return
        if self._stream:
            print(flush=True)
        else:
            for place, completion in enumerate(completions):
                number = str(place // self._n + 1)
                if self._n > 1:
                    number += f".{completion.index + 1}"
                print(f"[{number}] {completion.text}", flush=True)
        if not is_quiet():
            print_statistics(self._llm)


def as_json(llm: LLM, completions: Sequence[Completion]) -> dict[str, object]:
    """The object that `generate --json` prints."""
    rpc = llm.rpc
    several = any(completion.index > 0 for completion in completions)  # to each prompt
    return {
        "outputs": [_output(completion, several) for completion in completions],
        "privacy": llm.privacy,
        "model_digest": llm.model_digest,
        "transport": llm.transport,
        "transport_reason": llm.transport_reason,
        "timings": llm.stats.timings(),
        "placement": asdict(llm.placement),
        "operations": llm.stats.as_dict()["operations"],
        "pads": None if llm.pads is None else asdict(llm.pads),
        "rpc": {
            "calls": sum(rpc.calls.values()),
            "sent_bytes": rpc.sent_bytes,
            "received_bytes": rpc.received_bytes,
            "socket_bytes": rpc.socket_bytes,
            "calls_by_kind": rpc.calls,
            "worker_s": rpc.compute_s,
        },
    }


def _output(completion: Completion, several: bool) -> dict[str, object]:
    """The fields that every answer has, and those that were requested."""
    output: dict[str, object] = {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "prompt_tokens": completion.prompt_tokens,
        "finish_reason": completion.finish_reason,
    }
    if several:
        output["index"] = completion.index
    for name, logprobs in (
        ("logprobs", completion.logprobs),
        ("prompt_logprobs", completion.prompt_logprobs),
    ):
        if logprobs is not None:
            output[name] = [None if each is None else asdict(each) for each in logprobs]
    return output


def print_statistics(llm: LLM) -> None:
    """Print times and traffic on standard error."""
    stats, rpc = llm.stats, llm.rpc
    rate = stats.decode_tokens / stats.decode_s if stats.decode_s else 0.0
    say(
        f"\nprivacy {llm.privacy}: prefill {stats.prefill_tokens} tokens in "
        f"{stats.prefill_s:.2f} s, decode {stats.decode_tokens} tokens in "
        f"{stats.decode_s:.2f} s ({rate:.1f} a second)"
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("operation", "side", "calls", "seconds"):
        table.add_column(name, justify="left" if name in ("operation", "side") else "right")
    for kind in KINDS:
        timer = stats.time(kind)
        if not timer.calls:
            continue
        done = [name for name in OPERATIONS.get(kind, ()) if name in rpc.calls]
        side = "worker" if done else "TEE"
        table.add_row(kind, side, f"{timer.calls:,}", f"{timer.seconds:.3f}")
        if done:
            computing = sum(rpc.compute_s.get(name, 0.0) for name in done)
            table.add_row("  of it computing", side, "", f"{computing:.3f}")
    table.add_row("waiting for the worker", "", "", f"{stats.wait_s:.3f}")
    _stderr.print(table)
    _stderr.print(_placement_table(llm))
    if (pads := llm.pads) is not None:
        say(
            f"pads: {pads.ahead_rows:,} rows made ahead, {pads.inline_rows:,} while waiting "
            f"in {pads.inline_s:.2f} s"
        )
    if rpc.calls:
        say(
            f"transport {llm.transport}: {sum(rpc.calls.values()):,} calls, "
            f"{rpc.sent_bytes / 1e6:.1f} MB to the worker, {rpc.received_bytes / 1e6:.1f} MB back, "
            f"{rpc.socket_bytes / 1e3:.1f} kB through the socket"
        )


@contextmanager
def prompt_progress(wanted: bool = True) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar for prompts that take several steps. It is removed before any text is printed.

    Yields:
        the `on_progress` argument for `generate`; None if nobody would see the bar.
    """
    if not (wanted and _has_viewer()):
        yield None
        return
    rate = TextColumn("{task.fields[rate]:.0f} tokens a second")
    columns = (TextColumn("Reading the prompt"), BarColumn(), MofNCompleteColumn(), rate)
    bar = Progress(*columns, console=_stderr, transient=True, auto_refresh=False)
    task = bar.add_task("", total=None, rate=0.0)
    began = perf_counter()

    def show(done: int, total: int) -> None:
        if done >= total:
            bar.stop()
            return
        bar.update(task, completed=done, total=total, rate=done / (perf_counter() - began))
        bar.start()
        bar.refresh()

    try:
        yield show
    finally:
        bar.stop()


def _placement_table(llm: LLM) -> Table:
    """The operations of each side."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("side")
    table.add_column("runs")
    sides = asdict(llm.placement)
    for side in dict.fromkeys(sides.values()):
        names = [PLACED[operation] for operation, each in sides.items() if each == side]
        table.add_row(side, ", ".join(names))
    return table


class Loading(Rate):
    """Shows the progress of loading weights: a bar in a terminal, which is removed at the end."""

    def __init__(self, what: str) -> None:
        super().__init__(self._show)
        bytes_done, left = DownloadColumn(binary_units=True), TimeRemainingColumn()
        columns = (TextColumn(what), BarColumn(), bytes_done, TransferSpeedColumn(), left)
        self._bar = Progress(*columns, console=_stderr, transient=True, auto_refresh=False)
        self._task = self._bar.add_task("", total=None)

    def _show(self, done: int, total: int) -> None:
        if not _has_viewer():
            return
        if done >= total:
            self.stop()
            return
        self._bar.update(self._task, completed=done, total=total)
        self._bar.start()
        self._bar.refresh()

    def stop(self) -> None:
        if self._bar.live.is_started:  # otherwise it would print an empty line
            self._bar.stop()

    def say_rate(self, layers: int) -> None:
        """Print one line instead of the bar if there is no terminal."""
        if not _stderr.is_interactive:
            note(self.describe(layers))


@contextmanager
def loading_progress(what: str = "Loading") -> Iterator[Loading]:
    """Show the progress of loading during a `with` block."""
    loading = Loading(what)
    try:
        yield loading
    finally:
        loading.stop()


def _has_viewer() -> bool:
    """Whether a progress bar would be seen and is wanted."""
    return _stderr.is_interactive and not is_quiet()


def fetch_demo_model() -> None:
    """Fetch the demo model with a progress bar, unless it is already there."""
    columns = (TextColumn("Fetching SmolLM2-135M-Instruct"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=_stderr, transient=True, disable=is_quiet()) as bar:
        task = bar.add_task("", total=None, visible=False)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=True)

        demo_model.fetch(progress)


def print_digest(model: str, privacy: str, dtype: str, key_file: Path | None) -> None:
    """Compute and print a model's digest, with a progress bar."""
    if privacy not in PRIVACY_MODES:
        raise UsageError(f"There is no such privacy mode; choose {', '.join(PRIVACY_MODES)}.")
    key = None if key_file is None else read_model_key(key_file)
    with (
        loading_progress("Hashing") as hashing,
        closing(open_checkpoint(model, key=key)) as checkpoint,
    ):
        digest = compute_digest(
            checkpoint,
            checkpoint.file_digests(),
            parse_dtype(dtype, checkpoint.config),
            integers=privacy in ("pad", "shares"),
            progress=hashing,
        )
    print(digest)


def prepare_model(model: str, out: Path, hints: Path | None) -> None:
    """Write a prepared file, and hints, with a progress bar, and say how to use them."""
    if hints is not None and hints.exists():
        raise UsageError(f"{hints} exists; name a new file, or remove it.")
    with loading_progress("Preparing") as preparing:
        digest = prepare(model, out, preparing)
    with closing(PreparedFile(out)) as file:
        preparing.say_rate(file.layers)
    note(f"{out}: {out.stat().st_size:,} bytes, weights {digest[:12]}…")
    note(f"Serve it with: tsqp worker {out} --listen ENDPOINT")
    if hints is not None:
        with loading_progress("Making hints") as making, closing(PreparedFile(out)) as file:
            write_hints(file, hints, making)
        note(f"{hints}: {hints.stat().st_size:,} bytes")
        note(f"Use them with: tsqp generate {model} --field lattice --hints {hints}")
