"""``distattn bench kernels`` and ``calibrate``: masks against their predicates, and the commands at a tiny size on the CPU."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import distattn
from distattn.bench import calibrate, kernels, timing
from distattn.bench.engines import MASKS, SEED, Cell, Problem, tiles_of
from distattn.bench.masks import LONGCA_BLOCK_PATTERNS, LONGCA_MASKS
from distattn.bench.predicates import block_predicate, predicate
from distattn.bench.record import Record
from distattn.calibration import load_calibration
from distattn.cli.bench import bench
from distattn.errors import ConfigError
from distattn.kernels.selection import Rates, predicted_seconds
from distattn.kernels.workload import work_of
from tests.kernels.oracle import visible

HERE: dict[str, str | None] = {"device": "cpu", "commit": "a", "torch": "b"}


def allowed(mask_mod: Any, tokens: int, heads: int) -> np.ndarray:
    """A predicate as booleans [heads, tokens, tokens]."""
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
    zero = torch.zeros((), dtype=torch.long)
    every = torch.ones(tokens, tokens, dtype=torch.bool)
    return np.stack([(mask_mod(zero, torch.tensor(h), i, j) & every).numpy() for h in range(heads)])


@pytest.mark.parametrize("tokens", [1500, 4500])
@pytest.mark.parametrize("name", LONGCA_MASKS)
def test_masks_are_what_their_predicates_say(name: str, tokens: int) -> None:
    mask = LONGCA_MASKS[name](tokens, SEED)
    mask_mod = predicate(name, tokens, SEED, "cpu")
    want = np.ones((1, tokens, tokens), bool) if mask_mod is None else allowed(mask_mod, tokens, 1)
    assert mask.shape == (tokens, tokens)
    assert np.array_equal(mask.dense(), want[0])
    assert mask.area == want.sum()


@pytest.mark.parametrize("name", LONGCA_BLOCK_PATTERNS)
def test_block_patterns_are_what_their_predicates_say(name: str) -> None:
    cell = Cell(name, {"uniform_block": 900, "variable_block": 2100}[name], 4, 2, 16)
    tiles, pattern = tiles_of(cell)
    assert pattern is not None
    got = visible(tiles, cell.length, cell.length, cell.heads)
    assert got.max() == 1
    assert np.array_equal(got.astype(bool), allowed(block_predicate(pattern, cell.group, "cpu"), cell.length, cell.heads))
    assert not np.array_equal(got[0], got[2])
    for edges in (pattern.edges_q, pattern.edges_k):
        assert (edges[0], edges[-1]) == (0, cell.length)
        assert (np.diff(edges)[:-1] >= 128).all()
    num_keys = pattern.kept.shape[-1]
    assert (pattern.kept.sum(-1) == max(1, int(0.2 * num_keys))).all()


@pytest.mark.parametrize("name", LONGCA_MASKS)
def test_masks_of_a_million_tokens_plan_in_no_time(name: str) -> None:
    """No S×S structure: a million tokens' mask, schedule and tiles are kilobytes."""
    tokens = 1 << 20
    mask = LONGCA_MASKS[name](tokens, SEED)
    begin = time.process_time()
    plan = distattn.plan(mask, heads=64, kv_heads=8, head_dim=128)
    tiles = plan.only_tiles
    seconds = time.process_time() - begin
    assert tiles is not None
    assert tiles.nbytes < 1 << 20
    assert seconds < 0.5, f"{seconds:.3f} s of CPU; 0.1 s is promised for an idle machine"


def run_bench(path: Path, *more: str) -> dict[str, Any]:
    arguments = ["--json", str(path), "--lengths", "256", "--heads", "4:2", "--head-dims", "16", "--seconds", "0", *more]
    with pytest.raises(SystemExit) as ended:
        bench(["kernels", *arguments])
    assert ended.value.code in (0, None)
    return json.loads(path.read_text())["results"]


