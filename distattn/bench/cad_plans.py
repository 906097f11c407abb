"""``distattn bench cad-plans``: how well, and how fast, attention is balanced over 8 to 256 ranks.

For each distribution of lengths, number of ranks and seed: the busiest rank over the mean and what the worst rank receives,
beside the published planner's; a memory cap at 95 % of what the plan without one holds; and the time from lengths to all tasks,
transfers and bytes, on one core. Every plan is verified, outside that time. Sequences of a million tokens, eight ranks each,
heads of Llama-3-8B.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from distattn.bench.lengths import draw, find_lengths
from distattn.bench.options import Commit, parts, positive_integers
from distattn.bench.record import Record, environment
from distattn.errors import ConfigError, PlanError
from distattn.mask import Mask
from distattn.parallel.cost import Shape, count, move_bytes
from distattn.parallel.layout import Layout
from distattn.parallel.program import Program
from distattn.parallel.schedulers.disaggregated import DisaggregatedOptions, assign, kv_row_bytes, plan
from distattn.parallel.verify import verify

SEQUENCE = 1 << 20
RANKS_A_SEQUENCE = 8
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
_SHAPE = Shape(HEAD_DIM, HEAD_DIM)
_CAP = 0.95

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    json_path: Annotated[Path, typer.Option("--json", help="Results; cells found there are not planned again.")],
    distributions: Annotated[str, typer.Option(help="Of document lengths, comma-separated.")] = "prolong512k,wlb,prolong",
    ranks: Annotated[str, typer.Option(help="Attention ranks, comma-separated: multiples of 8.")] = "8,64,256",
    seeds: Annotated[int, typer.Option(help="Draws of each; no sequence is drawn twice.")] = 8,
    tolerance: Annotated[float, typer.Option(help="How far a rank may exceed its share of the attention.")] = 0.02,
    repeats: Annotated[int, typer.Option(help="Of each plan; the median of their times counts.")] = 5,
    commit: Commit = "",
) -> None:
    """Plan, verify and count; exits with 1 where a tolerance or a cap is not kept, or the published planner receives less."""
    sizes = positive_integers("ranks", ranks)
    for size in sizes:
        if size % RANKS_A_SEQUENCE:
            raise ConfigError(f"--ranks has {size}: a sequence is on {RANKS_A_SEQUENCE} ranks, so give multiples of that")
    if seeds < 1 or repeats < 1:
        raise ConfigError(f"--seeds and --repeats must be at least 1, got {seeds} and {repeats}")
    for name in parts(distributions):
        find_lengths(name)
    record = Record(json_path, environment(commit), {"tolerance": tolerance, "sequence_tokens": SEQUENCE})
    for name in parts(distributions):
        for size in sizes:
            for seed in range(seeds):
                key = f"{name}|{size}|{seed}"
                if key not in record:
                    record.add(key, measure(name, size, seed, tolerance, repeats))
    print(table(record.results))
    raise typer.Exit(0 if all(keeps(cell, tolerance) for cell in record.results.values()) else 1)


def measure(distribution: str, ranks: int, seed: int, tolerance: float, repeats: int) -> dict[str, Any]:
    """One draw: our plan, the published planner's, and ours under a memory cap."""
    drawn = [draw(distribution, SEQUENCE, 1000 * seed + i) for i in range(ranks // RANKS_A_SEQUENCE)]
    lengths = [length for sequence in drawn for length in sequence]
    options = DisaggregatedOptions(tolerance=tolerance)
    times = [_timed(lengths, ranks, options) for _ in range(repeats)]
    program = times[0][0]
    mask = Mask.documents(lengths)
    assert verify(program, mask).area == mask.area
    ours = count(program, mask, _SHAPE)
    theirs = count(_plan(lengths, ranks, replace(options, planner="greedy")), mask, _SHAPE)
    return {
        "documents": len(lengths),
        "longest": max(lengths),
        "imbalance": ours.imbalance,
        "published_imbalance": theirs.imbalance,
        "worst_received_bytes": int(ours.bytes_received_per_rank.max()),
        "mean_received_bytes": float(ours.bytes_received_per_rank.mean()),
        "published_worst_received_bytes": int(theirs.bytes_received_per_rank.max()),
        "published_mean_received_bytes": float(theirs.bytes_received_per_rank.mean()),
        "memory_cap": _under_cap(mask, program.layout, options),
        "plan_seconds": statistics.median(seconds for _, seconds, _ in times),
        "plan_cpu_seconds": statistics.median(seconds for _, _, seconds in times),
    }


def _plan(lengths: list[int], ranks: int, options: DisaggregatedOptions) -> Program:
    total = sum(lengths)
    return plan(Mask.documents(lengths), Layout.contiguous(total, ranks), HEADS, KV_HEADS, options)


def _timed(lengths: list[int], ranks: int, options: DisaggregatedOptions) -> tuple[Program, float, float]:
    """The program, with seconds by the clock and of this thread, bytes of every transfer included."""
    wall, own = time.perf_counter(), time.thread_time()
    program = _plan(lengths, ranks, options)
    move_bytes(program, _SHAPE)
    return program, time.perf_counter() - wall, time.thread_time() - own


def _under_cap(mask: Mask, layout: Layout, options: DisaggregatedOptions) -> str:
    """What comes of a cap below what was held before: kept, refused (a plan that cannot keep it is an error) or exceeded."""
    free = assign(mask, layout, HEADS, KV_HEADS, replace(options, memory_bytes=1e15))
    assert free.usage is not None
    cap = _CAP * float(free.usage.held.max()) * kv_row_bytes(options)
    try:
        capped = assign(mask, layout, HEADS, KV_HEADS, replace(options, memory_bytes=cap))
    except PlanError:
        return "refused"
    assert capped.usage is not None
    return "kept" if float(capped.usage.held.max()) * kv_row_bytes(options) <= cap else "exceeded"


def keeps(cell: dict[str, Any], tolerance: float) -> bool:
    """Balanced, within its cap, and no more received by the worst rank than under the published planner."""
    balanced = cell["imbalance"] <= 1 + tolerance + 1e-4
    return (
        balanced and cell["memory_cap"] != "exceeded" and cell["worst_received_bytes"] <= cell["published_worst_received_bytes"]
    )


def table(results: dict[str, Any]) -> str:
    """Markdown: the worst over seeds of each, and the mean of bytes; milliseconds are the median and the most."""
    lines = [
        "| lengths | ranks | max/mean, worst | published | worst receive ÷ published: mean (worst) | mean receive ÷ published "
        "| memory cap | plan ms: median (most) | of CPU |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in dict.fromkeys(key.rsplit("|", 1)[0] for key in results):
        cells = [cell for key, cell in results.items() if key.rsplit("|", 1)[0] == case]
        worst = [cell["worst_received_bytes"] / max(cell["published_worst_received_bytes"], 1) for cell in cells]
        mean = [cell["mean_received_bytes"] / max(cell["published_mean_received_bytes"], 1) for cell in cells]
        seconds = [1e3 * cell["plan_seconds"] for cell in cells]
        caps = sorted(cell["memory_cap"] for cell in cells)
        name, size = case.split("|")
        lines.append(
            f"| {name} | {size} | {max(cell['imbalance'] for cell in cells):.4f} "
            f"| {max(cell['published_imbalance'] for cell in cells):.3f} "
            f"| {statistics.mean(worst):.2f} ({max(worst):.3f}) | {statistics.mean(mean):.2f} "
            f"| {', '.join(f'{caps.count(found)} {found}' for found in dict.fromkeys(caps))} "
            f"| {statistics.median(seconds):.0f} ({max(seconds):.0f}) "
            f"| {statistics.median(1e3 * cell['plan_cpu_seconds'] for cell in cells):.0f} |"
        )
    return "\n".join(lines)
