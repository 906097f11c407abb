"""The simulation of disaggregated attention: what it draws and counts, and its command at a tiny size."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from distattn.bench import cad_forecast, cad_links, cad_measure, cad_plans, cad_simulation
from distattn.bench.cad_calibration import calibrate, read_steps
from distattn.bench.cad_layers import MODELS, LayerTime, ModelShape, measure
from distattn.bench.cad_model import (
    RANK_TOKENS,
    Setting,
    baseline_seconds,
    cad_seconds,
    dealt_by_tokens,
    group_seconds,
    packed_by_work,
    prices,
)
from distattn.bench.cad_pipeline import pipeline_seconds, pipeline_tokens
from distattn.bench.cad_simulation import cost_of_turns, draw_batch, layer_time, table
from distattn.bench.disaggregation_cases import MIXES
from distattn.bench.disaggregation_report import slowest
from distattn.errors import ConfigError
from distattn.parallel.hardware import HARDWARE

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
TINY = ModelShape("tiny", 64, 8, 8, 16, 128, 2)


def setting(linear_s: float = 1e-9) -> Setting:
    """Without measured kernel rates, so that attention is proportional to its pairs."""
    return Setting(MODELS["8b"], HARDWARE["h100"], LayerTime(linear_s, 2 * linear_s))


def test_linear_layers_of_the_two_models_have_the_papers_ratio_to_attention() -> None:
    """Attention equals the rest at 53K tokens for the 8B model."""
    shape = MODELS["8b"]
    assert shape.linear_flops / (2 * shape.heads * shape.head_dim) == pytest.approx(53_000, rel=0.01)


def test_batches_fill_their_tokens_with_documents_up_to_the_context() -> None:
    for mix in ("pretrain", "prolong"):
        documents = draw_batch(mix, 262_144, 1 << 20, 3)
        assert sum(documents) == 1 << 20
        assert min(documents) > 0
        assert max(documents) <= 262_144
        assert documents == draw_batch(mix, 262_144, 1 << 20, 3)


def test_packing_keeps_documents_whole_and_within_memory() -> None:
    documents = draw_batch("pretrain", 131_072, 8 * RANK_TOKENS, 0)
    groups = packed_by_work(documents, 4, 1.2 * 2 * RANK_TOKENS, setting())
    assert groups is not None
    assert sorted(itertools.chain(*groups)) == sorted(documents)
    assert max(map(sum, groups)) <= 1.2 * 2 * RANK_TOKENS
    assert packed_by_work([100], 4, 50, setting()) is None
    halves = dealt_by_tokens(documents, 2)
    assert sorted(itertools.chain(*halves)) == sorted(documents)
    assert abs(sum(halves[0]) - sum(halves[1])) <= max(documents)


def test_equal_documents_gain_nothing_and_one_giant_does() -> None:
    """Where packing is perfect, balancing cannot win; where one document is most of the work, it does."""
    even = [RANK_TOKENS] * 8
    price = prices(even, setting())
    base, context = baseline_seconds(even, 8, setting(), price)
    assert context == 1
    assert base == pytest.approx(sum(group_seconds([RANK_TOKENS], 1, setting(), price)))
    assert cad_seconds(even, 8, setting(), price).seconds >= 0.99 * base
    giant = [3 * RANK_TOKENS, *[RANK_TOKENS // 64] * (5 * 64)]
    base, context = baseline_seconds(giant, 8, setting(), price)
    found = cad_seconds(giant, 8, setting(), price)
    assert context >= 4
    assert found.seconds < base
    assert found.imbalance <= 1.0501


def test_a_pipeline_of_uneven_microbatches_gains() -> None:
    documents = draw_batch("pretrain", 131_072, pipeline_tokens(4, 2), 0)
    base, ours, exposed, imbalance, _ = pipeline_seconds(documents, 4, 2, setting(), (None, None))
    assert 0 <= exposed < ours < base
    assert imbalance <= 1.0501


def test_commands_write_what_the_next_one_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times, results = tmp_path / "layers.json", tmp_path / "cad.json"
    for shapes in (MODELS, cad_measure.MODELS, cad_simulation.MODELS):
        monkeypatch.setitem(shapes, "8b", TINY)
    arguments = ["--json", str(times), "--models", "8b", "--tokens", "8,16", "--seconds", "0.001"]
    done = CliRunner().invoke(cad_measure.app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert set(json.loads(times.read_text())["results"]) == {"8b|8", "8b|16"}
    assert layer_time("8b", times).forward_s > 0
    monkeypatch.setitem(cad_simulation.CASES, "flat", (("8b", 16, 128),))
    arguments = ["--json", str(results), "--layers", str(times), "--kinds", "flat", "--mixes", "prolong", "--batches", "2"]
    done = CliRunner().invoke(cad_simulation.app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    found = json.loads(results.read_text())
    (cell,) = found["results"].values()
    assert found["simulated"]
    assert cell["speed_up_least"] <= cell["speed_up"] <= cell["speed_up_most"]
    assert "| no pipeline | 8b | 16 | 128K | prolong |" in table(found["results"])
    assert "1.05–1.12" in table(found["results"])
    with pytest.raises(ConfigError, match="has results with linear_layers = "):
        CliRunner().invoke(cad_simulation.app, ["--json", str(results)], catch_exceptions=False)


def test_measured_steps_say_what_turns_cost(tmp_path: Path) -> None:
    def cell(seconds: float, silent: float) -> dict[str, object]:
        return {"seconds": [[seconds] * 3], "silent_seconds": [[silent] * 3], "rows": [[8]], "wrong": False}

    steps = tmp_path / "steps.json"
    results = {"64|a|disaggregated_ping_pong": cell(1.04, 1.0), "64|a|disaggregated": cell(1.1, 1.0)}
    results |= {"64|b|disaggregated_ping_pong": cell(3.06, 3.0), "64|b|disaggregated": cell(3.2, 3.0), "64|b|ring": cell(1, 1)}
    steps.write_text(json.dumps({"results": results}))
    assert cost_of_turns([steps]) == pytest.approx(1.03)
    documents = draw_batch("pretrain", 131_072, pipeline_tokens(4, 2), 0)
    plain, slower = (
        pipeline_seconds(documents, 4, 2, replace(setting(), turns=turns), (None, None))[1] for turns in (1.0, 1.03)
    )
    assert plain < slower <= 1.0301 * plain
    results["64|a|disaggregated"] = {"seconds": [[1.04] * 3], "waited_seconds": [[0.02] * 3], "wrong": False}
    steps.write_text(json.dumps({"results": results}))
    assert cost_of_turns([steps]) == pytest.approx((1.04 / 1.02 + 1.02) / 2)
    results["64|c|disaggregated_ping_pong"], results["64|c|auto"] = cell(3.3, 3.0), cell(3.0, 3.0)
    results["64|d|disaggregated_ping_pong"], results["64|d|auto"] = cell(9.0, 3.0), {**cell(3.0, 3.0), "rows": [[4, 4]]}
    steps.write_text(json.dumps({"results": results}))
    assert cost_of_turns([steps]) == pytest.approx(1.02)
    steps.write_text(json.dumps({"results": {"64|a|ring": cell(1, 1)}}))
    with pytest.raises(ConfigError, match="no steps with and without ping-pong"):
        cost_of_turns([steps])


def test_measured_steps_calibrate_linear_layers_and_attention(tmp_path: Path) -> None:
    """Factors that were put into steps come out of them; a disaggregated step that takes 5 % more is missed by that."""
    whole, place = LayerTime(1e-6, 2e-6), {"shape": "8b", "ranks": 2, "layers": 2, "kernel": "hopper", "device": "an H200"}
    engines = ("auto", "data_parallel", "ring", "disaggregated", "disaggregated_ping_pong")
    keys = [f"16384|{mix}|{engine}" for mix in ("uniform", "long_and_short") for engine in engines]
    cell = {"seconds": [[1.0]] * 2, "waited_seconds": [[0.0]] * 2, "rows": [[8], [8]], "wrong": False}
    cells = {key: {**cell, "chosen": "ring on zigzag; one nano-batch: why not"} for key in keys}
    for step in read_steps(cells, place, whole):
        cell, times = cells[f"{step.case}|{step.engine}"], 1.25 * step.linear + 1.5 * step.attention
        slower = 1.05 if step.engine == "disaggregated" else 1.0
        cell["waited_seconds"] = [[step.exposed]] * 2
        cell["seconds"] = [[slower * (seconds + step.exposed)] for seconds in times.tolist()]
    file = tmp_path / "steps.json"
    file.write_text(json.dumps({"environment": place, "results": cells}))
    fit = calibrate([file], whole)
    assert (fit.linear, fit.attention) == (pytest.approx(1.25), pytest.approx(1.5))
    assert set(fit.misses) == {key for key in keys if "ping_pong" not in key}
    for key, miss in fit.misses.items():
        assert miss == pytest.approx(1 / 1.05 - 1 if key.endswith("|disaggregated") else 0.0, abs=1e-9)
    assert "others by 2.4% (4.8%)" in str(fit)
    other = tmp_path / "four.json"
    slower = {**cells["16384|uniform|ring"], "seconds": [[1.25 * x[0]] for x in cells["16384|uniform|ring"]["seconds"]]}
    other.write_text(json.dumps({"environment": place, "results": {"16384|uniform|ring": slower}}))
    tested = calibrate([file], whole, [other])
    assert tested.misses == fit.misses
    assert tested.others == {"four.json": {"16384|uniform|ring": pytest.approx(1 / 1.25 - 1)}}
    assert str(tested).endswith("; 1 of four.json are missed by 20.0% (20.0%)")
    other.write_text(json.dumps({"environment": place, "results": {"16384|uniform|disaggregated_ping_pong": slower}}))
    with pytest.raises(ConfigError, match=r"four\.json: no measured steps in one nano-batch whose schedule is known"):
        calibrate([file], whole, [other])
    uniform = {key: cell for key, cell in cells.items() if "uniform|ring" in key}
    file.write_text(json.dumps({"environment": place, "results": uniform}))
    with pytest.raises(ConfigError, match="too little to tell linear layers from attention"):
        calibrate([file], whole)
    gone = {"16384|uniform|auto": {**cell, "chosen": "ring on tiptoe; one nano-batch"}}
    file.write_text(json.dumps({"environment": place, "results": gone}))
    with pytest.raises(ConfigError, match="today's layouts of this mix have none called tiptoe"):
        calibrate([file], whole)
    file.write_text(json.dumps({"environment": {**place, "kernel": "abacus"}, "results": cells}))
    with pytest.raises(ConfigError, match=r"^no rates came with distattn for the kernel 'abacus'"):
        calibrate([file], whole)
    file.write_text("[]")
    with pytest.raises(ConfigError, match="holds no steps of a model"):
        calibrate([file], whole)


def test_the_simulation_predicts_what_was_measured() -> None:
    """Steps of the committed records, those that the factors were not fitted to as well: of four ranks, and of a later run, in
    which the first GPU took up to 8 % longer for equal work."""
    files = [RESULTS / f"disaggregation-h200x2-{name}.json" for name in ("64k", "long")]
    later, four = (RESULTS / f"disaggregation-h200{name}.json" for name in ("x2-long-8434617", "x4"))
    fit = calibrate(files, layer_time("8b", RESULTS / "cad-layers-h200-whole.json"), [later, four])
    assert len(fit.misses) >= 36
    assert max(map(abs, fit.misses.values())) <= 0.06
    assert [len(fit.others[file.name]) for file in (later, four)] == [15, 15]
    assert max(map(abs, fit.others[four.name].values())) <= 0.06
    assert max(map(abs, fit.others[later.name].values())) <= 0.085
    assert "; 15 of disaggregation-h200x4.json are missed by " in str(fit)
    assert fit.about()["tested_misses"] == fit.others
    assert 1.0 <= fit.linear <= 1.2
    assert 1.0 <= fit.attention <= 1.2


def test_steps_are_forecast_before_they_are_measured(tmp_path: Path) -> None:
    """Of four ranks, whose steps were measured: within 6 % of them. What is committed is of the mixes that were not, too."""
    file, measured = tmp_path / "forecast.json", json.loads((RESULTS / "disaggregation-h200x4.json").read_text())["results"]
    steps = ",".join(str(RESULTS / f"disaggregation-h200x2-{name}.json") for name in ("64k", "long"))
    arguments = ["--json", str(file), "--steps", steps, "--whole-layers", str(RESULTS / "cad-layers-h200-whole.json")]
    arguments += ["--links", str(RESULTS / "links-h200x2.json"), "--ranks", "4", "--mixes", "wlb"]
    done = CliRunner().invoke(cad_forecast.app, [*arguments, "--engines", "auto,data_parallel,wlb_cp4"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "| all_gather on per_document_zigzag |" in done.output
    found = json.loads(file.read_text())
    assert found["forecast"]
    assert found["results"]["4|65536|wlb|data_parallel"]["refused"].startswith("a document of 93,645 tokens")
    step = found["results"]["4|65536|wlb|wlb_cp4"]
    assert step["seconds"] == pytest.approx(slowest(measured["65536|wlb|wlb_cp4"]["seconds"]), rel=0.06)
    assert 0 <= step["waits_seconds"] < 0.02 * step["seconds"]
    assert 1 <= step["imbalance"] < 1.05
    committed = json.loads((RESULTS / "disaggregation-forecast-h200.json").read_text())["results"]
    for ranks, mix in itertools.product((4, 8), MIXES):
        assert committed[f"{ranks}|65536|{mix}|auto"]["seconds"] > 0
    with pytest.raises(ConfigError, match="has 'disaggregated_ping_pong': it takes two nano-batches in turns"):
        CliRunner().invoke(cad_forecast.app, [*arguments, "--engines", "disaggregated_ping_pong"], catch_exceptions=False)
    with pytest.raises(ConfigError, match="--layers must be at least 1, got 0"):
        CliRunner().invoke(cad_forecast.app, [*arguments, "--layers", "0"], catch_exceptions=False)
    arguments[arguments.index("--links") + 1] = str(tmp_path / "none.json")
    with pytest.raises(ConfigError, match=r"none\.json holds no rates of links"):
        CliRunner().invoke(cad_forecast.app, arguments, catch_exceptions=False)


def test_wrong_files_and_options_are_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"results": {}}')
    with pytest.raises(ConfigError, match="holds no times of the model 8b"):
        layer_time("8b", bad)
    with pytest.raises(ConfigError, match="must divide the KV heads"):
        CliRunner().invoke(cad_measure.app, ["--json", str(bad), "--tensor-parallel", "3"], catch_exceptions=False)
    with pytest.raises(ConfigError, match="--batches must be at least 1, got 0"):
        CliRunner().invoke(cad_simulation.app, ["--json", str(bad), "--batches", "0"], catch_exceptions=False)
    with pytest.raises(ConfigError, match="--steps and --whole-layers calibrate together"):
        CliRunner().invoke(cad_simulation.app, ["--json", str(bad), "--steps", str(bad)], catch_exceptions=False)
    with pytest.raises(ConfigError, match="--tested-steps are predicted by what --steps calibrates"):
        CliRunner().invoke(cad_simulation.app, ["--json", str(bad), "--tested-steps", str(bad)], catch_exceptions=False)
    assert layer_time("34b", None).backward_s == 2 * layer_time("34b", None).forward_s


def test_a_layer_is_timed_forward_and_backward() -> None:
    found = measure(TINY, 4, 64, "cpu", 0.001)
    assert found.forward_s > 0
    assert found.backward_s > 0


def test_plans_are_counted_beside_the_published_planner(tmp_path: Path) -> None:
    file = tmp_path / "plans.json"
    arguments = ["--json", str(file), "--distributions", "prolong512k", "--ranks", "8", "--seeds", "2", "--repeats", "1"]
    done = CliRunner().invoke(cad_plans.app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "| prolong512k | 8 | 1.0" in done.output
    found = json.loads(file.read_text())["results"]
    assert set(found) == {"prolong512k|8|0", "prolong512k|8|1"}
    for cell in found.values():
        assert cad_plans.keeps(cell, 0.02)
        for change in ({"imbalance": 1.03}, {"memory_cap": "exceeded"}, {"worst_received_bytes": 1 << 60}):
            assert not cad_plans.keeps({**cell, **change}, 0.02)
    with pytest.raises(ConfigError, match="--ranks has 12: a sequence is on 8 ranks"):
        CliRunner().invoke(cad_plans.app, ["--json", str(file), "--ranks", "12"], catch_exceptions=False)


def test_slow_links_are_hidden_by_turns(tmp_path: Path) -> None:
    """At 50 GB/s between any two ranks: a third or less of what one nano-batch exposes, and less than 5 % of the step taken."""
    file = tmp_path / "links.json"
    arguments = ["--json", str(file), "--ranks", "8", "--tokens", "65536", "--mixes", "wlb"]
    done = CliRunner().invoke(cad_links.app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    for key, cell in json.loads(file.read_text())["results"].items():
        assert f"| {key.split('|')[0]} | 65,536 | 8 | 50 |" in done.output
        assert cell["one_exposed_seconds"] <= cell["contiguous_exposed_seconds"]
        assert cell["two_exposed_seconds"] <= cell["one_exposed_seconds"] / 3
        assert cell["best_seconds"] <= min(cell["one_seconds"], cell["two_seconds"], cell["other_seconds"])
        assert cell["best_exposed_seconds"] <= 0.05 * cell["best_seconds"]
    with pytest.raises(ConfigError, match="--gb-per-second must be positive, got 0"):
        CliRunner().invoke(cad_links.app, ["--json", str(file), "--gb-per-second", "0"], catch_exceptions=False)
