"""``distattn bench cad-simulation``: disaggregated attention on 64 to 512 GPUs, beside the speed-ups that its paper reports.

Simulated, and says so: kernels and linear layers as measured on one GPU, both corrected by what whole steps took on two
(``cad_calibration``), links as data sheets say, lengths as drawn from the quantiles of the paper's data. The baseline is the
paper's: documents packed by work, context parallelism, the best mixture of both for every batch. ``cad_model`` says what is
counted.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from distattn.bench.cad_calibration import Fit, calibrate, rated
from distattn.bench.cad_layers import MODELS, LayerTime
from distattn.bench.cad_model import RANK_TOKENS, TENSOR_PARALLEL, Setting, baseline_seconds, cad_seconds, prices
from distattn.bench.cad_pipeline import pipeline_seconds, pipeline_tokens
from distattn.bench.disaggregation_report import cases, is_measured, slowest, without_transfers
from distattn.bench.lengths import DISTRIBUTIONS
from distattn.bench.options import Commit, names, parts
from distattn.bench.record import Record, check_settings, environment
from distattn.errors import ConfigError
from distattn.kernels.selection import shipped_rates
from distattn.parallel.hardware import HARDWARE, Hardware

CASES = {
    # (model, GPUs, context): without a pipeline, then with one of 4 stages
    "flat": (("8b", 64, 128), ("8b", 128, 256), ("8b", 256, 512), ("34b", 64, 128), ("34b", 128, 256), ("34b", 256, 512)),
    "pipeline": (("8b", 64, 128), ("8b", 128, 256), ("8b", 256, 512), ("34b", 128, 128), ("34b", 256, 256), ("34b", 512, 384)),
}
PUBLISHED = {
    ("flat", "8b", "pretrain"): "1.07–1.20", ("flat", "34b", "pretrain"): "1.07–1.20",
    ("flat", "8b", "prolong"): "1.05–1.12", ("flat", "34b", "prolong"): "1.05–1.12",
    ("pipeline", "8b", "pretrain"): "1.15–1.30", ("pipeline", "8b", "prolong"): "1.10–1.35",
    ("pipeline", "34b", "pretrain"): "up to 1.15", ("pipeline", "34b", "prolong"): "up to 1.25",
}  # fmt: skip
"""Over all contexts of a row, as the paper's abstract and figures give them (arXiv 2510.18121)."""
MIXES = {"pretrain": "wlb", "prolong": "prolong"}
STAGES = 4
_DRAWN, _PRICED_TOKENS = 4096, 1 << 20
_LONG, _KEPT_SHORT, _REPEATED_LONG = 65_536, 0.5, 4

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    json_path: Annotated[Path, typer.Option("--json", help="Results; cells found there are not simulated again.")],
    layers: Annotated[Path | None, typer.Option(help="What `distattn bench cad-layers` wrote (default: 60 % of peak).")] = None,
    steps: Annotated[
        str, typer.Option(help="What `distattn bench disaggregation` wrote, comma-separated: calibrates; with --whole-layers.")
    ] = "",
    whole_layers: Annotated[
        Path | None,
        typer.Option(help="What `distattn bench cad-layers --tensor-parallel 1` wrote, where the steps were measured."),
    ] = None,
    tested_steps: Annotated[
        str, typer.Option(help="The same of other runs, comma-separated: predicted with what --steps gave, not fitted to.")
    ] = "",
    models: Annotated[str, typer.Option(help="8b, 34b (default: both).")] = "",
    kinds: Annotated[str, typer.Option(help="flat, pipeline (default: both).")] = "",
    mixes: Annotated[str, typer.Option(help="pretrain, prolong (default: both).")] = "",
    batches: Annotated[int, typer.Option(help="Batches a cell; their speed-ups are averaged.")] = 30,
    tolerance: Annotated[float, typer.Option(help="How far a rank may exceed its share of the attention.")] = 0.05,
    commit: Commit = "",
) -> None:
    """Simulate step times with and without disaggregated attention."""
    if batches < 1:
        raise ConfigError(f"--batches must be at least 1, got {batches}")
    files, tested = ([Path(name) for name in parts(text)] for text in (steps, tested_steps))
    if bool(files) != (whole_layers is not None):
        raise ConfigError("--steps and --whole-layers calibrate together: give both or neither")
    if tested and not files:
        raise ConfigError("--tested-steps are predicted by what --steps calibrates: give --steps and --whole-layers, too")
    fit = None if whole_layers is None else calibrate(files, layer_time("8b", whole_layers), tested)
    turns, hardware = cost_of_turns(files) if files else 1.0, _hardware(fit)
    about = {
        "simulated": True, "hardware": repr(hardware), "rank_tokens": RANK_TOKENS, "cost_of_turns": turns,
        "linear_layers": str(layers or "60 % of the data sheet's peak, assumed"), "whole_layers": str(whole_layers or "none"),
        "measured_steps": steps or "none", "calibration": fit.about() if fit else "none",
    }  # fmt: skip
    check_settings(json_path, about)
    record = Record(json_path, environment(commit), about)
    for kind in names("kinds", kinds, list(CASES)):
        for model, gpus, context in CASES[kind]:
            if model not in names("models", models, list(MODELS)):
                continue
            for mix in names("mixes", mixes, list(MIXES)):
                key = f"{kind}|{model}|{gpus}|{context}K|{mix}"
                if key not in record:
                    layer, attention = _corrected(layer_time(model, layers), fit)
                    setting = Setting(MODELS[model], hardware, layer, tolerance, turns, attention)
                    record.add(key, simulate_cell(kind, setting, gpus // TENSOR_PARALLEL, context * 1024, mix, batches))
    print(table(record.results))
    if fit:
        print(f"\nCalibrated by measured steps: {fit}")


def _corrected(layer: LayerTime, fit: Fit | None) -> tuple[LayerTime, float]:
    """Linear layers as long as they take in a step, and attention's factor."""
    if fit is None:
        return layer, 1.0
    return LayerTime(fit.linear * layer.forward_s, fit.linear * layer.backward_s), fit.attention


def _hardware(fit: Fit | None) -> Hardware:
    """One H200 of a node with 8, each with its own 400 Gb/s card; a node is one rank here. With the rates of the kernel of the
    measured steps."""
    kernels = rated(fit.kernel).kernels if fit else shipped_rates().kernels
    return replace(HARDWARE["h200"], ranks_per_node=1, kernels=kernels)


def layer_time(model: str, path: Path | None) -> LayerTime:
    """Of one GPU's slice; the largest number of tokens that was measured. ConfigError where the file is something else."""
    shape = MODELS[model]
    if path is None:
        forward = shape.linear_flops / TENSOR_PARALLEL / (0.6 * 989e12)
        return LayerTime(forward, 2 * forward)
    try:
        results = json.loads(path.read_text())["results"]
        largest = max((key for key in results if key.startswith(f"{model}|")), key=lambda key: int(key.split("|")[1]))
        return LayerTime(**results[largest])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} holds no times of the model {model} ({error}): `distattn bench cad-layers --json {path}` writes them"
        ) from error


