"""Plan only: what a batch script is told when its ranks have ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distattn.launchers.slurm_script import AGAIN, REQUEUE
from distattn.launchers.slurm_verdict import cancel_mark, judge, main, read_end
from distattn.launchers.supervise import Failure, Journal


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


def checkpoint(run_dir: Path, step: int) -> None:
    (run_dir / "checkpoints" / f"step-{step}").mkdir()


def test_a_finished_run_ends_the_job(run_dir: Path) -> None:
    (run_dir / "finished.json").write_text('{"step": 9}')
    verdict = judge(run_dir, "7", 0, 3)
    assert (verdict.code, verdict.state) == (0, "finished")
    assert main([str(run_dir), "7", "0", "3", "yes", "no"]) == 0
    assert read_end(run_dir, "7") == ("finished", "finished: all 9 steps are done")


def test_a_cancelled_job_is_not_started_again(run_dir: Path) -> None:
    cancel_mark(run_dir, "7_1").touch()
    assert judge(run_dir, "7_1", 143, 3).state == "cancelled"
    assert judge(run_dir, "7_2", 143, 3).code == AGAIN


def test_a_stop_with_a_checkpoint_is_requeued_for_as_long_as_it_gets_further(run_dir: Path) -> None:
    for step in range(10):
        checkpoint(run_dir, step)
        assert judge(run_dir, "7", 0, 2).code == REQUEUE
    codes = [judge(run_dir, "7", 0, 2) for _ in range(3)]
    assert [verdict.code for verdict in codes] == [REQUEUE, REQUEUE, 1]
    assert codes[-1].reason.startswith("not requeued: 3 allocations in a row ended before another checkpoint")


def test_no_checkpoint_at_all_does_not_go_on_forever(run_dir: Path) -> None:
    assert [judge(run_dir, "7", 0, 2).code for _ in range(3)] == [REQUEUE, REQUEUE, 1]


def test_a_lost_node_is_replaced(run_dir: Path) -> None:
    checkpoint(run_dir, 1)
    verdict = judge(run_dir, "7", 1, 3, nodes_answer=False)
    assert verdict.code == REQUEUE
    assert "a node does not answer" in verdict.reason


def test_near_the_time_limit_a_killed_rank_is_no_failure(run_dir: Path) -> None:
    checkpoint(run_dir, 1)
    assert judge(run_dir, "7", 143, 0, ending=True).code == REQUEUE
    assert Journal(run_dir).attempts() == []


def test_failures_are_bounded_and_back_off(run_dir: Path) -> None:
    """A rank is killed at another step each time: three restarts, then no more."""
    journal, seen = Journal(run_dir), []
    for attempt in range(4):
        journal.started(2, attempt)
        (run_dir / "metrics.jsonl").write_text(json.dumps({"step": 10 * attempt + 1}) + "\n")
        seen.append(judge(run_dir, "7", 137, 3))
    assert [verdict.code for verdict in seen] == [AGAIN, AGAIN, AGAIN, 137]
    assert all(verdict.wait_s > 0 for verdict in seen[:3])
    assert "restart 1 of 3" in seen[0].reason
    assert "3 restarts have been used of 3 allowed" in seen[3].reason


def test_the_same_failure_twice_is_not_tried_a_third_time(run_dir: Path) -> None:
    """The ranks have written of their failure themselves."""
    journal, codes = Journal(run_dir), []
    for attempt in range(2):
        journal.started(2, attempt)
        journal.failed(Failure(5, "TrainingError", "the loss is nan", rank=1))
        codes.append(judge(run_dir, "7", 1, 9))
    assert codes[0].code == AGAIN
    assert (codes[1].code, codes[1].state) == (1, "failed")
    assert "step 5 failed the same way twice" in codes[1].reason


def test_a_bad_config_is_not_restarted(run_dir: Path) -> None:
    assert judge(run_dir, "7", 2, 9).code == 2


@pytest.mark.parametrize("status", [AGAIN, REQUEUE])
def test_a_status_of_the_ranks_is_not_taken_for_a_verdict(run_dir: Path, status: int) -> None:
    assert judge(run_dir, "7", status, 0).code == 1
