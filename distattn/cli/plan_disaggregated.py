"""What ``distattn plan`` adds for disaggregated attention: its picture, and the ticks of a pipeline."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from distattn.errors import ConfigError

if TYPE_CHECKING:
    from distattn.cli.plan import Choice, MaskArguments, Planned
    from distattn.parallel.disaggregation.pipeline import PlannedTick

_FFN_WIDTH = 3.5


@dataclass(frozen=True)
class PipelineArguments:
    """The command line's description of a pipeline; None means not given."""

    stages: int | None
    microbatches: int | None
    lengths: str | None
    ranks: int
    json_path: str | None
    plot: str | None


def draw(planned: Planned, path: str, title: str, model: tuple[int | None, int | None], *, backward: bool) -> None:
    """The picture of a plan: that of ``draw_balance`` where work moves, else its timeline. model: hidden size and width of the
    feed-forward."""
    from distattn.parallel.draw import draw_plan

    if planned.strategy == "disaggregated" and not backward:
        draw_balance(planned, path, title, *model)
    elif backward:
        draw_plan(planned.backward_program, planned.backward, path, title=title)
    else:
        draw_plan(planned.program, planned.forward, path, title=title)


def draw_balance(planned: Planned, path: str, title: str, hidden: int | None, ffn: int | None) -> None:
    """Load before and after, traffic, and ping-pong of two nano-batches like this plan through two layers.

    hidden, ffn: sizes of the model for the linear layers, which are taken to run at the attention kernel's rate.
    """
    import numpy as np

    from distattn.parallel.disaggregation.pictures import draw_disaggregated
    from distattn.parallel.disaggregation.ticks import nano_times, ping_pong
    from distattn.parallel.layout import area_per_rank

    program, forward, hardware = planned.program, planned.forward, planned.forward.hardware
    features = program.heads * forward.shape.head_dim
    hidden = features if hidden is None else hidden
    ffn = round(_FFN_WIDTH * hidden) if ffn is None else ffn
    if hidden < 1 or ffn < 1:
        raise ConfigError(f"--hidden and --ffn must be at least 1, got {hidden} and {ffn}")
    key_features = program.kv_heads * forward.shape.head_dim
    flops = 2 * hidden * (2 * features + 2 * key_features + 3 * ffn)
    linear = planned.layout.counts * flops / hardware.flops_per_second(backward=False)
    nano = nano_times(program, forward, linear.astype(np.float64))
    ticks = ping_pong((nano, nano), 2)
    at_home = area_per_rank(planned.mask, planned.layout) * program.heads * forward.shape.flops_per_pair(backward=False)
    exposed = sum(tick.exposed_seconds for tick in ticks)
    together, apart = ticks[-1].end * 1e3, 4 * nano.one_by_one * 1e3
    rate = hardware.forward_tflops
    subtitle = (
        f"two nano-batches, two layers: {together:,.4g} ms with ping-pong ({1e3 * exposed:,.3g} ms waiting for transfers), "
        f"{apart:,.4g} ms without   ·   linear layers: hidden {hidden:,}, feed-forward {ffn:,}, at {rate:g} TFLOP/s"
    )
    draw_disaggregated(forward, at_home.astype(np.float64), ticks, path, title=title, subtitle=subtitle)