def cost_of_turns(paths: Sequence[Path]) -> float:
    """A measured step in two nano-batches over one in one piece without transfers, the median over cases: kernels of half the
    size, more launches, what transfers take from the kernels that hide them. ConfigError for other files."""
    try:
        pairs = [pair for path in paths for pair in _turns_and_one_piece(json.loads(path.read_text())["results"])]
        return statistics.median(slowest(two["seconds"]) / without_transfers(one) for two, one in pairs)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{', '.join(map(str, paths))}: no steps with and without ping-pong ({error}); `distattn bench disaggregation "
            "--json FILE` writes them"
        ) from error


def _turns_and_one_piece(cells: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Of each case with both: the cells of ping-pong and of disaggregation in one piece, or else of what ``auto`` took if that
    is one nano-batch."""
    pairs = []
    for case in cases(cells):
        one, auto = (cells.get(f"{case}|{name}", {}) for name in ("disaggregated", "auto"))
        if not is_measured(one) and is_measured(auto) and len(auto["rows"][0]) == 1:
            one = auto
        two = cells.get(f"{case}|disaggregated_ping_pong", {})
        if is_measured(one) and is_measured(two):
            pairs.append((two, one))
    return pairs


def draw_batch(mix: str, context: int, tokens: int, seed: int) -> list[int]:
    """Documents of one step: the mix's lengths stretched to the context, packed to ``tokens``.

    pretrain: half of the short documents are left out and long ones (64K of 128K, in proportion) counted four times, as the
    paper's generator does; prolong: as they are. The last document is clipped.
    """
    generator = np.random.default_rng(seed)
    stretch = context / RANK_TOKENS
    documents: list[np.ndarray] = []
    have = 0
    while have < tokens:
        lengths = DISTRIBUTIONS[MIXES[mix]].sample(generator, _DRAWN)
        if mix == "pretrain":
            short = (generator.random(len(lengths)) < _KEPT_SHORT).astype(np.int64)
            lengths = np.repeat(lengths, np.where(lengths >= _LONG, _REPEATED_LONG, short))
            generator.shuffle(lengths)
        lengths = np.clip((lengths * stretch / 16).astype(np.int64) * 16, 16, context)
        documents.append(lengths)
        have += int(lengths.sum())
    flat = np.concatenate(documents)
    ends = np.cumsum(flat)
    last = int(np.searchsorted(ends, tokens))
    flat = flat[: last + 1].copy()
    flat[-1] -= ends[last] - tokens
    return flat[flat > 0].tolist()


def simulate_cell(kind: str, setting: Setting, ranks: int, context: int, mix: str, batches: int) -> dict[str, Any]:
    """Averages over batches, and what they are made of; milliseconds of one layer, forward and backward."""
    rows = []
    # What a pair costs depends on the lengths' distribution; a stream of a million tokens shows it.
    price = prices(draw_batch(mix, context, _PRICED_TOKENS, 0), setting)
    for seed in range(batches):
        if kind == "pipeline":
            documents = draw_batch(mix, context, pipeline_tokens(ranks, STAGES), seed)
            rows.append(pipeline_seconds(documents, ranks, STAGES, setting, price))
            continue
        documents = draw_batch(mix, context, ranks * RANK_TOKENS, seed)
        base, shared_by = baseline_seconds(documents, ranks, setting, price)
        found = cad_seconds(documents, ranks, setting, price)
        rows.append((base, found.seconds, found.exposed_seconds, found.imbalance, shared_by))
    base, ours, exposed, imbalance, shared_by = (list(column) for column in zip(*rows, strict=True))
    ratios = [a / b for a, b in zip(base, ours, strict=True)]
    return {
        "speed_up": statistics.mean(ratios),
        "speed_up_least": min(ratios),
        "speed_up_most": max(ratios),
        "baseline_ms": 1e3 * statistics.mean(base),
        "disaggregated_ms": 1e3 * statistics.mean(ours),
        "exposed_ms": 1e3 * statistics.mean(exposed),
        "imbalance": max(imbalance),
        "baseline_context_ranks": statistics.mode(shared_by),
        "batches": batches,
    }


def table(results: dict[str, Any]) -> str:
    """Markdown: simulated speed-ups beside the published ranges."""
    lines = [
        "Simulated, not measured. Speed-up of disaggregated attention over the best packing by work with context parallelism.",
        "",
        "| | model | GPUs | context | data | speed-up (least–most) | exposed | paper |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, cell in results.items():
        kind, model, gpus, context, mix = key.split("|")
        paper = PUBLISHED[kind, model, mix]
        spread = f"{cell['speed_up']:.2f} ({cell['speed_up_least']:.2f}–{cell['speed_up_most']:.2f})"
        waits = f"{cell['exposed_ms'] / cell['disaggregated_ms']:.1%}"
        kind = "no pipeline" if kind == "flat" else f"{STAGES} stages"
        lines.append(f"| {kind} | {model} | {gpus} | {context} | {mix} | {spread} | {waits} | {paper} |")
    return "\n".join(lines)
