"""Plan only: the figures in docs/linear.md are those of the records that it names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from distattn.kernels.linear import KINDS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "linear.md").read_text(encoding="utf-8")
MEASURED = PAGE.split("\n## Measure it\n")[1].split("\n## ")[0]


def record(name: str) -> dict[str, Any]:
    """Results of a record that the page names."""
    file = f"linear-{name}-h200.json" if "x" not in name else f"linear-{name}.json"
    assert file in MEASURED
    return json.loads((ROOT / "benchmarks" / "results" / file).read_text())["results"]


def rows(heading: str) -> dict[str, list[str]]:
    """Cells of the table whose first row begins so, by its first column."""
    lines = MEASURED[MEASURED.index(heading) :].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {first.replace("`", ""): rest for first, *rest in cells}


def median(cell: dict[str, Any], engine: str, direction: str = "train") -> float:
    return cell[engine][f"{direction}_ms"][1]


def test_times_beside_fla() -> None:
    found = {}
    for name in ("kernels", "kernels-kda"):
        for key, cell in record(name).items():
            found[key.split("|")[1].split(" ")[0]] = cell
    table = rows("| | ours | fla |")
    assert set(table) == set(found) == set(KINDS)
    for kind, cell in found.items():
        ours, fla = ([median(cell, name, way) for way in ("forward", "train")] for name in ("ours", "fla"))
        ratios = [b / a for a, b in zip(ours, fla, strict=True)]
        assert table[kind] == [f"{a:.2f} / {b:.2f}" for a, b in (ours, fla, ratios)]
        assert not any(engine["wrong"] for engine in cell.values())


def test_times_by_length() -> None:
    found = record("lengths") | record("lengths-kda")
    times: dict[str, dict[int, float]] = {}
    memory = {}
    for key, cell in found.items():
        kind, _, tokens, *_ = key.split("|")[1].split(" ")
        times.setdefault(kind, {})[int(tokens[1:])] = 1e6 * median(cell, "ours") / int(tokens[1:])
        memory[kind] = cell["ours"]["peak_memory_bytes"] / 1e9
    table = rows("| tokens | 8,192 |")
    assert set(table) == set(times) == set(KINDS)
    for kind, by_tokens in times.items():
        assert table[kind] == [*(f"{by_tokens[n]:.1f}" for n in (8192, 65536, 1048576)), f"{memory[kind]:.1f}"]
        short, middle, long = (by_tokens[n] for n in (8192, 65536, 1048576))
        assert abs(long / middle - 1) < 0.06
        assert max(short, middle, long) / min(short, middle, long) < 1.09 / 0.91  # within 9 % of one value
        if kind not in ("linear", "lightning", "retention"):
            assert max(short, middle, long) < 1.1 * min(short, middle, long)
    text = re.sub(r"\s+", " ", MEASURED)
    for tokens, said in (
        (65536, "{:.2f} (`linear`), {:.2f} and {:.2f} times"),
        (1048576, "a million {:.2f}, {:.2f} and {:.2f} times"),
    ):
        ratios = [times[kind][8192] / times[kind][tokens] for kind in ("linear", "lightning", "retention")]
        assert said.format(*ratios) in text


@pytest.mark.parametrize("kind", ["gla", "gated_delta"])
def test_exchanges(kind: str) -> None:
    shown = rows("| GPUs, tokens a rank |")
    found = record("ranks-h200x2") | record("ranks-h200x4")
    for i, (ranks, tokens) in enumerate([(2, 65536), (2, 524288), (4, 65536), (4, 8192)]):
        key = f"ranks {ranks}|{kind} B1 T{tokens} H16 D128"
        if key not in found:
            assert shown[f"{kind}, best exchange"][i] == shown[f"{kind}, auto"][i] == "not timed"
            continue
        alone = median(found[key], "alone")
        over = {name: median(found[key], name) / alone for name in found[key] if name != "alone"}
        assert shown[f"{kind}, best exchange"][i] == f"{min(over.values()):.3f}"
        assert shown[f"{kind}, auto"][i] == f"{over['auto']:.3f}"


def test_context_parallelism_of_fla() -> None:
    (cell,) = record("ranks-fla-h200x2").values()
    times = {name: (median(cell, name), median(cell, name, "forward")) for name in ("fla_cp", "auto")}
    said = "takes {:.1f} ms where `auto` takes {:.1f} (forward {:.1f} and {:.1f})"
    train, forward = zip(*times.values(), strict=True)
    text = re.sub(r"\s+", " ", MEASURED)
    assert said.format(*train, *forward) in text
    assert f"{train[0] / train[1]:.2f} times as fast" in text
    assert f"takes {median(cell, 'auto') / median(cell, 'alone'):.3f} times over two" in text
