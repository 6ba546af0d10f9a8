"""The program of a replay worker, which `replay_session` starts."""

import argparse
import threading

import torch

from tsqp.bench.replay_backend import ReplayBackend, replay_worker
from tsqp.bench.simulated_gpu import find_gpu
from tsqp.bench.zero_model import ZeroCheckpoint
from tsqp.checkpoint.weights import parse_dtype
from tsqp.gpu.ready import READY
from tsqp.gpu.serve import stop_at_end_of_input
from tsqp.model.shard import WHOLE, parse_shard
from tsqp.wire.endpoint import parse_endpoint
from tsqp.wire.server import Server


def main() -> None:
    """Serve a model of zeros until the end of standard input."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--gpu")
    parser.add_argument("--shard", type=parse_shard, default=WHOLE)
    parser.add_argument("--listen", required=True)
    parser.add_argument("--supervised", action="store_true", required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)  # it only writes zeros
    stop = threading.Event()
    threading.Thread(target=stop_at_end_of_input, args=(stop,), daemon=True).start()
    checkpoint = ZeroCheckpoint.parse(given.model, given.layers)
    dtype = parse_dtype(given.dtype, checkpoint.config)
    gpu = None if given.gpu is None else find_gpu(given.gpu)
    server = Server(parse_endpoint(given.listen))
    try:
        worker = replay_worker(checkpoint, dtype, ReplayBackend(gpu), given.shard)
        print(READY, server.address, flush=True)
        server.serve(worker, stop.is_set)
    finally:
        server.close()


if __name__ == "__main__":
    main()
