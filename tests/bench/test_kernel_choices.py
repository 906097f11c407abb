"""``auto`` by rates of one shape against measured times of another, of one run on one GPU: plan only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from distattn.bench.calibrate import MAX_CALL_S, app, fit, from_files
from distattn.bench.engines import MASKS, Cell, tiles_of
from distattn.calibration import load_calibration
from distattn.errors import ConfigError
from distattn.kernels import BACKENDS, Case
from distattn.kernels.selection import Rates, fastest

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
RATES = ("kernel-rates-h200-68c64e7.json",)
TABLES = ("kernels-longca-h200.json", "kernels-by-head-h200-1715744.json", "kernels-longca-h200-68c64e7.json")
"""Of a time that several have, the last one's counts. The first is of before hopper's backward was two kernels."""
PLANNED = ("hopper", "triton")
"""Backends that take the block plan of uniform_block."""


def table() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name in TABLES:
        found |= json.loads((RESULTS / name).read_text())["results"]
    return found


@pytest.fixture(scope="module")
def rates() -> Rates:
    """As ``calibrate`` makes them: of 32K tokens with 32:4 heads of 128."""
    return Rates(from_files([RESULTS / name for name in RATES]), "a test")


@pytest.mark.parametrize("mask", MASKS)
def test_auto_is_within_3_percent_of_the_best(mask: str, rates: Rates) -> None:
    """With 64:8 heads, of every backend that was timed; those that would make thousands of launches were not."""
    cell, measured = Cell(mask, 32768, 64, 8, 128), table()
    tiles, _ = tiles_of(cell)
    case = Case("cuda", torch.bfloat16, 128, 128, 64, 8)
    names = [x for x in ("fa4", "cudnn", "hopper", "triton") if mask != "uniform_block" or x in PLANNED]
    choice = fastest(case, names, [tiles], rates)
    assert choice is not None
    for direction, chosen in (("forward_ms", choice.forward), ("backward_ms", choice.backward)):
        entries = {name: measured.get(f"{cell.key}|{name}", {}) for name in BACKENDS}
        times = {name: entry[direction] for name, entry in entries.items() if direction in entry}
        assert {"hopper", "triton"} <= set(times)
        assert times[chosen] <= 1.03 * min(times.values()), (direction, chosen, times, choice.reason)


def test_costs_of_rows_are_not_taken_for_a_call() -> None:
    """From cells of one size, all of which take long: what grows with the heads is a cost of rows, and no call takes 1 ms."""
    rows = 32 * 32768.0
    cells = [(rows, waits, pairs) for pairs in (1e9, 4e9, 3e10) for waits in (0.0, 900.0)]
    amounts = np.array([(1, 1, 0, 77, pairs, 0, rows, waits) for rows, waits, pairs in cells])
    seconds = amounts @ np.array([1e-4, 0, 0, 0, 2e-12, 0, 1e-9, 4e-6])
    (call_s, launch_s, row_s, step_s, pair_s, cut_pair_s, vendor_row_s, wait_s), error = fit(amounts, seconds)
    assert error < 1e-6
    assert call_s <= MAX_CALL_S
    assert (launch_s, row_s, step_s, cut_pair_s) == (0, 0, 0, 0)
    assert (pair_s, wait_s) == (pytest.approx(2e-12), pytest.approx(4e-6))
    assert vendor_row_s == pytest.approx(1e-9, rel=0.25)


def test_no_more_numbers_than_times_say() -> None:
    """Three cells: as many numbers would fit them exactly, whatever they say of others."""
    amounts = np.array([(1, 1, 0, 0, pairs, 1e6, 3e6, 40.0) for pairs in (1e9, 2e9, 3e10)])
    numbers, error = fit(amounts, np.array([1.1e-3, 1.9e-3, 3e-2]))
    assert sum(x > 0 for x in numbers) == 1
    assert 1e-3 < error < 0.2


def test_recorded_times_make_a_calibration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On any machine, for the device that they were measured on; a later file's times take the place of an earlier one's."""
    environment = {"device": "NVIDIA H200", "commit": "abc", "torch": "2.11"}
    earlier, later = tmp_path / "a.json", tmp_path / "b.json"
    times = {f"{mask} 4K 8:2 D64|triton": {"forward_ms": 2.0, "backward_ms": 9.0} for mask in ("full", "causal")}
    earlier.write_text(json.dumps({"environment": environment, "results": times | {"full 4K 8:2 D64|fa4": {"not_run": "x"}}}))
    later.write_text(json.dumps({"environment": environment, "results": {"causal 4K 8:2 D64|triton": {**CAUSAL_MS}}}))
    path = tmp_path / "c.json"
    run = CliRunner().invoke(app, ["--recorded", f"{earlier},{later}", "--output", str(path)], catch_exceptions=False)
    assert "triton D64 forward" in run.stdout
    made = load_calibration(path)
    assert made is not None
    assert (made.device, made.commit, made.versions["torch"]) == ("NVIDIA H200", "abc", "2.11")
    assert {x.backend for x in made.kernels} == {"triton"}
    assert {x.cell for x in made.cells} == {"full 4K 8:2 D64", "causal 4K 8:2 D64"}
    tiles, _ = tiles_of(Cell("causal", 4096, 8, 2, 64))
    choice = fastest(Case("cuda", torch.bfloat16, 64, 64, 8, 2), ["triton"], [tiles], Rates(made, "x"))
    assert choice is not None
    assert "as measured near causal 4K 8:2 D64" in choice.reason


CAUSAL_MS = {"forward_ms": 1.0, "backward_ms": 4.5}


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        ("{}", [], r"holds no times of kernels .*: give files of `calibrate --json`"),
        ('{"environment": {"device": "a", "commit": ""}, "results": {"full 4K|triton": {"forward_ms": 1}}}', [],
         r"'full 4K' names no cell: it must be like causal 32K 64:8 D128"),
        ("{}", ["--only", "kernels"], "--recorded takes the times that its files hold: leave out --only"),
    ],
)  # fmt: skip
def test_files_that_are_no_times_are_refused(content: str, more: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, ["--recorded", str(path), *more], catch_exceptions=False)


def test_times_of_two_kinds_of_devices_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(json.dumps({"environment": {"device": name, "commit": ""}, "results": {}}))
    with pytest.raises(ConfigError, match="needs times of one kind of device, but these are of a, b"):
        from_files([tmp_path / "a", tmp_path / "b"])
