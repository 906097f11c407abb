"""The results of ``distattn bench context``: a JSON file that every finished cell is in, its table and its picture."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distattn.bench.context_peers import PEERS
from distattn.errors import ConfigError

IDEAL = "ideal"
MAX_AUTO_LOSS = 0.05
"""By how much the automatic choice may be slower than the best strategy."""

_COMPARED = ("device", "commit", "ranks", "kernel", "torch")


@dataclass(eq=False)
class Report:
    """environment: of the run, as JSON; results: "case|engine" → cell; running: the cell under way, if any."""

    path: Path
    environment: dict[str, Any]
    results: dict[str, dict[str, Any]]
    running: str | None = None

    @classmethod
    def begin(cls, path: Path, environment: dict[str, Any]) -> Report:
        """Go on with the cells of the same device, commit and settings in ``path``, or begin anew. What failed is tried again.

        ConfigError: the file is something else.
        """
        results: dict[str, dict[str, Any]] = {}
        if path.exists():
            before = cls.read(path)
            if all(before.environment.get(key) == environment.get(key) for key in _COMPARED):
                results = {key: cell for key, cell in before.results.items() if "failed" not in cell}
        path.parent.mkdir(parents=True, exist_ok=True)
        report = cls(path, environment, results)
        report.save()
        return report

    @classmethod
    def read(cls, path: Path) -> Report:
        try:
            saved = json.loads(path.read_text())
            return cls(path, saved["environment"], saved["results"], saved.get("running"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} holds no results of distattn bench context: {error}") from error

    def save(self) -> None:
        part = self.path.with_name(self.path.name + ".part")
        entries = {"environment": self.environment, "running": self.running, "results": self.results}
        part.write_text(json.dumps(entries, indent=1) + "\n")
        part.replace(self.path)

    def cases(self) -> list[str]:
        return list(dict.fromkeys(key.split("|")[0] for key in self.results))

    def engines(self) -> list[str]:
        """In the order of the table: ideal, ours, peers."""
        names = dict.fromkeys(key.split("|")[1] for key in self.results)
        return sorted(names, key=lambda name: (name != IDEAL, name in PEERS))

    def cell(self, case: str, engine: str) -> dict[str, Any]:
        return self.results.get(f"{case}|{engine}", {"refused": "not run"})

    def efficiency(self, case: str, engine: str) -> float | None:
        """Ideal time over the slowest rank's forward and backward, 1 at best; None for an empty or wrong cell.

        The ideal is the slowest device's too: ranks share work evenly, and GPUs of one kind differ by several percent.
        """
        ideal, cell = self.cell(case, IDEAL), self.cell(case, engine)
        if not is_measured(ideal) or not is_measured(cell):
            return None
        return slowest_ms(ideal) / int(self.environment["ranks"]) / slowest_ms(cell)


def is_measured(cell: dict[str, Any]) -> bool:
    return "total_ms" in cell and not cell["wrong"]


def slowest_ms(cell: dict[str, Any]) -> float:
    """Forward + backward of the slowest rank in each repeat, median over repeats."""
    return statistics.median(max(times) for times in zip(*cell["total_ms"], strict=True))


def tflops(cell: dict[str, Any], direction: str, *, alone: bool = False) -> float:
    """LongCA-bench's number, per GPU: FLOPs over the milliseconds summed over ranks, of every group of ranks that did all of
    them at once. alone: each rank was such a group."""
    times = [statistics.median(times) for times in cell[f"{direction}_ms"]]
    copies = len(times) if alone else cell.get("copies", 1)
    return cell[f"{direction}_flops"] * copies / sum(times) / 1e9


def table(report: Report) -> str:
    """Forward/backward TFLOP/s per GPU and efficiency, a line for each case; then why cells are empty."""
    engines = report.engines()
    width = max([10, *(len(case) for case in report.cases())]) + 2
    lines = ["TFLOP/s per GPU forward/backward by exact area, and the share of the ideal (one GPU's time ÷ ranks)"]
    lines.append(" " * width + "".join(f"{engine:>21s}" for engine in engines))
    for case in report.cases():
        texts = [_text(report, case, engine) for engine in engines]
        lines.append(f"{case:{width}s}" + "".join(f"{text:>21s}" for text in texts))
    reasons = {
        f"n/a {engine}: {cell['refused']}"
        for case in report.cases()
        for engine in engines
        if (cell := report.cell(case, engine)).get("refused", "not run") != "not run"
    }
    failures = [f"failed {key}: {cell['failed']}" for key, cell in report.results.items() if "failed" in cell]
    return "\n".join([*lines, *sorted(reasons), *failures, *_summary(report), "! = wrong result"])


def _text(report: Report, case: str, engine: str) -> str:
    cell = report.cell(case, engine)
    if "refused" in cell:
        return "n/a"
    if "failed" in cell:
        return "failed"
    alone = engine == IDEAL
    rates = f"{tflops(cell, 'forward', alone=alone):.0f}/{tflops(cell, 'backward', alone=alone):.0f}"
    if cell["wrong"]:
        return rates + "!"
    share = report.efficiency(case, engine)
    return rates if share is None or engine == IDEAL else f"{rates} {share:.3f}"


def markdown(report: Report) -> str:
    """The table for a page: a row a case, TFLOP/s of the ideal, then the share of it of every engine; the best in bold."""
    engines = [engine for engine in report.engines() if engine != IDEAL]
    engines = [engine for engine in engines if any(is_measured(report.cell(case, engine)) for case in report.cases())]
    lines = ["| case | one GPU, TFLOP/s | " + " | ".join(f"`{x}`" for x in engines) + " |", "|---" * (2 + len(engines)) + "|"]
    for case in report.cases():
        shares = {engine: report.efficiency(case, engine) for engine in engines}
        if not any(shares.values()):
            continue
        most = max(share for share in shares.values() if share)
        texts = [_share_text(report, case, engine, shares[engine], most) for engine in engines]
        lines.append(f"| {case} | {_text(report, case, IDEAL).replace('/', ' / ')} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _share_text(report: Report, case: str, engine: str, share: float | None, most: float) -> str:
    if share is None:
        cell = report.cell(case, engine)
        return "n/a" if cell.get("refused", "not run") != "not run" else "failed" if "failed" in cell else ""
    return f"**{share:.3f}**" if share == most else f"{share:.3f}"


def ours(report: Report) -> list[str]:
    return [engine for engine in report.engines() if engine != IDEAL and engine not in PEERS]


def best(report: Report, case: str, engines: Iterable[str]) -> tuple[str, float] | None:
    """(engine, milliseconds of its slowest rank) of the fastest right cell."""
    cells = {engine: report.cell(case, engine) for engine in engines}
    times = {engine: slowest_ms(cell) for engine, cell in cells.items() if is_measured(cell)}
    return min(times.items(), key=lambda entry: entry[1]) if times else None


def speedups(report: Report) -> dict[str, float]:
    """Per case that a peer computes: its best peer's time over our best."""
    found = {}
    for case in report.cases():
        mine, theirs = best(report, case, ours(report)), best(report, case, PEERS)
        if mine and theirs:
            found[case] = theirs[1] / mine[1]
    return found


