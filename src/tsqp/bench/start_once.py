"""The program that `startup` runs: starts one mode, runs it once and prints the cost as JSON."""

import json
import sys
from time import perf_counter

import psutil

from tsqp.bench.modes import MODES, LlmRunner, Setting
from tsqp.bench.startup import peak_bytes


def main() -> None:
    """Run with two arguments: the mode, and the setting as JSON."""
    mode, setting = sys.argv[1], Setting(**json.loads(sys.argv[2]))
    began = perf_counter()
    runner = MODES[mode](setting)
    load_s = perf_counter() - began
    print("ready", flush=True)
    began = perf_counter()
    if isinstance(runner, LlmRunner):
        runner.llm.fill_pads()
    stock_s = perf_counter() - began
    runner.run([1] * setting.prompt_tokens, setting.new_tokens)
    workers = psutil.Process().children(recursive=True)
    figures = {
        "load_s": load_s,
        "stock_s": stock_s,
        "tee_bytes": peak_bytes(),
        "workers_bytes": [peak_bytes(worker.pid) for worker in workers],
    }
    runner.close()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
