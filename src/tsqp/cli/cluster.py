"""`tsqp cluster up`, `status` and `down`: workers on a Ray cluster."""

import json
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from tsqp.cli.app import app
from tsqp.cli.flags import Debug, JsonOutput, Model, Quiet
from tsqp.cli.with_options import with_options
from tsqp.errors import UsageError

Name = Annotated[str, typer.Option(help="Name of the cluster, if there are several on one Ray.")]
Address = Annotated[
    str,
    typer.Option(
        metavar="HOST:PORT",
        help="Address of Ray's head node. auto takes RAY_ADDRESS, or the Ray of this machine.",
    ),
]


@app.command("cluster-up")
@with_options("device", "dtype", "threads", "insecure")
def cluster_up(
    *,
    model: Model,
    shards: Annotated[int, typer.Option(min=1, help="Number of parts of the model.")] = 1,
    replicas: Annotated[int, typer.Option(min=1, help="Number of workers for each part.")] = 1,
    workers_file: Annotated[
        Path | None,
        typer.Option(
            help="Keep the workers' endpoints and keys in this file, until interrupted. Without "
            "it, print them."
        ),
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of key pairs: DIR/shardN-replicaM, made by `tsqp keygen`. Each node needs "
            "the secret keys of its workers at the same path.",
        ),
    ] = None,
    resource: Annotated[
        str | None,
        typer.Option(
            help="Ray resource that each worker takes one unit of. By default GPU, or CPU if there "
            "is no GPU."
        ),
    ] = None,
    serve: Annotated[
        str,
        typer.Option(
            help="Modes to load weights for: private (pad and shares), open, or all of them."
        ),
    ] = "private",
    device: str,
    dtype: str,
    threads: int | None,
    insecure: bool,
    name: Name = "default",
    address: Address = "auto",
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Start workers on a Ray cluster. They go on until `tsqp cluster down`."""
    from tsqp.cli.console import for_terminal, note
    from tsqp.cluster.connection import connected
    from tsqp.cluster.operate import bring_up, watch
    from tsqp.cluster.plan import Plan, check_name
    from tsqp.cluster.ray_cluster import default_resource, namespace_of
    from tsqp.cluster.workers_file import records

    check_name(name)
    if keys is None and not insecure:
        raise UsageError(
            "Other machines can reach the workers; give each a key with --keys, or pass --insecure."
        )
    options = ["--device", device, "--dtype", dtype, "--serve", serve]
    options += [] if threads is None else ["--threads", str(threads)]
    folder = None if keys is None else keys.absolute()
    stop = threading.Event()

    def say(text: str) -> None:
        note(for_terminal(text))

    with connected(address, namespace_of(name)):
        _stop_on_signals(stop)
        unit = resource or default_resource(device)
        plan = Plan(model, shards, replicas, tuple(options), folder, unit)
        public_keys = plan.public_keys()
        cluster, endpoints = bring_up(plan, stop, say)
        if workers_file is None:
            print(records(endpoints, public_keys), end="")
        else:
            note(f"keeping {workers_file} right; the workers go on when this command ends")
            watch(cluster, endpoints, public_keys, workers_file, stop, say)


@app.command("cluster-status")
def cluster_status(
    name: Name = "default",
    address: Address = "auto",
    json_output: JsonOutput = False,
    debug: Debug = False,
) -> None:
    """Show the workers of a Ray cluster. The exit status is 1 unless all of them serve."""
    from tsqp.cli.console import for_terminal
    from tsqp.cluster.connection import connected
    from tsqp.cluster.plan import check_name
    from tsqp.cluster.ray_cluster import find, namespace_of

    check_name(name)
    with connected(address, namespace_of(name)):
        reports = find().reports()
    workers = {
        worker: {
            "endpoint": report and report.state.endpoint,
            "node": report and report.node,
            "restarts": report and report.state.restarts,
            "error": report.state.error if report else "Ray is starting its actor again",
        }
        for worker, report in reports.items()
    }
    if json_output:
        print(json.dumps({"workers": workers}))
    elif not workers:
        print("no workers")
    else:
        for worker, each in workers.items():
            line = f"{worker}  {each['endpoint'] or 'not serving'}  restarts: {each['restarts']}"
            print(for_terminal(f"{line}  {each['error']}".rstrip()))
    if not workers or not all(each["endpoint"] for each in workers.values()):
        raise typer.Exit(1)


@app.command("cluster-down")
def cluster_down(
    name: Name = "default", address: Address = "auto", quiet: Quiet = False, debug: Debug = False
) -> None:
    """Stop the workers of a Ray cluster. Ray itself goes on."""
    from tsqp.cli.console import note
    from tsqp.cluster.connection import connected
    from tsqp.cluster.plan import check_name
    from tsqp.cluster.ray_cluster import find, namespace_of

    check_name(name)
    with connected(address, namespace_of(name)):
        cluster = find()
        cluster.stop()
    note(f"stopped {len(cluster)} workers")


def _stop_on_signals(stop: threading.Event) -> None:
    """After Ray has set its own handlers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
