"""The program of a Ray job: one Ray Train run an attempt, as many attempts as ``supervise`` allows.

    python -m distattn.launchers.ray_driver ORDERS
      wait for nodes ──▶ TorchTrainer: a worker a node ──▶ ranks ──fail──▶ journal ──▶ again, maybe on fewer nodes │ stop
                    └──▶ ServerNode: an actor a node of attention servers, where these have bundles of another kind

Ray's own FailureConfig can only count, so it is told to leave failures to us: pauses, and an early stop where the same step
fails the same way twice, are ``supervise``'s. Every attempt goes on from the newest checkpoint in the run's folder.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from distattn.launchers.jobs import finished_step
from distattn.launchers.ray_spec import Orders, cancel_mark, choose_count
from distattn.launchers.ray_worker import NodeRendezvous, ServerNode, run_node
from distattn.launchers.supervise import LOST, Failure, Journal, step_being_computed, supervise

_NODES_S = 60.0
"""So long does an attempt wait for all its nodes before it takes fewer, if the run can."""

_POLL_S = 1.0
_ANSWER_S, _END_S = 2.0, 60.0


def main(arguments: Sequence[str]) -> int:
    """Run the job that ORDERS describe; its exit status."""
    told = Orders.loads(arguments[0])
    journal = Journal(told.run_dir)
    log = Path(told.run_dir) / "logs" / f"{told.job}.log"
    log.parent.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        print(f"distattn: {text}", flush=True)
        with contextlib.suppress(OSError), open(log, "a", encoding="utf-8") as stream:
            stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    # Actors of Ray Train look for their cluster anew, and find another one of this machine unless they are told.
    ray.init(log_to_driver=True, runtime_env={"env_vars": {"RAY_ADDRESS": os.environ["RAY_ADDRESS"]}})

    def attempt(restart: int) -> int | None:
        count = wait_for_nodes(told, say)
        if not count:
            return None
        say(f"attempt {restart}: {count} nodes, {count * told.ranks_per_node} ranks")
        journal.started(count * told.ranks_per_node, restart)
        return _fit(told, count, journal, say)

    def not_ready() -> str | None:
        here = Path(told.run_dir, "config.yaml").exists()
        return None if here else f"run.dir={told.run_dir} is not there, or out of reach"

    status = supervise(attempt, journal, max_restarts=told.max_restarts, backoff_s=5.0, not_ready=not_ready, say=say)
    done = finished_step(told.run_dir)
    if status == 0:
        say("stopped: it goes on from the newest checkpoint" if done is None else f"finished: all {done} steps are done")
    return status


def wait_for_nodes(told: Orders, say: Callable[[str], None], timeout_s: float = _NODES_S) -> int:
    """How many nodes the attempt gets: all of them, or after ``timeout_s`` as many as there are and the run can use. 0 if a
    user cancels it meanwhile."""
    deadline, said = time.monotonic() + timeout_s, False
    while not cancel_mark(told.run_dir, told.job).exists():
        total = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        count = choose_count(told, total)
        if count == told.counts[0] or (count and time.monotonic() > deadline):
            return count
        if not said:
            kinds = f"{told.bundle}" + (f" or, for attention servers, {told.server_bundle}" if told.server_bundle else "")
            say(f"waiting for {told.counts[0]} nodes with {kinds}; there is room for {count}")
            said = True
        time.sleep(_POLL_S)
    return 0


def _fit(told: Orders, count: int, journal: Journal, say: Callable[[str], None]) -> int | None:
    """One attempt; its exit status, None if a user stopped it."""
    attempts = len(journal.attempts())
    with start_servers(told, count) as servers:
        trainer = TorchTrainer(
            run_node,
            train_loop_config={"orders": told.dumps(), "count": count},
            # SPREAD, not STRICT_SPREAD: where a node is lost, another with room for two bundles may take its ranks.
            scaling_config=ScalingConfig(
                num_workers=count - len(servers),
                use_gpu="GPU" in told.bundle,
                resources_per_worker=told.bundle,
                placement_strategy="SPREAD",
            ),
            run_config=RunConfig(
                name=f"{told.job}-{attempts}",
                storage_path=str(Path(told.run_dir) / "logs" / "ray"),
                failure_config=FailureConfig(max_failures=0),
            ),
            torch_config=NodeRendezvous(port=told.port, servers=servers),
        )
        try:
            trainer.fit()
            # The servers' ranks end when training does; the last of them may still be on its way.
            with contextlib.suppress(RayError):
                ray.get([server.is_there.remote() for server in servers], timeout=_END_S)
            return 0
        except Exception as error:  # Ray wraps whatever ends an attempt in classes that differ between its versions
            if cancel_mark(told.run_dir, told.job).exists():
                return None
            message = _what_happened(error)
            lost = list(filter(None, map(_loss_of, servers)))
            if lost:
                message = f"a node of attention servers is gone: {_what_happened(lost[0])}"
            # Ranks whose peers died with their node can only say that a connection broke.
            causes = [*getattr(error, "worker_failures", {}).values(), *lost]
            if any(isinstance(cause, RayActorError) for cause in causes) or journal.attempts()[-1].failure is None:
                journal.failed(Failure(step_being_computed(told.run_dir), LOST, message))
            say(f"the attempt failed: {message}")
            return 1


@contextlib.contextmanager
def start_servers(told: Orders, count: int) -> Iterator[tuple[Any, ...]]:
    """Actors on bundles of their own for the attention servers of an attempt; they and their ranks end with the block."""
    nodes = [node for node in range(count) if told.is_server(node)]
    if not nodes:
        yield ()
        return
    group = placement_group([told.server_bundle] * len(nodes), strategy="SPREAD")
    try:
        ray.get(group.ready())
        resources = dict(told.server_bundle)
        cpus, gpus = resources.pop("CPU", 0.0), resources.pop("GPU", 0.0)
        actor: Any = ray.remote(ServerNode)
        servers = tuple(
            actor.options(
                num_cpus=cpus,
                num_gpus=gpus,
                resources=resources,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
            ).remote(told.dumps(), node, count)
            for index, node in enumerate(nodes)
        )
        yield servers
    finally:
        remove_placement_group(group)  # and with it its actors, whose ranks die with them


def _loss_of(server: Any) -> RayActorError | None:
    """What became of a server's actor if it is gone; one that is busy is not."""
    try:
        ray.get(server.is_there.remote(), timeout=_ANSWER_S)
    except RayActorError as error:
        return error
    except RayError:
        return None
    return None


def _what_happened(error: Exception) -> str:
    """The line of Ray's text that is nearest to the cause."""
    # Indented lines are details of a traceback or of an actor; the last that is not says what it was.
    lines = [line for line in str(error).splitlines() if line.strip() and not line[0].isspace()]
    return lines[-1].strip() if lines else type(error).__name__


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
