"""Workers as actors of a Ray cluster. Ray places them, and starts an actor again that is lost.

A cluster of workers has a Ray namespace of its own. Actors and the placement group are detached:
they do not end with the process that made them. All functions need a connection (`connection.py`).
"""

from collections.abc import Mapping
from typing import Any

from tsqp.cluster.actor import Report, WorkerActor
from tsqp.cluster.connection import NO_TOKENS
from tsqp.cluster.plan import Plan
from tsqp.errors import ClusterError, UsageError

GROUP = "workers"
PLACE_S = 60.0
ANSWER_S = 10.0
STOP_S = 30.0


def namespace_of(name: str) -> str:
    """The Ray namespace of a cluster of workers."""
    return f"tsqp-{name}"


def default_resource(device: str) -> str:
    """What each worker takes one unit of: "GPU", or "CPU" where there is no GPU to use."""
    import ray

    if device == "cpu" or (device == "auto" and not ray.cluster_resources().get("GPU")):
        return "CPU"
    return "GPU"


class RayCluster:
    """The workers of one cluster, as this process reaches them."""

    def __init__(self, actors: Mapping[str, Any]) -> None:
        self._actors = dict(actors)

    def __len__(self) -> int:
        return len(self._actors)

    def reports(self) -> dict[str, Report | None]:
        """What each actor says; None if it does not answer, because Ray is starting it again.

        Raises:
            ClusterError: an actor has ended for good.
        """
        import ray
        from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayTaskError

        asked = {name: actor.report.remote() for name, actor in self._actors.items()}
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER_S)
        found: dict[str, Report | None] = {}
        for name, answer in asked.items():
            try:
                found[name] = ray.get(answer, timeout=0)
            except ActorDiedError as exc:
                raise ClusterError(
                    f"Ray has no {name} any more: Ray or `tsqp cluster down` ended it, or its node "
                    "does not have the same version of tsqp[ray]; run `tsqp cluster up` again."
                ) from exc
            except (GetTimeoutError, RayActorError, RayTaskError):
                found[name] = None
        return found

    def check(self, plan: Plan, reports: Mapping[str, Report | None]) -> None:
        """Check that the actors run what is planned, in a Ray that demands tokens.

        Raises:
            UsageError, ClusterError: they do not.
        """
        for name, arguments in plan.workers().items():
            report = reports[name]
            if report is not None and report.arguments != arguments:
                raise UsageError(
                    "This cluster runs already, with another model or other options; run `tsqp "
                    "cluster down` first, or choose another --name."
                )
            if report is not None and not report.checks_tokens:
                raise ClusterError(NO_TOKENS)

    def stop(self) -> None:
        """End all workers, actors, and the placement group."""
        import ray
        from ray.util import get_placement_group, remove_placement_group

        stopping = [actor.stop.remote() for actor in self._actors.values()]
        if stopping:
            ray.wait(stopping, num_returns=len(stopping), timeout=STOP_S)
        for actor in self._actors.values():
            ray.kill(actor, no_restart=True)
        try:
            remove_placement_group(get_placement_group(GROUP))
        except ValueError:
            return  # it was never made, or is removed


def find() -> RayCluster:
    """The cluster that runs in this connection's namespace; it may have no workers."""
    import ray
    from ray.util import list_named_actors

    return RayCluster({name: ray.get_actor(name) for name in sorted(list_named_actors())})


def start(plan: Plan) -> RayCluster:
    """Start the workers of a plan, or find them if they run already.

    Raises:
        UsageError: other workers run in this namespace.
        ClusterError: Ray has no room for them; nothing is left behind.
    """
    import ray
    from ray.util import list_named_actors
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    workers = plan.workers()
    if not set(list_named_actors()) <= workers.keys():
        raise UsageError(
            "This cluster runs already, with more workers; run `tsqp cluster down` first, or "
            "choose another --name."
        )
    group = _placement_group(len(workers), plan.resource)
    actor_class = ray.remote(WorkerActor)
    actors = {}
    for number, (name, arguments) in enumerate(workers.items()):
        actor = actor_class.options(
            name=name,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,  # after a failure of its process or of its machine
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, number),
            **_one(plan.resource),
        )
        actors[name] = actor.remote(arguments)
    return RayCluster(actors)


def _one(resource: str) -> dict[str, Any]:
    """One unit of a resource, as an actor's options."""
    match resource:
        case "GPU":
            return {"num_cpus": 0, "num_gpus": 1}
        case "CPU":
            return {"num_cpus": 1}
    return {"num_cpus": 0, "resources": {resource: 1}}


def _placement_group(workers: int, resource: str) -> Any:
    """One bundle for each worker, on different nodes where possible."""
    import ray
    from ray.util import get_placement_group, placement_group, remove_placement_group

    try:
        group = get_placement_group(GROUP)
    except ValueError:
        group = placement_group([{resource: 1}] * workers, "SPREAD", GROUP, lifetime="detached")
    if len(group.bundle_specs) != workers or resource not in group.bundle_specs[0]:
        raise UsageError(
            "This cluster runs already, with another number of workers or another resource; run "
            "`tsqp cluster down` first, or choose another --name."
        )
    if not group.wait(PLACE_S):
        remove_placement_group(group)
        total = ray.cluster_resources().get(resource, 0)
        raise ClusterError(
            f"The workers need {workers} {resource}, and Ray has {total:g} in all, of which others "
            "may use some; add nodes, or start fewer workers."
        )
    return group
