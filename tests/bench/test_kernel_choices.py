"""``auto`` by rates of one shape against measured times of another, of one run on one GPU: plan only."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distattn.bench.calibrate import MAX_CALL_S, Timed, cells_of, fit, fit_all
from distattn.bench.engines import MASKS, Cell, tiles_of
from distattn.calibration import Calibration
from distattn.kernels import BACKENDS, Case
from distattn.kernels.selection import Rates, fastest
from distattn.kernels.workload import work_of

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
RATES, TABLE = "kernel-rates-h200.json", "kernels-longca-h200.json"
PLANNED = ("hopper", "triton")
"""Backends that take the block plan of uniform_block."""


def results(name: str) -> dict[str, dict[str, Any]]:
    return json.loads((RESULTS / name).read_text())["results"]


def cell_of(key: str) -> Cell:
    found = re.fullmatch(r"(\w+) (\d+)K (\d+):(\d+) D(\d+)", key)
    assert found is not None
    mask, length, *shape = found.groups()
    return Cell(mask, 1024 * int(length), *map(int, shape))


@pytest.fixture(scope="module")
def rates() -> Rates:
    """As ``calibrate`` makes them from its times: 32K tokens, 32:4 heads of 128."""
    timed = []
    for key, entry in results(RATES).items():
        if "forward_ms" in entry:
            cell, backend = cell_of(key.split("|")[0]), key.split("|")[1]
            work = work_of(backend, [tiles_of(cell)[0]], group=cell.group)
            timed.append(Timed(cell, backend, work, entry["forward_ms"], entry["backward_ms"]))
    times: dict[tuple[str, int], list[tuple[Any, float, float]]] = {}
    for x in timed:
        times.setdefault((x.backend, x.cell.head_dim), []).append((x.work, x.forward_ms, x.backward_ms))
    kernels = fit_all(times)
    cells = cells_of(timed, Rates(Calibration("", kernels=kernels), ""))
    return Rates(Calibration("", kernels=kernels, cells=cells), "a test")


@pytest.mark.parametrize("mask", MASKS)
def test_auto_is_within_3_percent_of_the_best(mask: str, rates: Rates) -> None:
    """With 64:8 heads, of every backend that was timed; those that would make thousands of launches were not."""
    cell, table = Cell(mask, 32768, 64, 8, 128), results(TABLE)
    tiles, _ = tiles_of(cell)
    case = Case("cuda", torch.bfloat16, 128, 128, 64, 8)
    names = [x for x in ("fa4", "cudnn", "hopper", "triton") if mask != "uniform_block" or x in PLANNED]
    choice = fastest(case, names, [tiles], rates)
    assert choice is not None
    for direction, chosen in (("forward_ms", choice.forward), ("backward_ms", choice.backward)):
        entries = {name: table.get(f"{cell.key}|{name}", {}) for name in BACKENDS}
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