def _summary(report: Report) -> list[str]:
    lines = []
    over = speedups(report)
    if over:
        mean = math.exp(statistics.fmean(math.log(x) for x in over.values()))
        below = [f"{case} {x:.2f}" for case, x in over.items() if x < 1]
        lines.append(f"ours over the best peer, {len(over)} cases: geometric mean {mean:.2f}" + "; below 1: " * bool(below))
        lines[-1] += ", ".join(below)
    errors = prediction_errors(report)
    if errors:
        worst = max(errors, key=lambda key: abs(errors[key]))
        typical = statistics.median(abs(x) for x in errors.values())
        lines.append(
            f"predicted against measured, {len(errors)} cells: median error {typical:.1%}, worst {errors[worst]:+.1%} ({worst})"
        )
    for case, (loss, fastest) in auto_losses(report).items():
        if loss > MAX_AUTO_LOSS:
            took = report.cell(case, "auto")["details"]["strategy"]
            lines.append(f"auto took {took} for {case}, {loss:.1%} slower than {fastest}")
    return lines


def auto_losses(report: Report) -> dict[str, tuple[float, str]]:
    """Per case: by how much auto was slower than the best strategy (negative: faster), and which that was.

    Strategies as auto may take them: what keeps keys for the backward costs memory that nobody offered.
    """
    strategies = [name for name in ours(report) if name != "auto" and "+" not in name]
    found = {}
    for case in report.cases():
        chosen, fastest = report.cell(case, "auto"), best(report, case, strategies)
        if is_measured(chosen) and fastest:
            found[case] = slowest_ms(chosen) / fastest[1] - 1, fastest[0]
    return found


def prediction_errors(report: Report) -> dict[str, float]:
    """Per right cell with a prediction: predicted over measured − 1, forward + backward."""
    return {
        key: cell["predicted_ms"] / slowest_ms(cell) - 1
        for key, cell in report.results.items()
        if "predicted_ms" in cell and is_measured(cell)
    }


def plot(report: Report, path: Path) -> None:
    """A bar for each engine and case: the share of the ideal."""
    from matplotlib.figure import Figure

    cases = report.cases()
    engines = [name for name in report.engines() if name != IDEAL and any(report.efficiency(case, name) for case in cases)]
    figure = Figure(figsize=(max(8.0, 1.1 * len(cases)), 4.5), layout="constrained")
    axes = figure.add_subplot()
    for i, engine in enumerate(engines):
        shares = [report.efficiency(case, engine) or 0.0 for case in cases]
        places = [x + 0.85 * (i + 0.5) / len(engines) - 0.425 for x in range(len(cases))]
        axes.bar(places, shares, 0.8 / len(engines), label=engine, hatch="//" if engine in PEERS else None)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(cases)), cases, rotation=30, ha="right", fontsize=8)
    axes.set_ylabel("share of one GPU's time ÷ ranks")
    axes.set_title(f"{report.environment['ranks']} × {report.environment['device']}, forward + backward; hatched: peers")
    figure.legend(loc="outside lower center", fontsize=7, ncols=4)
    figure.savefig(path, dpi=150)
