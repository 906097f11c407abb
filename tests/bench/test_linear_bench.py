"""``distattn bench linear`` at tiny sizes on the CPU: kernels, lengths, exchanges over two ranks, table and picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from distattn.bench import linear, linear_ranks
from distattn.bench.linear_problem import LinearProblem, LinearShape, errors, fla, ours, parse_shapes
from distattn.bench.linear_report import draw, table
from distattn.bench.linear_timing import MOST_PAUSE_CYCLES, PAUSE_CYCLES, Clock, quantiles
from distattn.bench.record import Record
from distattn.cli.bench import bench
from distattn.errors import ConfigError, UnsupportedError
from distattn.testing import run_ranks

TINY = LinearShape("gated_delta", 1, 80, 2, 8)


def entry(ms: float, **more: Any) -> dict[str, Any]:
    return {"forward_ms": [ms, ms, ms], "train_ms": [3 * ms, 3 * ms, 3 * ms], **more}


RESULTS = {
    "kernel|gla B1 T4096 H2 D16": {"ours": entry(1.0), "fla": entry(1.5)},
    "kernel|kda B1 T4096 H2 D16": {"ours": entry(1.0, wrong=True), "fla": {"not_run": "is not here"}},
    "length|gla B1 T1000 H2 D16": {"ours": entry(2.0)},
    "ranks 2|gla B1 T64 H2 D16": {"alone": entry(2.0), "all_scan": entry(2.5), "fla_cp": {"not_run": "has none"}},
}


def test_quantiles_and_turns() -> None:
    assert quantiles([float(x) for x in range(11)]) == [2.0, 5.0, 8.0]
    assert quantiles([3.0]) == [3.0, 3.0, 3.0]
    order: list[str] = []
    calls: dict[str, Callable[[], object]] = {name: partial(order.append, name) for name in "ab"}
    times = Clock("cpu").in_turn(calls, 0.0)
    assert order == ["a", "a", "b", "b", *"ababab"]
    assert [len(found) for found in times.values()] == [3, 3]


class _Event:
    """Of a device that begins once ``pauses`` holds a long one: before, the host is late, and the call seems to take longer."""

    pauses: ClassVar[list[int]] = []

    def __init__(self, enable_timing: bool) -> None: ...

    def record(self) -> None: ...

    def query(self) -> bool:
        return self.pauses[-1] < 4 * PAUSE_CYCLES

    def elapsed_time(self, _: Any) -> float:
        return 9.0 if self.query() else 1.0


def test_a_device_that_waited_is_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, fake in (("Event", _Event), ("synchronize", list), ("_sleep", _Event.pauses.append)):
        monkeypatch.setattr(torch.cuda, name, fake)
    clock, calls = Clock("cpu"), []
    clock.cuda = True
    assert clock.once_ms(partial(calls.append, 1)) == 1.0
    assert _Event.pauses == [PAUSE_CYCLES, 2 * PAUSE_CYCLES, 4 * PAUSE_CYCLES]
    assert clock.once_ms(partial(calls.append, 1)) == 1.0
    assert _Event.pauses[3:] == [4 * PAUSE_CYCLES]
    assert len(calls) == 4

    _Event.pauses.clear()
    clock.pause_cycles = PAUSE_CYCLES
    # Ranks make a call as often as each other: its time stands, and later calls wait longer.
    assert [clock.once_ms(partial(calls.append, 1), meet=list) for _ in range(3)] == [9.0, 9.0, 1.0]
    assert _Event.pauses == [PAUSE_CYCLES, 2 * PAUSE_CYCLES, 4 * PAUSE_CYCLES]

    monkeypatch.setattr(_Event, "query", lambda _: True)
    assert clock.once_ms(list) == 9.0
    assert clock.pause_cycles == MOST_PAUSE_CYCLES


def test_errors_are_those_of_the_call() -> None:
    found = errors(TINY, ours(TINY), "cpu")
    assert list(found) == ["o", "dq", "dk", "dv", "dg", "dbeta"]
    assert max(found.values()) < 1e-5

    def spoiled(*tensors: Any) -> torch.Tensor:
        return 1.1 * ours(TINY)(*tensors)

    assert min(errors(TINY, spoiled, "cpu").values()) > 0.05
    assert linear.is_wrong(errors(TINY, spoiled, "cpu"))


def test_inputs_are_the_same_for_all() -> None:
    first, again = (LinearProblem.make(TINY, "cpu") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.leaves, again.leaves, strict=True))
    assert len(first.leaves) == 5
    assert len(LinearProblem.make(LinearShape("retention", 1, 8, 2, 8), "cpu").leaves) == 3


def test_options_that_are_wrong() -> None:
    assert parse_shapes("1x8x2x16, 2x4x1x8", ["gla"]) == [LinearShape("gla", 1, 8, 2, 16), LinearShape("gla", 2, 4, 1, 8)]
    with pytest.raises(ConfigError, match="it takes BATCHxTOKENSxHEADSxDIM such as 1x65536x16x128"):
        parse_shapes("1x8x2", ["gla"])
    with pytest.raises(ConfigError, match="--kinds has 'mamba'; it may have linear, lightning"):
        bench(["linear", "--json", "unused.json", "--kinds", "mamba"])
    if not _has_fla():
        with pytest.raises(UnsupportedError, match="pip install flash-linear-attention"):
            fla(TINY)


def _has_fla() -> bool:
    try:
        import fla  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    return True


def test_table_and_picture(tmp_path: Path) -> None:
    lines = table(RESULTS).splitlines()
    row = next(line for line in lines if line.startswith("gla B1 T4096"))
    assert " ".join(row.split()) == "gla B1 T4096 H2 D16 1.000 / 3.000 1.500 / 4.500 1.500 / 1.500"
    assert next(line for line in lines if line.startswith("kda")).count("n/a") == 6
    assert "6000.0" in next(line for line in lines if line.startswith("gla B1 T1000"))
    assert any("all_scan" in line and "7.500 ms, 1.250 of alone" in line for line in lines)
    assert "not_run fla_cp: has none" in lines
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    draw(RESULTS, {"device": "here", "torch": "2"}, tmp_path / "linear.png")
    assert (tmp_path / "linear.png").stat().st_size > 10_000
    with pytest.raises(UnsupportedError, match="there is nothing to draw"):
        draw({"kernel|gla B1 T4 H2 D16": {"ours": {"not_run": "no"}}}, {}, tmp_path / "none.png")


def test_ranks_that_are_cut_short_leave_what_they_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(argv: list[str], ranks: int, **_: Any) -> int:
        lines = [{"alone": {"error": 0.0}}, {"alone": {"error": 0.0, "forward_ms": [1.0, 1.0, 1.0]}}]
        written = Path(json.loads(Path(argv[-1]).read_text())["results"])
        written.write_text("".join(json.dumps({"key": TINY.key, "engines": line}) + "\n" for line in lines))
        return 143

    monkeypatch.setattr(linear, "launch_local", killed)
    record = Record(tmp_path / "linear.json", {"device": "here"})
    linear.run_ranks(record, [TINY, replace(TINY, tokens=90)], ["alone"], 2, 0.0, "cpu", float("inf"))
    (cell,) = record.results.values()
    assert cell["alone"]["forward_ms"] == [1.0, 1.0, 1.0]
    assert "ended with status 143" in cell["ranks"]["failed"]


def long_stream(rank: int, world: int) -> list[dict[str, dict[str, Any]]]:
    """What a rank yields of a stream that no device has room for, beside a peer that is wrong."""
    linear_ranks.init_from_environment = lambda *_, **__: (rank, world)  # pyright: ignore[reportAttributeAccessIssue]
    linear_ranks.CHECKED_TOKENS = 0
    ranks = linear_ranks.Ranks(linear_ranks.Settings("", "cpu", [], ["alone", "all_scan", "auto", "fla_cp"], 0.0, 0.0))
    engine = ranks.engine

    def with_peer(name: str, shape: LinearShape) -> Any:
        if name != "fla_cp":
            return engine(name, shape)
        return lambda *tensors: 1.1 * engine("auto", shape)(*tensors)

    ranks.engine = with_peer
    return [json.loads(json.dumps(cell)) for cell in ranks.cell(replace(TINY, tokens=20))]


def test_long_streams_are_compared_with_the_first_exchange() -> None:
    for cells in run_ranks(long_stream, 2):
        assert ["train_ms" in cell["auto"] for cell in cells] == [False, False, True]
        last = cells[-1]
        assert "error" not in last["alone"]
        assert "error" not in last["all_scan"]
        assert {last[name]["checked_against"] for name in ("auto", "fla_cp")} == {"all_scan"}
        assert not last["auto"]["wrong"]
        assert last["fla_cp"]["wrong"]
        assert last["fla_cp"]["error"] == pytest.approx(0.1, rel=0.1)


def test_the_command(tmp_path: Path) -> None:
    path = tmp_path / "linear.json"
    args = ["linear", "--json", str(path), "--seconds", "0", "--kinds", "gated_delta", "--commit", "x"]
    more = ["--parts", "kernels,lengths,exchanges", "--shapes", "1x80x2x8", "--lengths", "64", "--tokens", "40", "--heads", "2"]
    for _ in range(2):  # the second time everything is there
        with pytest.raises(SystemExit) as stop:
            bench([*args, *more, "--ranks", "2", "--engines", "alone,all_scan,two_level,fla_cp"])
        assert stop.value.code == 0
    results = json.loads(path.read_text())["results"]
    assert list(results) == [
        "kernel|gated_delta B1 T80 H2 D8", "length|gated_delta B1 T64 H2 D16", "ranks 2|gated_delta B1 T40 H2 D16",
    ]  # fmt: skip
    mine = results["kernel|gated_delta B1 T80 H2 D8"]["ours"]
    assert mine["kernel"] == "torch"
    assert not mine["wrong"]
    ranks = results["ranks 2|gated_delta B1 T40 H2 D16"]
    assert "error" not in ranks["alone"]
    if not _has_fla():
        assert "pip install flash-linear-attention" in ranks["fla_cp"]["not_run"]
    for exchange in ("all_scan", "two_level"):
        assert ranks[exchange]["error"] < 1e-5
        assert ranks[exchange]["checked_against"] == "one device"
        assert len(ranks[exchange]["train_ms"]) == 3
