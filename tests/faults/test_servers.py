"""A dedicated attention server dies, and the run goes on with one fewer. Ring 2: ``distattn train``, gloo, 3 ranks, then 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distattn.config import load_config
from tests.faults.faulty_run import FaultyRun, write_config
from tests.training.test_trainer_sharding import train

STEPS, INTERVAL = 10, 3


@pytest.mark.timeout(240)
def test_a_run_that_lost_a_server_goes_on_with_one_fewer(tmp_path: Path) -> None:
    """It is named, the rest is planned anew from the last checkpoint, and the losses are those of a run that lost nothing."""
    config = write_config(tmp_path, STEPS, INTERVAL)
    shared = ("parallel.strategy=disaggregated", "train.nano_batches=2")
    run = FaultyRun(config, tmp_path / "run", *shared, "parallel.context=3", "parallel.servers=2", DISTATTN_TEST_PACE="0.2")
    try:
        run.wait_for_step(INTERVAL + 2)
        run.rank(2).kill()
        assert run.wait() == 1, run.text()
    finally:
        run.stop()
    assert "rank 2 was killed by SIGKILL" in run.text()
    reached = run.steps()[-1]
    assert reached < STEPS
    rest = FaultyRun(config, tmp_path / "run", *shared, "parallel.context=2", "parallel.servers=1")
    assert rest.wait() == 0, rest.text()
    assert "resum" in rest.text().lower(), rest.text()
    losses, _, _ = train(
        0, load_config(config, [f"run.dir={tmp_path}/whole", "parallel.context=1", "parallel.data=1", "eval.interval=0"])
    )
    assert rest.steps() == list(range(1, STEPS + 1))
    assert rest.losses() == pytest.approx(losses, rel=1e-5)
    started = [json.loads(line) for line in (tmp_path / "run" / "attempts.jsonl").read_text().splitlines()]
    assert [line["ranks"] for line in started if line["event"] == "started"] == [3, 2]
