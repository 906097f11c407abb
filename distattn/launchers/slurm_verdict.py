"""What a batch script does when its ranks have ended: ``python -m distattn.launchers.slurm_verdict``, run on the first node.

the run is finished, or a user cancelled it ──▶ end
exit status 0 before the last step          ──▶ requeue: preemption or TERM asked the ranks to stop
the time limit is near                      ──▶ requeue
a node does not answer                      ──▶ requeue, so that Slurm finds another
anything else                               ──▶ supervise.decide: again here after a pause, or give up

RUN_DIR/logs/slurm-JOB.end.json       how the job ended for good: Slurm itself forgets jobs within minutes
RUN_DIR/logs/slurm-JOB.requeues.json  the checkpoint at the last requeue, since a job that gets no further must stop
RUN_DIR/logs/slurm-JOB.cancel         exists once a user cancelled the job
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distattn.launchers.jobs import finished_step, read_progress, write_atomically
from distattn.launchers.slurm_script import AGAIN, REQUEUE
from distattn.launchers.supervise import Journal, after_attempt


@dataclass(frozen=True)
class Verdict:
    """code: the exit code that tells the script; state: one of request.STATES; wait_s: the pause before a new start here."""

    code: int
    state: str
    reason: str
    wait_s: float = 0.0


def cancel_mark(run_dir: str | Path, job: str) -> Path:
    """The file that says that a user cancelled ``job``, Slurm's number of it."""
    return Path(run_dir) / "logs" / f"slurm-{job}.cancel"


def read_end(run_dir: str | Path, job: str) -> tuple[str, str] | None:
    """(state, reason) of a job that ended for good; None for one that did not, as far as its files say."""
    try:
        end = json.loads(_end_path(run_dir, job).read_text(encoding="utf-8"))
        return str(end["state"]), str(end["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def judge(
    run_dir: Path, job: str, status: int, max_restarts: int, *, nodes_answer: bool = True, ending: bool = False
) -> Verdict:
    """What follows the end of a job's ranks; ``status`` is srun's exit status. Writes what the next verdict must know.

    nodes_answer: whether all nodes of the job still do; ending: whether its time limit is near.
    """
    done = finished_step(run_dir)
    if done is not None:
        return Verdict(0, "finished", f"finished: all {done} steps are done")
    if cancel_mark(run_dir, job).exists():
        return Verdict(0, "cancelled", "cancelled by a user; the same submission goes on from the last checkpoint")
    if ending:
        return _requeue(run_dir, job, max_restarts, "the time limit is near: requeued, to go on from the last checkpoint")
    if status == 0:
        return _requeue(run_dir, job, max_restarts, "stopped with a checkpoint: requeued, to go on from there")
    if not nodes_answer:
        return _requeue(run_dir, job, max_restarts, "a node does not answer: requeued, to go on from the last checkpoint")
    journal = Journal(run_dir)
    attempts, failures = journal.attempts(), len(journal.failures_in_a_row())
    # The ranks may have written of the present failure themselves.
    noted = bool(attempts) and attempts[-1].failure is not None
    decision = after_attempt(run_dir, status=status, restarts=failures - noted, max_restarts=max_restarts)
    if decision.restart:
        return Verdict(AGAIN, "running", decision.reason, decision.wait_s)
    return Verdict(status if status not in (AGAIN, REQUEUE) else 1, "failed", decision.reason)


def _requeue(run_dir: Path, job: str, max_restarts: int, reason: str) -> Verdict:
    path = run_dir / "logs" / f"slurm-{job}.requeues.json"
    checkpoint = read_progress(run_dir).checkpoint
    stuck = 0 if checkpoint is not None else 1
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        stuck = before["stuck"] + 1 if before["checkpoint"] == checkpoint else 0
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if stuck > max_restarts:
        return Verdict(
            1,
            "failed",
            f"not requeued: {stuck} allocations in a row ended before another checkpoint; give the job more --time, or lower "
            "checkpoint.interval",
        )
    write_atomically(path, json.dumps({"checkpoint": checkpoint, "stuck": stuck}) + "\n")
    return Verdict(REQUEUE, "pending", reason)


def _end_path(run_dir: str | Path, job: str) -> Path:
    return Path(run_dir) / "logs" / f"slurm-{job}.end.json"


def main(arguments: Sequence[str]) -> int:
    """RUN_DIR JOB STATUS MAX_RESTARTS NODES_ANSWER ENDING, the last two yes or no; says, records and waits."""
    folder, job, status, max_restarts, answer, ending = arguments
    verdict = judge(Path(folder), job, int(status), int(max_restarts), nodes_answer=answer == "yes", ending=ending == "yes")
    print(f"distattn: {verdict.reason}", flush=True)
    if verdict.code not in (AGAIN, REQUEUE):
        write_atomically(_end_path(folder, job), json.dumps({"state": verdict.state, "reason": verdict.reason}) + "\n")
    time.sleep(verdict.wait_s)
    return verdict.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