def test_the_command_checks_times_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, picture = tmp_path / "r.json", tmp_path / "r.png"
    first = run_bench(path, "--engines", "auto,triton,flex", "--masks", "causal,share_question,variable_block", "--commit", "x")
    assert len(first) == 9
    entry = first["causal 256 4:2 D16|auto"]
    assert entry["choice"] == "flash_cpu"
    assert "fastest" in entry["reason"]
    assert entry["area"] == 4 * 256 * 257 // 2
    assert entry["forward_tflops"] == pytest.approx(4 * entry["area"] * 16 / entry["forward_ms"] / 1e9)
    assert entry["wrong"] is False
    assert set(entry["errors"]) == {"out", "lse", "dq", "dk", "dv"}
    assert "flex is timed on CUDA alone" in first["causal 256 4:2 D16|flex"]["not_run"]
    measured: list[str] = []
    monkeypatch.setattr(kernels, "measure", lambda engine, cell, *_: measured.append(cell.mask) or {"not_run": "again"})
    second = run_bench(path, "--engines", "auto", "--masks", "causal,full", "--commit", "x", "--plot", str(picture))
    assert measured == ["full"]
    assert second["causal 256 4:2 D16|auto"] == entry
    assert picture.stat().st_size > 1000
    assert "256 4:2 D16" in capsys.readouterr().out
    assert set(run_bench(path, "--engines", "auto", "--masks", "full", "--commit", "y")) == {"full 256 4:2 D16|auto"}


def test_block_plans_are_set_against_no_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--block-plans", "--engines", "auto", "--commit", "x")
    found = run_bench(tmp_path / "r.json", *more, "--lengths", "1300")
    assert set(found) == {f"{mask} 1300 4:2 D16|auto" for mask in ("full", "block_plan_128", "block_plan_64")}
    # 11 blocks of 128 or 21 of 64: a tenth is 1 or 2 for each row, the last of which is short.
    assert found["full 1300 4:2 D16|auto"]["area"] == 4 * 1300**2
    assert 0 < found["block_plan_128 1300 4:2 D16|auto"]["area"] <= 4 * 1300 * 128
    assert not any(entry["wrong"] for entry in found.values())
    assert all("reference" in entry["choice"] for key, entry in found.items() if not key.startswith("full"))
    assert all(("mask_build_ms" in entry) != key.startswith("full") for key, entry in found.items())
    plan, dense = (found[f"{mask} 1300 4:2 D16|auto"]["forward_tflops"] for mask in ("block_plan_64", "full"))
    share = f"auto, block_plan_64 1300 4:2 D16: forward {plan / dense:.2f}"
    assert share in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--quick and --block-plans each choose what is measured"):
        bench(["kernels", "--json", str(tmp_path / "r.json"), *more, "--quick"])


