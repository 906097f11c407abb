"""The benchmark of context parallelism: its report, its predictions, and gloo on the CPU with 2 ranks at tiny sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distattn.bench.calibrate_links import fit_line
from distattn.bench.context import choose_cases, choose_engines
from distattn.bench.context_cases import Case, check_mask, longca_cases, target_cases
from distattn.bench.context_peers import Ranks, Refused, dense_mask, ringmaster_ulysses, torch_ring
from distattn.bench.context_predict import add_predictions, predict_case, prices_of
from distattn.bench.context_profile import summarise
from distattn.bench.context_report import IDEAL, Report, plot, speedups, table, tflops
from distattn.bench.masks import LONGCA_MASKS
from distattn.bench.scaling import table as scaling_table
from distattn.errors import ConfigError
from distattn.parallel.hardware import HARDWARE

ENVIRONMENT = {"device": "cpu", "commit": "c", "torch": "t", "ranks": 2, "kernel": "auto"}


def measured(forward: float, backward: float, strategy: str = "ring", *, wrong: bool = False) -> dict[str, Any]:
    """A cell whose second rank is a tenth slower than the first."""
    times = {"forward_ms": forward, "backward_ms": backward, "total_ms": forward + backward}
    entry: dict[str, Any] = {name: [[ms] * 3, [1.1 * ms] * 3] for name, ms in times.items()}
    return entry | {
        "forward_flops": 4e9, "backward_flops": 1e10, "errors": {}, "wrong": wrong, "peak_memory_bytes": 1,
        "details": {"strategy": strategy, "kernel": "cudnn"},
    }  # fmt: skip


def report(tmp_path: Path, cells: dict[str, dict[str, Any]]) -> Report:
    made = Report.begin(tmp_path / "r.json", ENVIRONMENT)
    made.results = {f"causal 32K 16:16 D128|{name}": cell for name, cell in cells.items()}
    made.save()
    return made


def test_rates_and_shares(tmp_path: Path) -> None:
    cells = {
        IDEAL: measured(4, 6), "ring": measured(2, 3), "auto": measured(2.5, 3.5), "torch_ring": measured(3, 3),
        "torch_flex": {"refused": "no"}, "deepspeed_ulysses": measured(0.1, 0.1, wrong=True), "usp": {"failed": "boom"},
    }  # fmt: skip
    made = report(tmp_path, cells)
    case = made.cases()[0]
    assert made.efficiency(case, "ring") == pytest.approx(1.0)
    assert made.efficiency(case, "deepspeed_ulysses") is None, "a wrong result has no speed"
    assert tflops(cells["ring"], "forward") == pytest.approx(4e9 / 4.2 / 1e9)
    assert tflops(cells[IDEAL], "forward", alone=True) == pytest.approx(2 * 4e9 / 8.4 / 1e9)
    assert speedups(made) == {case: pytest.approx(6 / 5)}
    text = table(made)
    assert "n/a torch_flex: no" in text
    assert f"failed {case}|usp: boom" in text
    assert "geometric mean 1.20" in text
    assert "auto took ring for" in text
    plot(made, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_a_report_is_resumed_only_where_it_was_measured(tmp_path: Path) -> None:
    made = report(tmp_path, {"ring": measured(1, 1)})
    assert Report.begin(made.path, ENVIRONMENT).results
    assert not Report.begin(made.path, {**ENVIRONMENT, "commit": "d"}).results
    made.path.write_text("[]")
    with pytest.raises(ConfigError, match="holds no results of distattn bench context"):
        Report.begin(made.path, ENVIRONMENT)


def test_every_mask_has_a_case_and_an_area() -> None:
    cases = [*longca_cases(2, 512), *target_cases()[2:]]
    assert len(cases) == len(LONGCA_MASKS) + 2
    for case in cases:
        mask = case.build()
        assert mask.shape == (case.tokens, case.tokens)
        assert 0 < mask.area <= case.tokens**2
        check_mask(case.mask)
    assert Case("window7", 64).build().area == Case("window7", 64, seed=1).build().area
    assert Case("causal", 131072, 16, 16).name == "causal 128K 16:16 D128"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("some", "", "1", ""), "--cases is 'some'"),
        (("all", "diagonal", "1", ""), "unknown mask 'diagonal'"),
        (("all", "", "8k", ""), "--tokens is '8k'"),
        (("all", "", "8", "4:2"), "--heads is '4:2'"),
    ],
)
def test_bad_options_are_refused(arguments: tuple[str, str, str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_cases(*arguments, 2, quick=False)
    with pytest.raises(ConfigError, match="unknown engine 'warp'"):
        choose_engines("ring,warp")


def test_options_choose_cases() -> None:
    assert [case.mask for case in choose_cases("targets", "causal", "1", "", 2, quick=False)] == ["causal", "causal"]
    small = choose_cases("longca", "full", "64,128", "4:2:16", 2, quick=False)
    assert [(case.tokens, case.heads, case.kv_heads, case.head_dim) for case in small] == [(128, 4, 2, 16), (256, 4, 2, 16)]
    assert len(choose_cases("all", "", "64,128", "", 2, quick=True)) == len(target_cases()) + 4


def test_peers_say_what_they_do_not_do() -> None:
    ranks = Ranks(0, 2, torch.device("cpu"), None)  # type: ignore[arg-type]
    with pytest.raises(Refused, match="causal and full attention only"):
        torch_ring(Case("window9", 64), Case("window9", 64).build(), ranks, rotate="allgather")
    with pytest.raises(Refused, match="CUDA only"):
        torch_ring(Case("causal", 64), Case("causal", 64).build(), ranks, rotate="allgather")
    with pytest.raises(Refused, match=r"is not installed here|KV heads that divide"):
        ringmaster_ulysses(Case("causal", 64, 3, 3), Case("causal", 64).build(), ranks)
    assert ranks.head_tail(8).tolist() == [0, 1, 6, 7]
    mask = Case("share_question", 96).build()
    assert np.array_equal(dense_mask(mask, torch.device("cpu")).numpy(), mask.dense())


def test_a_prediction_starts_from_the_ideal(tmp_path: Path) -> None:
    hardware = HARDWARE["h100"]
    case = target_cases()[0]
    cells = {IDEAL: measured(8, 20), "ring": measured(4.4, 10.6), "torch_ring": measured(5, 11)}
    made = report(tmp_path, cells)
    add_predictions(made, [case], hardware)
    assert "predicted_ms" not in made.cell(case.name, "torch_ring")
    predicted = made.cell(case.name, "ring")["predicted_ms"]
    assert 1.1 * 28 / 2 < predicted < 1.15 * 1.1 * 28 / 2, "half the slowest device's time, and what a ring adds"
    assert "predicted against measured, 1 cells" in table(made)
    mask = case.build()
    prices = prices_of(cells[IDEAL], case, mask, hardware)
    alone = predict_case(case, mask, "ring", 1, hardware, prices)
    assert 1e3 * alone.seconds == pytest.approx(1.1 * 28, rel=0.02)


def test_lines_through_times_are_found() -> None:
    sizes = np.array([1e5, 1e6, 1e7, 1e8])
    assert fit_line(sizes, 2e-5 + sizes / 3e11) == pytest.approx((2e-5, 1 / 3e11), rel=1e-6)
    latency, per_byte = fit_line(sizes, sizes / 3e11 - 1e-8)
    assert latency == 0
    assert per_byte == pytest.approx(1 / 3e11, rel=0.05)


def test_a_profile_tells_computing_from_transfers() -> None:
    spans = [(0.0, 100.0, "kernel"), (50.0, 150.0, "ncclDevKernel_SendRecv"), (200.0, 250.0, "kernel")]
    found = summarise(spans)
    assert {name: found[name] for name in ("span", "computing", "transferring", "overlapped", "idle")} == pytest.approx(
        {"span": 0.25, "computing": 0.15, "transferring": 0.1, "overlapped": 0.05, "idle": 0.05}
    )
    assert found["kernels"]["kernel"] == [pytest.approx(0.15), 2]
    assert summarise([]) == {}


def test_the_scaling_table_marks_the_best() -> None:
    results = {
        "causal|8|ring": {"efficiency": 0.9},
        "causal|8|usp": {"efficiency": 0.95},
        "causal|8|ulysses": {"refused": "no"},
    }
    assert "| causal | 8 | 0.90 | **0.95** | – |" in scaling_table(results, [8], ["ring", "usp", "ulysses"])


def bench(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "distattn", "bench", "context", "--json", str(path), "--device", "cpu", "--ranks", "2",
        "--cases", "longca", "--tokens", "64", "--heads", "4:2:8", "--seconds", "0.001", "--commit", "c", *options,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)


def test_on_gloo(tmp_path: Path) -> None:
    """Every strategy is right on two masks; peers are refused with a reason; a finished run is not run again."""
    path = tmp_path / "context.json"
    done = bench(path, "--masks", "causal_document,sliding_window", "--plot", str(tmp_path / "context.png"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "share of the ideal" in done.stdout
    assert (tmp_path / "context.png").exists()
    results = json.loads(path.read_text())["results"]
    for key, cell in results.items():
        if key.endswith(("|torch_ring", "|torch_flex", "|deepspeed_ulysses")):
            assert cell["refused"]
        elif key.endswith(("|ring", "|all_gather", "|auto", f"|{IDEAL}")):
            assert not cell["wrong"], key
            assert max(cell["errors"].values()) < 1e-5
            assert len(cell["total_ms"]) == 2
            assert len(cell["total_ms"][0]) >= 3
    assert sum(key.endswith("|ring") for key in results) == 2
    before = path.read_text()
    again = bench(path, "--masks", "causal_document,sliding_window")
    assert again.returncode == 0
    assert json.loads(path.read_text())["results"] == json.loads(before)["results"]