def plan_pipeline_command(
    mask: MaskArguments,
    choice: Choice,
    pipeline: PipelineArguments,
    heads: tuple[int, int],
    sizes: tuple[int, int | None, str],
    hardware: str,
) -> None:
    """Plan and predict every tick of a step, and write, print and draw them. Raises ConfigError or PlanError."""
    from distattn.parallel.disaggregation.pipeline import plan_pipeline, split_microbatches
    from distattn.parallel.hardware import find_hardware
    from distattn.parallel.schedulers.options import parse_options

    stages, count = pipeline.stages, pipeline.microbatches
    if choice.strategy != "disaggregated" or mask.mask != "documents" or mask.bidirectional:
        raise ConfigError("--pipeline-stages needs --strategy disaggregated and --mask documents, causal")
    if stages is None or count is None or pipeline.lengths is None:
        raise ConfigError("a pipeline needs --pipeline-stages, --microbatches and --lengths")
    if choice.layout not in ("auto", "contiguous"):
        raise ConfigError(f"each stage's rows are contiguous: --layout must be auto or contiguous, got {choice.layout!r}")
    if sizes[1] not in (None, sizes[0]):
        raise ConfigError(f"a pipeline is planned for values as wide as keys: leave --value-dim out, or give {sizes[0]}")
    from distattn.cli.plan import parse_lengths

    machine = find_hardware(hardware)
    parts = split_microbatches(parse_lengths(pipeline.lengths), count)
    options = parse_options("disaggregated", choice.options)
    planned = plan_pipeline(parts, stages, pipeline.ranks, heads, machine, head_dim=sizes[0], dtype=sizes[2], options=options)
    ticks = list(planned)
    numbers = pipeline_report(ticks, pipeline.ranks, machine.name)
    _write(numbers, ticks, pipeline)


def pipeline_report(ticks: list[PlannedTick], ranks: int, hardware: str) -> dict[str, Any]:
    """What ``--json`` writes: seconds of attention, one layer a stage, tick by tick and in all."""
    rows = [
        {
            "backward": tick.tick.backward,
            "microbatches": list(tick.tick.microbatches),
            "imbalance_before": tick.before,
            "imbalance": tick.after,
            "seconds": tick.seconds,
            "compute_seconds": tick.compute_seconds,
            "home_seconds": tick.home_seconds,
        }
        for tick in ticks
    ]
    return {
        "strategy": "disaggregated",
        "ranks": ranks,
        "pipeline_stages": len(ticks[0].tick.microbatches),
        "microbatches": 1 + max(max(tick.tick.microbatches) for tick in ticks),
        "hardware": hardware,
        "verified": True,
        "seconds": sum(tick.seconds for tick in ticks),
        "compute_seconds": sum(tick.compute_seconds for tick in ticks),
        "home_seconds": sum(tick.home_seconds for tick in ticks),
        "ticks": rows,
    }


def _write(numbers: dict[str, Any], ticks: list[PlannedTick], pipeline: PipelineArguments) -> None:
    if pipeline.json_path == "-":
        typer.echo(json.dumps(numbers))
    elif pipeline.json_path is not None:
        try:
            Path(pipeline.json_path).write_text(json.dumps(numbers) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write --json {pipeline.json_path!r}: {error.strerror or error}") from error
    title = (
        f"disaggregated · {numbers['pipeline_stages']} pipeline stages · {numbers['microbatches']} microbatches · "
        f"{numbers['ranks']} ranks"
    )
    milliseconds = {name: f"{1e3 * numbers[name]:,.4g} ms" for name in ("seconds", "compute_seconds", "home_seconds")}
    subtitle = (
        f"attention of one layer a stage on {numbers['hardware']}: {milliseconds['compute_seconds']} with all transfers "
        f"hidden, {milliseconds['seconds']} with none; {milliseconds['home_seconds']} where every stage computes its own"
    )
    if pipeline.json_path != "-":
        _print(numbers, title, subtitle)
    if pipeline.plot is not None:
        from distattn.parallel.disaggregation.pictures import draw_pipeline

        draw_pipeline(ticks, pipeline.plot, title=title, subtitle=subtitle)
        typer.echo(f"drew {pipeline.plot}", err=True)


def _print(numbers: dict[str, Any], title: str, subtitle: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[bold]{title}[/bold]\n{subtitle}")
    table = Table("tick", "microbatches by stage", "max/mean at home", "as planned", "ms, hidden", "ms, exposed", "ms, at home")
    for column in table.columns[2:]:
        column.justify = "right"
    for tick in numbers["ticks"]:
        held = " ".join("·" if x < 0 else str(x) for x in tick["microbatches"])
        times = (f"{1e3 * tick[name]:,.4g}" for name in ("compute_seconds", "seconds", "home_seconds"))
        balance = (f"{tick[name]:.3f}" for name in ("imbalance_before", "imbalance"))
        table.add_row("backward" if tick["backward"] else "forward", held, *balance, *times)
    console.print(table)