def test_a_wrong_result_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MAX_ERROR", {"cpu": 1e-12})
    arguments = ["--lengths", "64", "--heads", "1:1", "--head-dims", "8", "--seconds", "0", "--engines", "auto"]
    with pytest.raises(SystemExit) as ended:
        bench(["kernels", "--json", str(tmp_path / "r.json"), "--masks", "causal", *arguments])
    assert ended.value.code == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--masks", "cusal"], "--masks has 'cusal'; it may have full, causal"),
        (["--engines", "trition"], "--engines has 'trition'; it may have flash"),
        (["--lengths", "8k"], "--lengths has '8k'; it takes positive integers"),
        (["--heads", "8:3"], "--heads has '8:3'; it takes pairs such as 64:8"),
    ],
)
def test_bad_options_are_named(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        bench(["kernels", "--json", str(tmp_path / "r.json"), *arguments])


def test_every_mask_has_a_cell() -> None:
    assert len(MASKS) == 14
    for name in MASKS:
        x = Problem.make(Cell(name, 300, 2, 1, 8), "cpu")
        assert x.area == visible(x.tiles, 300, 300, 2).sum()


def test_a_cell_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_measured", lambda *_: time.sleep(60))
    entry = kernels.measure("auto", Cell("causal", 64, 1, 1, 8), 0, 0.05)
    assert entry == {"not_run": "took longer than 0.05 s"}
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize(("engine", "wrong"), [("auto", True), ("flex", False)])
def test_a_kernel_that_fails_does_not_end_the_run(engine: str, wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("of its own")

    monkeypatch.setattr(kernels, "_measured", fail)
    entry = kernels.measure(engine, Cell("causal", 64, 1, 1, 8), 0, 60)
    assert entry == {"not_run": "ZeroDivisionError: of its own", "wrong": wrong}
    assert ("n/a!" in kernels.table({"causal 64 1:1 D8|auto": entry}, ["auto"])) == wrong


def test_repeats_are_at_least_three() -> None:
    calls: list[int] = []
    assert timing.median_ms(lambda: calls.append(1), 0, "cpu") >= 0
    assert len(calls) == timing.WARM_UPS + timing.MIN_REPEATS


def test_warm_ups_last_as_long_as_they_are_to() -> None:
    calls: list[None] = []
    timing.median_ms(lambda: calls.append(time.sleep(0.005)), 0, "cpu", warm_up_seconds=0.05)
    assert len(calls) > timing.WARM_UPS + timing.MIN_REPEATS


class _Device:
    """Milliseconds at which a host and a device are done: a call takes the host some to queue, the device some to compute."""

    host = device = 0.0

    def call(self, host: float, device: float) -> None:
        self.host += host
        self.device = max(self.device, self.host) + device

    def synchronize(self) -> None:
        self.host = max(self.host, self.device)

    def event(self, enable_timing: bool) -> _Event:
        return _Event(self)


class _Event:
    def __init__(self, device: _Device) -> None:
        self.device, self.at = device, 0.0

    def record(self) -> None:
        self.at = self.device.device = max(self.device.device, self.device.host)

    def elapsed_time(self, later: _Event) -> float:
        return later.at - self.at


@pytest.mark.parametrize(("host", "device"), [(3.0, 1.0), (1.0, 3.0)])
def test_a_time_is_the_longer_of_the_hosts_and_the_devices(host: float, device: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/kernels.md, Measuring: the first of three repeats finds an idle device, and the median is another's."""
    fake = _Device()
    monkeypatch.setattr(torch.cuda, "Event", fake.event)
    monkeypatch.setattr(torch.cuda, "synchronize", fake.synchronize)
    assert timing.median_ms(lambda: fake.call(host, device), 0, "cuda") == max(host, device)


def test_our_triton_kernels_together_are_the_faster_in_each_direction() -> None:
    times = {"triton": (2.0, 2.0), "hopper": (1.0, 4.0), "flex": (3.0, 6.0)}
    rates = {"forward_tflops": 1.0, "backward_tflops": 1.0, "wrong": False}
    results = {f"causal 32K|{name}": {"forward_ms": a, "backward_ms": b, **rates} for name, (a, b) in times.items()}
    shown = kernels.table(results, ["triton", "hopper", "flex"])
    assert "hopper / flex: forward 3.00 (least 3.00), backward 1.50 (least 1.50), 1 cells" in shown
    assert "triton or hopper / flex: forward 3.00 (least 3.00), backward 3.00 (least 3.00), 1 cells" in shown
    assert "triton or hopper" not in kernels.table({key: x for key, x in results.items() if "hopper" not in key}, ["triton"])


def test_a_record_that_is_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text("[1]")
    with pytest.raises(ConfigError, match=r"r\.json holds no benchmark results"):
        Record(path, HERE)


def test_calibrate_writes_where_distattn_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = ["--only", "kernels", "--lengths", "256", "--heads", "2:1", "--head-dims", "8", "--seconds", "0"]
    with pytest.raises(SystemExit) as ended:
        bench(["calibrate", *arguments, "--json", str(tmp_path / "times.json"), "--commit", "x"])
    assert ended.value.code in (0, None)
    found = load_calibration()
    assert found is not None
    assert {(x.backend, x.backward) for x in found.kernels} >= {("flash_cpu", False), ("flash_cpu", True)}
    assert "flash_cpu D8 forward" in capsys.readouterr().out
    measured = json.loads((tmp_path / "times.json").read_text())["results"]["causal 256 2:1 D8|flash_cpu"]
    cell = next(x for x in found.cells if (x.cell, x.backend, x.backward) == ("causal 256 2:1 D8", "flash_cpu", True))
    work = work_of("flash_cpu", [tiles_of(Cell("causal", 256, 2, 1, 8))[0]], group=2)
    by_rates = predicted_seconds(work, Rates(found, ""), backward=True, width=8)
    assert by_rates is not None
    assert cell.ratio * by_rates == pytest.approx(measured["backward_ms"] / 1e3, rel=1e-3)
    monkeypatch.setattr(calibrate, "calibrate_kernels", lambda *_, **__: ((replace(found.kernels[0], head_dim=16),), ()))
    with pytest.raises(SystemExit):
        bench(["calibrate", *arguments, "--commit", "x"])
    again = load_calibration()
    assert again is not None
    assert {x.head_dim for x in again.kernels} == {8, 16}
    assert again.cells == found.cells  # of kernels that were not timed again
    with pytest.raises(ConfigError, match="--only='lniks' is unknown"):
        bench(["calibrate", "--only", "lniks"])
