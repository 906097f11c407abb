"""Plan only: what ``distattn plan --strategy disaggregated`` adds, as a user types it."""

import json
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from distattn.cli.plan import app

PLAN = "--mask documents --lengths 30000,2000,500,98000 --ranks 8 --strategy disaggregated --heads 8 --kv-heads 4"


def run(line: str) -> Result:
    return CliRunner().invoke(app, shlex.split(line), catch_exceptions=False)


def refused(line: str) -> str:
    result = run(line)
    assert result.exit_code == 2
    return result.stderr


def test_certificate_and_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="drawing needs the extra 'plot'")
    picture = tmp_path / "plan.png"
    result = run(
        f"{PLAN} --tolerance 0.02 --pool 4 --option ranks_per_node=4 --json - --plot {picture} --hidden 1024 --ffn 4096"
    )
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    certificate = found["certificate"]
    assert certificate["num_pools"] == 2
    assert certificate["lower_bound"] == 1.0
    assert certificate["planning_loss"] <= 1.0201 < certificate["pooling_loss"]
    assert found["imbalance"] == pytest.approx(certificate["busiest"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = run(PLAN)
    assert "balance   busiest rank 1.0" in text.stdout
    assert "--hidden and --ffn must be at least 1" in refused(f"{PLAN} --plot {picture} --hidden 0")


def test_pipeline(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="drawing needs the extra 'plot'")
    numbers, picture = tmp_path / "ticks.json", tmp_path / "ticks.png"
    line = f"{PLAN} --tolerance 0.02 --pipeline-stages 2 --microbatches 4"
    result = run(f"{line} --json {numbers} --plot {picture}")
    assert result.exit_code == 0, result.stderr
    found = json.loads(numbers.read_text())
    assert (found["pipeline_stages"], found["microbatches"], found["ranks"], found["verified"]) == (2, 4, 8, True)
    assert len(found["ticks"]) == 2 * (4 + 2 - 1)
    assert max(tick["imbalance"] for tick in found["ticks"]) <= 1.0201
    assert found["compute_seconds"] < found["home_seconds"]
    assert found["seconds"] == pytest.approx(sum(tick["seconds"] for tick in found["ticks"]))
    assert "2 pipeline stages" in result.stdout
    assert picture.exists()
    for change, message in (
        ("--strategy ring", "--pipeline-stages needs --strategy disaggregated"),
        ("--microbatches 1", "at least as many microbatches as stages"),
        ("--ranks 7", "7 ranks cannot be divided over 2 pipeline stages"),
        ("--layout zigzag", "--layout must be auto or contiguous"),
    ):
        assert message in refused(f"{line} {change}")
    assert "needs --pipeline-stages, --microbatches and --lengths" in refused(f"{PLAN} --pipeline-stages 2")
