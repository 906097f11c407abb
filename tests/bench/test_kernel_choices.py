"""``auto`` by the rates that come with distattn against measured times: those they were fitted to, and others. Plan only."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from distattn.bench.calibrate import MAX_CALL_S, app, fit, from_files
from distattn.bench.engines import MASKS, Cell, tiles_of
from distattn.calibration import load_calibration
from distattn.errors import ConfigError
from distattn.kernels import BACKENDS, Case
from distattn.kernels.selection import Choice, Rates, corrected, fastest, predicted_seconds, shipped_choice_rates
from distattn.kernels.workload import work_of

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
FITTED = ("kernel-rates-h200-8434617-d128.json", "kernel-rates-h200-8434617-d64.json")
TABLES = ("kernels-longca-h200-8434617.json", "kernels-longca-h200-68c64e7.json")
"""14 masks with 64:8 heads of 128, five and nine of them."""
GRID = tuple(f"kernels-grid-h200-8434617-{number}.json" for number in (1, 2, 3, 4))
"""14 masks at 8K and 32K with 16:16 and 64:8 heads of 64 and 128, by four GPUs of one host; the last cells were not reached."""
OLDER = "kernels-longca-h200-eab13e3.json"
PLANNED = ("hopper", "triton")
"""Backends that take the block plan of uniform_block."""

Times = dict[str, tuple[float, float]]
"""Milliseconds forward and backward, by backend."""


def measured(names: tuple[str, ...]) -> dict[str, Times]:
    """By cell, as ``causal 32K 64:8 D128``, without ``auto`` and peers; of a time that several have, the last one's counts."""
    found: dict[str, Times] = {}
    for name in names:
        for key, entry in json.loads((RESULTS / name).read_text())["results"].items():
            cell, backend = key.split("|")
            if backend in BACKENDS and "forward_ms" in entry:
                found.setdefault(cell, {})[backend] = entry["forward_ms"], entry["backward_ms"]
    return found


@pytest.fixture(scope="module")
def rates() -> Rates:
    return Rates(shipped_choice_rates(), "a test")


def chosen(text: str, rates: Rates, names: Collection[str] = ("fa4", "cudnn", "hopper", "triton")) -> Choice:
    """Among those of these backends that compute the cell."""
    cell = Cell.read(text)
    tiles, _ = tiles_of(cell)
    case = Case("cuda", torch.bfloat16, cell.head_dim, cell.head_dim, cell.heads, cell.kv_heads)
    choice = fastest(case, [x for x in names if cell.mask != "uniform_block" or x in PLANNED], [tiles], rates)
    assert choice is not None
    return choice


def least(times: Times) -> tuple[float, float]:
    return min(x[0] for x in times.values()), min(x[1] for x in times.values())


def test_the_rates_that_come_with_it_are_what_calibrate_makes_of_the_records(rates: Rates) -> None:
    made, shipped = from_files([RESULTS / name for name in FITTED]), rates.calibration
    assert (made.device, made.commit, made.versions) == (shipped.device, shipped.commit, shipped.versions)
    for fitted, kept in ((made.kernels, shipped.kernels), (made.cells, shipped.cells)):
        assert len(fitted) == len(kept)
        for x, y in zip(fitted, kept):
            for (name, value), other in zip(asdict(x).items(), asdict(y).values()):
                assert value == (other if isinstance(other, str) else pytest.approx(other, rel=1e-4, abs=1e-15)), (name, x, y)


def test_auto_is_within_3_percent_where_the_rates_were_measured(rates: Rates) -> None:
    """Ten masks, two lengths, 32:4 and 16:16 heads of 128 and 64: each direction of each cell."""
    table, behind = measured(FITTED), {}
    compared = [text for text, times in table.items() if len(times) > 1]
    for text in compared:
        choice, times = chosen(text, rates), table[text]
        (forward, backward), taken = least(times), (times[choice.forward][0], times[choice.backward][1])
        if taken[0] > 1.03 * forward or taken[1] > 1.03 * backward:
            behind[text] = choice, times
    assert behind == {}
    assert len(compared) >= 71


@pytest.mark.parametrize("mask", MASKS)
def test_auto_is_within_3_percent_of_the_best(mask: str, rates: Rates) -> None:
    """With 64:8 heads. A time that neither table has is taken from the grid, or from an older run, there beside ``hopper``."""
    cell = Cell(mask, 32768, 64, 8, 128)
    choice, times = chosen(cell.key, rates), measured((*GRID, *TABLES))[cell.key]
    assert {"hopper", "triton"} <= set(times)
    for direction, name in enumerate((choice.forward, choice.backward)):
        if name in times:
            taken = times[name][direction]
        else:
            assert direction == 0, "the backward of hopper is another one since"
            older = measured((OLDER,))[cell.key]
            taken = times["hopper"][direction] * older[name][direction] / older["hopper"][direction]
        assert taken <= 1.03 * least(times)[direction], (direction, name, times, choice.reason)


@pytest.mark.parametrize(("length", "cells", "behind", "of_all"), [("32K", 46, 0, 1.001), ("8K", 52, 5, 1.02)])
def test_auto_on_cells_that_no_rate_was_measured_on(length: str, cells: int, behind: int, of_all: float, rates: Rates) -> None:
    """Among the backends that have times. behind: cells whose forward and backward together take over 3 % longer than those of
    the best backend. of_all: all cells' seconds, over those of the best backends of each direction. Calls of 8K take less than
    a millisecond: launches count, and times of one kernel vary by a tenth and more."""
    table = {text: times for text, times in measured(GRID).items() if f" {length} " in text}
    taken = {}
    for text, times in table.items():
        choice = chosen(text, rates, times)
        taken[text] = times[choice.forward][0] + times[choice.backward][1]
    late = [text for text, seconds in taken.items() if seconds > 1.03 * min(sum(both) for both in table[text].values())]
    assert len(table) == cells
    assert len(late) <= behind, late
    assert sum(taken.values()) <= of_all * sum(sum(least(times)) for times in table.values())


def test_a_launch_costs_the_host_no_more_than_the_quickest_did(rates: Rates) -> None:
    """With 32:4 heads these launches took about as long as those that wait for the host; with 64:8 the device takes longer."""
    cell = Cell("block_causal_document", 32768, 64, 8, 64)
    work = work_of("fa4", [tiles_of(cell)[0]], group=cell.group)
    seconds = predicted_seconds(work, rates, backward=True, width=64)
    assert seconds is not None
    factor = corrected("fa4", work, rates, backward=True, width=64, group=cell.group).factor
    assert 1e3 * factor * seconds == pytest.approx(measured(GRID)[cell.key]["fa4"][1], rel=0.1)


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
