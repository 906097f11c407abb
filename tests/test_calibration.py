"""Calibrations on disk, and rates that are fitted to times: plan only."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from distattn import calibration
from distattn.bench.calibrate import fit, fit_all, non_negative_fit
from distattn.calibration import Calibration, KernelRate, LinkRate, calibration_path, load_calibration
from distattn.errors import ConfigError
from distattn.kernels.workload import NOTHING, Work

RATE = KernelRate("triton", False, 128, 3e-5, 1e-5, 2e-9, 3e-6, 8e-13, 1.2e-12, 0.02)
LINK = LinkRate("inside", "send", 2, 380.0, 12.0)
GPU = Calibration("NVIDIA H100 80GB HBM3", {"torch": "2.11.0", "triton": None}, "abc", (RATE,), (LINK,))


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = GPU.save(tmp_path / "folder" / "c.json")
    assert load_calibration(path) == GPU
    assert [x.name for x in path.parent.iterdir()] == ["c.json"]


def test_a_file_for_each_kind_of_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert calibration_path(GPU.device) == tmp_path / "distattn" / "calibration-nvidia-h100-80gb-hbm3.json"
    assert load_calibration() is None
    GPU.save()
    monkeypatch.setattr(calibration, "device_name", lambda: "cpu")
    assert load_calibration() is None
    monkeypatch.setattr(calibration, "device_name", lambda: GPU.device)
    assert load_calibration() == GPU


def test_the_digest_follows_the_rates_alone() -> None:
    assert GPU.digest == replace(GPU, commit="other", versions={}).digest
    assert GPU.digest != replace(GPU, kernels=(replace(RATE, pair_s=9e-13),)).digest
    assert GPU.digest != replace(GPU, links=()).digest


@pytest.mark.parametrize(
    "text",
    ["no json", "[]", "{}", json.dumps({"format": 99}), json.dumps({"format": 1, "device": "x"}),
     json.dumps({"format": 1, "device": "x", "versions": {}, "commit": "", "kernels": [{"backend": "x"}], "links": []})],
)  # fmt: skip
def test_another_file_is_refused_with_what_to_do(text: str, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"c\.json is no calibration of format 1 .*run `distattn bench calibrate`"):
        load_calibration(path)


RATES = np.array([4e-5, 0.0, 1e-9, 0.0, 8e-13, 1.5e-12, 2e-9, 1e-6])
"""Of what ``Work.terms`` gives, of which steps are not fitted."""


def works(count: int, seed: int = 0) -> np.ndarray:
    """Amounts as masks have them: one call, a launch or two, millions of pairs."""
    generator = np.random.default_rng(seed)
    found = generator.uniform(0.1, 1, (count, 8)) * np.array([1, 1, 1e6, 1e3, 1e10, 1e9, 1e6, 1e3])
    found[:, 0], found[:, 1] = 1, generator.integers(1, 3, count)
    return found


def test_the_fit_finds_the_rates_that_made_the_times() -> None:
    found, error = fit(works(30), works(30) @ RATES)
    assert np.allclose(found, RATES, rtol=1e-6, atol=1e-16)
    assert error < 1e-6


def test_the_fit_knows_where_the_host_is_slower() -> None:
    amounts = works(40)
    amounts[::4, 1] = 500
    amounts[::4, 2:] /= 20
    rates = RATES + np.array([0, 7e-5, 0, 0, 0, 0, 0, 0])
    seconds = amounts[:, 0] * rates[0] + np.maximum(amounts[:, 1] * rates[1], amounts[:, 2:] @ rates[2:])
    found, error = fit(amounts, seconds)
    assert np.allclose(found, rates, rtol=1e-6, atol=1e-16)
    assert error < 1e-6


def test_the_fit_never_goes_below_zero_and_knows_its_error() -> None:
    amounts, generator = np.delete(works(40, 1), 1, axis=1), np.random.default_rng(2)
    times = amounts @ np.delete(RATES, 1) * generator.uniform(0.7, 1.3, 40)
    found = non_negative_fit(amounts, times, times)
    assert found.min() >= 0
    for nudged in found * np.array([[1.01], [0.99]]):
        assert np.square(amounts @ nudged / times - 1).sum() >= np.square(amounts @ found / times - 1).sum()
    numbers, error = fit(np.insert(amounts, 1, 1, axis=1), times)
    assert error == pytest.approx(np.abs(amounts @ np.delete(numbers, 1) / times - 1).max())


def test_a_backend_is_fitted_on_what_it_computes_itself() -> None:
    cells = []
    for i, row in enumerate(works(20)):
        seconds = float(row @ RATES)
        calls, launches, rows, _, pairs, cut_pairs, vendor_rows, waits = row.tolist()
        work = Work(calls, launches, 0, rows, 0, 0, pairs, cut_pairs, vendor_rows, waits, waits)
        elsewhere = {"flash": work} if i % 3 == 0 else {"flash": NOTHING}
        cells.append(({"cudnn": work, **elsewhere}, seconds * (9e3 if i % 3 == 0 else 1e3), seconds * 2e3))
    forward, backward = fit_all({("cudnn", 64): cells})
    assert (forward.backend, forward.backward, backward.backward) == ("cudnn", False, True)
    assert forward.pair_s == pytest.approx(RATES[4], rel=1e-6, abs=0)
    assert backward.pair_s == pytest.approx(2 * RATES[4], rel=1e-6, abs=0)


def test_long_merges_are_not_taken_for_the_host() -> None:
    """A launch more and merges of many rows: with the rows' time put down to the host, such tiles looked cheap elsewhere."""
    amounts = works(40)
    amounts[:, 2] = 0  # rows count where results are merged alone
    amounts[::5, 1], amounts[::5, 2] = 6, np.linspace(1e6, 2e6, 8)
    amounts[1::5, 1], amounts[1::5, 2:] = 100, amounts[1::5, 2:] / 1e3
    rates = np.array([4e-5, 1e-4, 2e-9, 0.0, 8e-13, 1.5e-12, 2e-9, 1e-6])
    seconds = amounts[:, 0] * rates[0] + np.maximum(amounts[:, 1] * rates[1], amounts[:, 2:] @ rates[2:])
    found, error = fit(amounts, seconds)
    assert np.allclose(found, rates, rtol=1e-6, atol=1e-16)
    assert error < 1e-6


def test_an_amount_that_no_cell_has_gets_no_rate() -> None:
    amounts = np.delete(works(20), 1, axis=1)
    amounts[:, 4] = 0
    times = amounts @ np.delete(RATES, 1)
    found = non_negative_fit(amounts, times, times)
    assert found[4] == 0
    assert np.allclose(found[:4], np.delete(RATES, 1)[:4])
