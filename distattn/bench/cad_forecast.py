"""``distattn bench cad-forecast``: steps of ``distattn bench disaggregation`` on more ranks, before they are measured.

    seconds = layers · (the busiest rank's linear layers and attention, by the calibration of ``cad_calibration``, + waits)

Every engine in one nano-batch, ``auto`` with the schedule that it would choose by the links given. Needs no GPU; what is
written is meant to be committed before the run, and to lie beside what that measures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from distattn.bench.cad_calibration import Fit, calibrate, parts_of, rated
from distattn.bench.cad_layers import LayerTime
from distattn.bench.cad_simulation import layer_time
from distattn.bench.disaggregation import choose_cells
from distattn.bench.disaggregation_cases import SHAPES, Engine, RefusedError, engine_names, make_engine, make_lengths
from distattn.bench.options import Commit, parts, positive_integers
from distattn.bench.record import Record, check_settings, environment
from distattn.calibration import load_calibration
from distattn.errors import ConfigError
from distattn.mask import Mask
from distattn.parallel.hardware import Hardware, calibrated
from distattn.parallel.schedulers.auto import choose_strategy

SHAPE = SHAPES["8b"]
TURNS = ("ping_pong", "servers")
"""In names of engines that take two nano-batches in turns, which are not forecast."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    json_path: Annotated[Path, typer.Option("--json", help="Results; cells found there are not predicted again.")],
    steps: Annotated[str, typer.Option(help="Measured by `distattn bench disaggregation`, comma-separated: calibrate.")],
    whole_layers: Annotated[Path, typer.Option(help="What `distattn bench cad-layers --tensor-parallel 1` wrote.")],
    links: Annotated[Path, typer.Option(help="What `distattn bench calibrate --only links` wrote of that machine.")],
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, comma-separated.")] = "4,8",
    tokens: Annotated[str, typer.Option(help="Tokens a rank, comma-separated.")] = "65536",
    mixes: Annotated[str, typer.Option(help="Mixes of document lengths, comma-separated (default: all).")] = "",
    engines: Annotated[str, typer.Option(help="Engines, comma-separated (default: all in one nano-batch).")] = "",
    layers: Annotated[int, typer.Option(help="Layers of the model, of the 8B shape.")] = 2,
    commit: Commit = "",
) -> None:
    """Predict steps by a calibration from measured ones."""
    if layers < 1:
        raise ConfigError(f"--layers must be at least 1, got {layers}")
    whole, measured = layer_time("8b", whole_layers), load_calibration(links)
    if measured is None or not measured.links:
        raise ConfigError(f"{links} holds no rates of links: `distattn bench calibrate --only links` measures them")
    fit = calibrate([Path(name) for name in parts(steps)], whole)
    about = {"forecast": True, "layers": layers, "measured_steps": steps, "calibration": fit.about(), "links": str(links)}
    check_settings(json_path, about)
    record = Record(json_path, environment(commit), about)
    for count in positive_integers("ranks", ranks):
        chosen = engines or ",".join(name for name in engine_names(count) if not name.endswith(("keep", *TURNS)))
        for size, mix, name in choose_cells(tokens, mixes, chosen, count):
            key = f"{count}|{size}|{mix}|{name}"
            if key not in record:
                record.add(key, forecast(name, count, size, mix, layers, (fit, whole, calibrated(measured))))
    print(table(record.results))


def forecast(name: str, ranks: int, tokens: int, mix: str, layers: int, by: tuple[Fit, LayerTime, Hardware]) -> dict[str, Any]:
    """Seconds of a step, of those the waits, and the slowest rank's work over the mean; or why an engine is refused. by: the
    calibration, a layer of its shape by itself, and the machine by which ``auto`` chooses."""
    fit, whole, machine = by
    if any(word in name for word in TURNS):
        raise ConfigError(f"--engines has {name!r}: it takes two nano-batches in turns, and steps of one are predicted only")
    lengths = make_lengths(mix, ranks, tokens)
    mask, found = Mask.documents(lengths), {}
    try:
        engine = make_engine(name, lengths, ranks, tokens, SHAPE)
    except RefusedError as error:
        return {"refused": str(error)}
    if name == "auto":
        sizes = SHAPE.num_heads, SHAPE.num_kv_heads
        choice = choose_strategy(mask, ranks, *sizes, head_dim=SHAPE.head_dim, hardware=machine, kernel=fit.kernel)
        engine = Engine(name, choice.strategy, choice.layout, choice.options)
        found["chosen"] = f"{choice.strategy} on {choice.layout.name}"
    rows, attention, exposed = parts_of(engine, mask, ranks, SHAPE, rated(fit.kernel))
    work = layers * (fit.linear * rows * whole.step_s + fit.attention * attention)
    waits = layers * exposed
    return {**found, "seconds": float(work.max()) + waits, "waits_seconds": waits, "imbalance": float(work.max() / work.mean())}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: a line a case, milliseconds of each engine."""
    cases = dict.fromkeys(key.rsplit("|", 1)[0] for key in results)
    names = list(dict.fromkeys(key.rsplit("|", 1)[1] for key in results))
    lines = [
        "Predicted, not measured: milliseconds of a step.",
        "",
        f"| ranks | tokens a rank | mix | {' | '.join(names)} | auto takes |",
        "|---" * (len(names) + 4) + "|",
    ]
    for case in cases:
        ranks, tokens, mix = case.split("|")
        cells = [results.get(f"{case}|{name}", {}) for name in names]
        shown = [f"{1e3 * cell['seconds']:.1f}" if "seconds" in cell else "" for cell in cells]
        taken = results.get(f"{case}|auto", {}).get("chosen", "")
        lines.append(f"| {ranks} | {int(tokens):,} | `{mix}` | {' | '.join(shown)} | {taken} |")
    return "\n".join(lines)
