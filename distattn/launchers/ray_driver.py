"""The program of a Ray job: one Ray Train run an attempt, as many attempts as ``supervise`` allows.

    python -m distattn.launchers.ray_driver ORDERS
      wait for nodes ──▶ TorchTrainer: a worker a node ──▶ ranks ──fail──▶ journal ──▶ again, maybe on fewer nodes │ stop

Ray's own FailureConfig can only count, so it is told to leave failures to us: pauses, and an early stop where the same step
fails the same way twice, are ``supervise``'s. Every attempt goes on from the newest checkpoint in the run's folder.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import ray
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from distattn.launchers.jobs import finished_step
from distattn.launchers.ray_spec import Orders, cancel_mark, choose_count
from distattn.launchers.ray_worker import NodeRendezvous, run_node
from distattn.launchers.supervise import LOST, Failure, Journal, step_being_computed, supervise

_NODES_S = 60.0
"""So long does an attempt wait for all its nodes before it takes fewer, if the run can."""

_POLL_S = 1.0


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

    ray.init(log_to_driver=True)

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
        count = choose_count(told.counts, total, told.bundle)
        if count == told.counts[0] or (count and time.monotonic() > deadline):
            return count
        if not said:
            say(f"waiting for {told.counts[0]} nodes with {told.bundle}; there is room for {count}")
            said = True
        time.sleep(_POLL_S)
    return 0


def _fit(told: Orders, count: int, journal: Journal, say: Callable[[str], None]) -> int | None:
    """One attempt; its exit status, None if a user stopped it."""
    attempts = len(journal.attempts())
    trainer = TorchTrainer(
        run_node,
        train_loop_config={"orders": told.dumps()},
        # SPREAD, not STRICT_SPREAD: where a node is lost, another with room for two bundles may take its ranks.
        scaling_config=ScalingConfig(
            num_workers=count,
            use_gpu="GPU" in told.bundle,
            resources_per_worker=told.bundle,
            placement_strategy="SPREAD",
        ),
        run_config=RunConfig(
            name=f"{told.job}-{attempts}",
            storage_path=str(Path(told.run_dir) / "logs" / "ray"),
            failure_config=FailureConfig(max_failures=0),
        ),
        torch_config=NodeRendezvous(port=told.port),
    )
    try:
        trainer.fit()
    except Exception as error:  # Ray wraps whatever ends an attempt in classes that differ between its versions
        if cancel_mark(told.run_dir, told.job).exists():
            return None
        message = _what_happened(error)
        # Ranks whose peers died with their node can only say that a connection broke.
        lost = any(isinstance(cause, RayActorError) for cause in getattr(error, "worker_failures", {}).values())
        if lost or journal.attempts()[-1].failure is None:
            journal.failed(Failure(step_being_computed(told.run_dir), LOST, message))
        say(f"the attempt failed: {message}")
        return 1
    return 0


def _what_happened(error: Exception) -> str:
    """The line of Ray's text that is nearest to the cause."""
    # Indented lines are details of a traceback or of an actor; the last that is not says what it was.
    lines = [line for line in str(error).splitlines() if line.strip() and not line[0].isspace()]
    return lines[-1].strip() if lines else type(error).__name__


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
