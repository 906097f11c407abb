"""``distattn bench scaling``: predicted efficiency of every schedule on clusters that are not here. Needs no device.

Nodes of 8 GPUs on NVLink with 400 Gb/s a GPU between nodes, LongCA-bench's shapes and masks. Kernel rates, and the links in a
node, are measured ones where there is a calibration; the links between nodes are those of the data sheet at 90 %. Everything
here is simulated, and says so.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from distattn.bench.context import predicted_hardware
from distattn.bench.context_cases import HEAD_DIM, LONGCA_HEADS, LONGCA_KV_HEADS, Case, check_mask
from distattn.bench.context_predict import predict_case
from distattn.bench.masks import LONGCA_MASKS
from distattn.bench.options import Commit, names, parts, positive_integers
from distattn.bench.record import Record, environment
from distattn.errors import ConfigError, PlanError
from distattn.parallel.hardware import Hardware
from distattn.parallel.schedulers import SCHEDULERS

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def scaling_command(
    json_path: Annotated[Path, typer.Option("--json", help="Results; cells found there are not predicted again.")],
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, comma-separated.")] = "8,32,128,512",
    tokens_per_rank: Annotated[int, typer.Option(help="Tokens a rank.")] = 8192,
    masks: Annotated[str, typer.Option(help="Masks, comma-separated (default: all 12).")] = "",
    strategies: Annotated[str, typer.Option(help="Strategies, comma-separated (default: all).")] = "",
    calibration: Annotated[Path | None, typer.Option(help="Measured rates (default: this machine's, or a preset).")] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds after which no further cell begins.")] = 1e9,
    commit: Commit = "",
) -> None:
    """Predict forward + backward efficiency by schedule, mask and ranks."""
    hardware = predicted_hardware(calibration, "cuda")
    numbers = positive_integers("ranks", ranks)
    if not numbers or tokens_per_rank < 1:
        raise ConfigError(f"--ranks is {ranks!r} and --tokens-per-rank {tokens_per_rank}: give positive whole numbers")
    chosen = parts(masks) or list(LONGCA_MASKS)
    for name in chosen:
        check_mask(name)
    schedules = names("strategies", strategies, list(SCHEDULERS))
    about = {"simulated": True, "hardware": repr(hardware), "tokens_per_rank": tokens_per_rank}
    record = Record(json_path, environment(commit), about)
    deadline = time.monotonic() + time_limit
    for size in numbers:
        for mask in chosen:
            missing = [name for name in schedules if f"{mask}|{size}|{name}" not in record]
            if missing and time.monotonic() < deadline:
                _predict(record, Case(mask, size * tokens_per_rank), size, missing, hardware)
    print(table(record.results, numbers, schedules))


def _predict(record: Record, case: Case, ranks: int, schedules: list[str], hardware: Hardware) -> None:
    """All strategies of one mask and number of ranks."""
    mask = case.build()
    for name in schedules:
        began = time.perf_counter()
        try:
            found = predict_case(case, mask, name, ranks, hardware)
        except PlanError as error:
            record.add(f"{case.mask}|{ranks}|{name}", {"refused": str(error)})
            continue
        entry = {
            "efficiency": found.efficiency,
            "milliseconds": 1e3 * found.seconds,
            "exposed_milliseconds": 1e3 * found.exposed_seconds,
            "imbalance": found.forward.cost.imbalance,
            "layout": found.layout,
            "peak_memory_bytes": found.peak_memory_bytes,
            "plan_seconds": time.perf_counter() - began,
        }
        record.add(f"{case.mask}|{ranks}|{name}", entry)


def table(results: dict[str, Any], ranks: list[int], schedules: list[str]) -> str:
    """Markdown: predicted efficiency, a row for each mask and number of ranks; the best of each row in bold."""
    shape = f"{LONGCA_HEADS}:{LONGCA_KV_HEADS} heads of {HEAD_DIM}"
    lines = [
        f"Predicted, not measured: {shape}, forward + backward, share of the ideal.",
        "",
        "| mask | ranks | " + " | ".join(schedules) + " |",
        "|---|---|" + "---|" * len(schedules),
    ]
    for mask in dict.fromkeys(key.split("|")[0] for key in results):
        for size in ranks:
            cells = [results.get(f"{mask}|{size}|{name}", {}) for name in schedules]
            best = max((cell["efficiency"] for cell in cells if "efficiency" in cell), default=None)
            texts = ["–" if "efficiency" not in cell else f"{cell['efficiency']:.2f}" for cell in cells]
            bold = [f"**{t}**" if cell.get("efficiency") == best else t for t, cell in zip(texts, cells)]
            if best is not None:
                lines.append(f"| {mask} | {size} | " + " | ".join(bold) + " |")
    return "\n".join(lines)
