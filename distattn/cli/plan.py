"""``distattn plan``: plan a schedule, prove it, count and predict its costs, and draw it. Needs no device and no ranks."""

from __future__ import annotations

import importlib
import json
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distattn.errors import ConfigError, DistattnError, LayoutError, MaskError, PlanError, UnsupportedError

if TYPE_CHECKING:
    from distattn.mask import Mask
    from distattn.parallel.disaggregation.certificate import Certificate
    from distattn.parallel.hardware import Hardware
    from distattn.parallel.layout import Layout
    from distattn.parallel.program import Program
    from distattn.parallel.schedulers.auto import StrategyChoice
    from distattn.parallel.simulate import Prediction

# What each mask must be given, and what it may be given besides; "seq_len|lengths" is either of the two.
_MASKS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "causal": (("seq_len",), ()),
    "full": (("seq_len",), ()),
    "sliding_window": (("seq_len|lengths", "left"), ("right",)),
    "documents": (("lengths",), ("bidirectional",)),
    "prefix_lm": (("seq_len", "prefix"), ()),
    "share_question": (("question", "lengths"), ()),
    "global_window": (("seq_len", "globals", "left"), ("right",)),
    "block_causal": (("seq_len|lengths", "block"), ()),
}
_LAYOUTS = ("auto", "contiguous", "whole_documents", "zigzag", "per_document_zigzag", "balanced", "striped")
_USAGE_ERRORS = (ConfigError, PlanError, MaskError, LayoutError, UnsupportedError)
_MANY_RANKS = 16

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class MaskArguments:
    """The command line's description of a mask; None and False mean not given."""

    mask: str
    seq_len: int | None = None
    lengths: str | None = None
    left: int | None = None
    right: int | None = None
    prefix: int | None = None
    globals: int | None = None
    block: int | None = None
    question: int | None = None
    bidirectional: bool = False


@dataclass(frozen=True, eq=False)
class Planned:
    """A verified forward and backward program with their predictions and how they came about."""

    strategy: str
    options: Any
    reason: str
    candidates: str
    predicted_seconds: dict[str, float]
    layout: Layout
    layout_reason: str
    mask: Mask
    program: Program
    forward: Prediction
    backward: Prediction
    backward_program: Program
    certificate: Certificate | None
    plan_seconds: float
    verify_seconds: float


@app.command()
def plan_command(
    mask: Annotated[str, typer.Option(help=f"What attends to what: {', '.join(_MASKS)}.")],
    ranks: Annotated[int, typer.Option(help="Ranks that share the sequence.")],
    lengths: Annotated[
        str | None, typer.Option(help="Tokens of each document (or answer): 8192,512,… or @FILE (JSON list or numbers).")
    ] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens, for masks without --lengths.")] = None,
    left: Annotated[int | None, typer.Option(help="Window: keys seen to the left of a query, itself not counted.")] = None,
    right: Annotated[int | None, typer.Option(help="Window: keys seen to the right (default 0).")] = None,
    prefix: Annotated[int | None, typer.Option(help="prefix_lm: tokens that see each other.")] = None,
    globals_: Annotated[int | None, typer.Option("--globals", help="global_window: leading tokens seen by all.")] = None,
    block: Annotated[int | None, typer.Option(help="block_causal: tokens of a block.")] = None,
    question: Annotated[int | None, typer.Option(help="share_question: tokens of the question.")] = None,
    bidirectional: Annotated[bool, typer.Option("--bidirectional", help="documents: not causal.")] = False,
    strategy: Annotated[str, typer.Option(help="Scheduler, or auto: the least predicted time.")] = "auto",
    option: Annotated[
        list[str] | None, typer.Option(help="Option of the strategy, key=value; may be repeated: --option pieces=4.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="disaggregated: how far a rank may exceed its share of the work (default 0.05).")
    ] = None,
    layout: Annotated[str, typer.Option(help=f"Who holds which rows: {', '.join(_LAYOUTS)}.")] = "auto",
    heads: Annotated[int, typer.Option(help="Query heads.")] = 32,
    kv_heads: Annotated[int | None, typer.Option(help="Key/value heads (default: as many as query heads).")] = None,
    head_dim: Annotated[int, typer.Option(help="Features of a query and key head.")] = 128,
    value_dim: Annotated[int | None, typer.Option(help="Features of a value head (default: head_dim).")] = None,
    dtype: Annotated[str, typer.Option(help="Input dtype: bfloat16, float16, float32, float64.")] = "bfloat16",
    hardware: Annotated[str, typer.Option(help="Machine: h100, h200, a100, cpu, or measured: this one.")] = "h100",
    json_path: Annotated[str | None, typer.Option("--json", help="Write the numbers to FILE, or - for stdout.")] = None,
    plot: Annotated[str | None, typer.Option(help="Draw timeline, load and traffic to FILE.png (.pdf, .svg).")] = None,
    backward: Annotated[bool, typer.Option("--backward/--forward", help="Which direction --plot draws.")] = False,
    pool: Annotated[int | None, typer.Option(help="disaggregated: most ranks among which work moves (default: all).")] = None,
    pipeline_stages: Annotated[
        int | None, typer.Option(help="disaggregated: pipeline stages among the ranks; plans each tick of a step.")
    ] = None,
    microbatches: Annotated[int | None, typer.Option(help="With --pipeline-stages: equal parts of --lengths.")] = None,
    hidden: Annotated[int | None, typer.Option(help="For the ping-pong that --plot draws (default: heads × head_dim).")] = None,
    ffn: Annotated[int | None, typer.Option(help="Likewise: width of the gated feed-forward (default: 3.5 × hidden).")] = None,
) -> None:
    """Verify, cost, simulate and draw a schedule, without running it."""
    arguments = MaskArguments(
        mask, seq_len, lengths, left, right, prefix, globals_, block, question, bidirectional=bidirectional
    )
    try:
        if plot is not None:
            from distattn.parallel.draw import check_plot_path

            check_plot_path(plot)
        kv = heads if kv_heads is None else kv_heads
        bound = [f"{name}={value}" for name, value in (("tolerance", tolerance), ("pool", pool)) if value is not None]
        chosen = Choice(strategy, layout, (*(option or ()), *bound))
        if pipeline_stages is not None or microbatches is not None:
            from distattn.cli.plan_disaggregated import PipelineArguments, plan_pipeline_command

            pipeline = PipelineArguments(pipeline_stages, microbatches, lengths, ranks, json_path, plot)
            plan_pipeline_command(arguments, chosen, pipeline, (heads, kv), (head_dim, value_dim, dtype), hardware)
            return
        planned = make_plan(arguments, ranks, chosen, (heads, kv), (head_dim, value_dim, dtype), hardware)
        title = f"{planned.strategy} · {planned.layout.name} · {describe_mask(arguments)} · {count(ranks, 'rank')}"
        _output(planned, report(planned, arguments), title, json_path)
        if plot is not None:
            from distattn.cli.plan_disaggregated import draw

            draw(planned, plot, title, (hidden, ffn), backward=backward)
            typer.echo(f"drew {plot}", err=True)
    except DistattnError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, _USAGE_ERRORS) else 1) from error


@dataclass(frozen=True)
class Choice:
    """Names of the strategy and the layout, or auto, and the strategy's options as ``key=value``."""

    strategy: str = "auto"
    layout: str = "auto"
    options: tuple[str, ...] = ()


def make_plan(
    arguments: MaskArguments,
    ranks: int,
    choice: Choice,
    heads: tuple[int, int],
    sizes: tuple[int, int | None, str],
    hardware: str,
) -> Planned:
    """Plan, derive the backward, verify and predict both. ``plan_seconds``: from lengths to tasks, transfers and their bytes.

    heads: query and KV heads; sizes: head_dim, value_dim (None: head_dim), dtype; hardware: a preset's name. Raises a
    DistattnError that names the option for everything that can't be planned.
    """
    from distattn.parallel.backward import derive_backward
    from distattn.parallel.cost import Shape, move_bytes
    from distattn.parallel.hardware import find_hardware
    from distattn.parallel.program import check_heads
    from distattn.parallel.simulate import predict

    machine = find_hardware(hardware)
    check_heads(*heads)
    head_dim, value_dim, dtype = sizes
    shape = Shape(head_dim, head_dim if value_dim is None else value_dim, dtype)
    if ranks < 1:
        raise ConfigError(f"--ranks must be at least 1, got {ranks}")
    # plan_seconds is no import; numpy's first unique() brings in numpy.ma.
    for module in ("distattn.parallel.schedulers.auto", "distattn.parallel.schedulers.options", "numpy.ma"):
        importlib.import_module(module)
    start = time.perf_counter()
    mask = build_mask(arguments)
    schedule = _schedule(mask, ranks, choice, heads, sizes, machine)
    program = schedule.program
    move_bytes(program, shape)
    planned = time.perf_counter()
    backward = derive_backward(program, ranks_per_node=machine.ranks_per_node)
    derived = time.perf_counter()
    program.verify(mask)
    backward.verify(mask)
    verified = time.perf_counter()
    return Planned(
        strategy=schedule.strategy,
        options=schedule.options,
        reason=schedule.reason,
        candidates=schedule.table,
        predicted_seconds=schedule.predicted_seconds,
        layout=schedule.layout,
        layout_reason=schedule.layout_reason,
        mask=mask,
        program=program,
        forward=predict(program, mask, machine, head_dim, value_dim, dtype),
        backward=predict(backward, mask, machine, head_dim, value_dim, dtype),
        backward_program=backward,
        certificate=_certificate(schedule, mask, heads),
        plan_seconds=planned - start,
        verify_seconds=verified - derived,
    )


def _certificate(schedule: StrategyChoice, mask: Mask, heads: tuple[int, int]) -> Certificate | None:
    from distattn.parallel.schedulers import find_scheduler

    certify = find_scheduler(schedule.strategy).certificate
    return certify(mask, schedule.layout, *heads, schedule.options) if certify else None


def _schedule(
    mask: Mask,
    ranks: int,
    choice: Choice,
    heads: tuple[int, int],
    sizes: tuple[int, int | None, str],
    machine: Hardware,
) -> StrategyChoice:
    """What was asked for, or what auto takes."""
    from distattn.parallel.schedulers import find_scheduler
    from distattn.parallel.schedulers.auto import (
        StrategyChoice,
        choose_layout,
        choose_strategy,
        default_options,
        describe_degrees,
    )
    from distattn.parallel.schedulers.options import parse_options

    options = parse_options(choice.strategy, choice.options)
    given = _given_layout(choice.layout, mask, ranks)
    if choice.strategy == "auto":
        head_dim, value_dim, dtype = sizes
        return choose_strategy(
            mask, ranks, *heads, head_dim=head_dim, value_dim=value_dim, dtype=dtype, hardware=machine, layout=given
        )
    scheduler = find_scheduler(choice.strategy)
    options = options or default_options(choice.strategy, *heads, ranks, machine)
    layout, why = given, "given"
    if layout is None:
        placed = choose_layout(mask, ranks, choice.strategy, heads=heads[0], kv_heads=heads[1], options=options)
        layout, why = placed.layout, placed.reason
    program = scheduler.plan(mask, layout, *heads, options)
    reason = f"given; {describe_degrees(choice.strategy, options, heads[0], ranks)}"
    return StrategyChoice(choice.strategy, layout, program, reason, options=options, layout_reason=why)


def _given_layout(name: str, mask: Mask, ranks: int) -> Layout | None:
    from distattn.parallel.layout import Layout

    rows = mask.num_queries
    if name == "auto":
        return None
    if name in ("contiguous", "zigzag", "striped"):
        return getattr(Layout, name)(rows, ranks)
    if name == "balanced":
        return Layout.balanced(mask, ranks)
    if name == "whole_documents":
        whole = Layout.whole_documents(mask, ranks, mask.segments())
        if whole is None:
            raise ConfigError(
                f"--layout whole_documents: uncut, these documents leave {ranks} ranks uneven, by rows or by attention; choose "
                "per_document_zigzag, which cuts the longest, or auto"
            )
        return whole
    if name == "per_document_zigzag":
        cuts = mask.segments()
        return Layout.per_document_zigzag(cuts[1:] - cuts[:-1], ranks)
    raise ConfigError(f"--layout is {name!r} and must be one of {', '.join(_LAYOUTS)}")


def build_mask(arguments: MaskArguments) -> Mask:
    """The mask that the options describe; ConfigError names an option that is missing or does not belong to the mask."""
    from distattn.mask import Mask

    _check_mask_arguments(arguments)
    n, left, right = arguments.seq_len or 0, arguments.left or 0, arguments.right or 0
    lengths = [n] if arguments.lengths is None else parse_lengths(arguments.lengths)
    builders = {
        "causal": lambda: Mask.causal(n),
        "full": lambda: Mask.full(n, n),
        "sliding_window": lambda: _windows(lengths, left, right),
        "documents": lambda: Mask.documents(lengths, causal=not arguments.bidirectional),
        "prefix_lm": lambda: Mask.prefix_lm(n, arguments.prefix or 0),
        "share_question": lambda: Mask.share_question(arguments.question or 0, lengths),
        "global_window": lambda: Mask.global_window(n, arguments.globals or 0, left, right),
        "block_causal": lambda: Mask.block_causal(lengths, arguments.block or 0),
    }
    mask = builders[arguments.mask]()
    if not mask.num_queries:
        raise ConfigError("there are no tokens to plan for: --seq-len, or the sum of --lengths, must be at least 1")
    return mask


def _windows(lengths: list[int], left: int, right: int) -> Mask:
    from distattn.mask import Mask

    window = Mask.sliding_window(sum(lengths), left, right)
    return window if len(lengths) == 1 else window & Mask.documents(lengths, causal=False)


def _check_mask_arguments(arguments: MaskArguments) -> None:
    if arguments.mask not in _MASKS:
        raise ConfigError(f"--mask is {arguments.mask!r} and must be one of {', '.join(_MASKS)}")
    required, optional = _MASKS[arguments.mask]
    given = {name for name, value in _given(arguments).items() if name != "mask"}
    takes = " ".join([*map(_option, required), *(f"[{_option(name)}]" for name in optional)])
    unknown = sorted(given - {part for name in (*required, *optional) for part in name.split("|")})
    if unknown:
        raise ConfigError(f"--mask {arguments.mask} takes {takes} and not {_option(unknown[0])}")
    for name in required:
        if len(given & set(name.split("|"))) != 1:
            raise ConfigError(f"--mask {arguments.mask} takes {takes}: give {_option(name)}")


def _given(arguments: MaskArguments) -> dict[str, Any]:
    return {name: value for name, value in asdict(arguments).items() if value is not None and value is not False}


def _option(name: str) -> str:
    return " or ".join("--" + part.replace("_", "-") for part in name.split("|"))


def parse_lengths(text: str) -> list[int]:
    """``8192,512`` or ``@FILE`` with a JSON list or numbers apart by white space or commas."""
    where = "--lengths"
    if text.startswith("@"):
        where = f"--lengths file {text[1:]!r}"
        try:
            text = Path(text[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {where}: {getattr(error, 'strerror', None) or error}") from error
    body = text.strip()
    if body.startswith("[") and body.endswith("]"):
        body = body[1:-1]
    words = [word for word in re.split(r"[\s,]+", body) if word]
    wrong = None
    if not re.fullmatch(r"[0-9\s,]*", body):
        wrong = next(word for word in words if not re.fullmatch(r"[0-9]+", word))
    if wrong is not None or not words:
        what = "it is empty" if wrong is None else f"{wrong!r:.40} is not one"
        raise ConfigError(f"{where} must be whole numbers of tokens like 8192,512: {what}")
    return [int(word) for word in words]


def describe_mask(arguments: MaskArguments) -> str:
    """A short text for titles: ``documents 30000,2000 (32,000 tokens)``."""
    lengths = [] if arguments.lengths is None else parse_lengths(arguments.lengths)
    name = arguments.mask + (" bidirectional" if arguments.bidirectional else "")
    for key in ("question", "prefix", "globals", "left", "right", "block"):
        value = getattr(arguments, key)
        name += f" {key}={value}" if value is not None else ""
    if 0 < len(lengths) <= 6:
        name += " " + ",".join(map(str, lengths))
    elif lengths:
        name += f" of {len(lengths):,} lengths {min(lengths):,} to {max(lengths):,}"
    total = (arguments.seq_len or 0) + sum(lengths) + (arguments.question or 0)
    return f"{name} ({count(total, 'token')})"


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def report(planned: Planned, arguments: MaskArguments) -> dict[str, Any]:
    """What ``--json`` writes: plain numbers, lists by rank, seconds, bytes; forward at the top, backward under its key."""
    program, forward = planned.program, planned.forward
    options = {name: value for name, value in _given(arguments).items() if name not in ("mask", "lengths")}
    return {
        "strategy": planned.strategy,
        "options": asdict(planned.options) if planned.options is not None else {},
        "reason": planned.reason,
        "candidates_seconds": planned.predicted_seconds,
        "ranks": program.num_ranks,
        "mask": arguments.mask,
        "mask_options": options,
        "tokens": planned.mask.num_queries,
        "verified": True,
        "area": planned.mask.area,
        "layout": planned.layout.name,
        "layout_reason": planned.layout_reason,
        "rows_per_rank": planned.layout.counts.tolist(),
        "heads": program.heads,
        "kv_heads": program.kv_heads,
        **asdict(forward.shape),
        "hardware": forward.hardware.name,
        "certificate": asdict(planned.certificate) | {"gap": planned.certificate.gap} if planned.certificate else {},
        "plan_seconds": planned.plan_seconds,
        "verify_seconds": planned.verify_seconds,
        **_direction(program, forward),
        "backward": _direction(planned.backward_program, planned.backward),
    }


def _direction(program: Program, prediction: Prediction) -> dict[str, Any]:
    cost = prediction.cost
    return {
        "stages": program.num_stages,
        "attends": len(program.attends),
        "moves": len(program.moves),
        "flops_per_rank": cost.flops_per_rank.tolist(),
        "bytes_sent_per_rank": cost.bytes_sent_per_rank.tolist(),
        "bytes_received_per_rank": cost.bytes_received_per_rank.tolist(),
        "peak_memory_bytes_per_rank": cost.peak_memory_bytes_per_rank.tolist(),
        "imbalance": cost.imbalance,
        "predicted_seconds": prediction.seconds,
        "ideal_seconds": prediction.ideal_seconds,
        "exposed_communication_seconds": prediction.exposed_communication_seconds,
        "efficiency": prediction.efficiency,
        "wait_seconds_per_rank": prediction.timeline.wait_seconds_per_rank.tolist(),
    }


def _output(planned: Planned, numbers: dict[str, Any], title: str, json_path: str | None) -> None:
    """JSON alone on stdout, or JSON to a file and tables on stdout."""
    if json_path == "-":
        typer.echo(json.dumps(numbers))
        return
    if json_path is not None:
        try:
            Path(json_path).write_text(json.dumps(numbers) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write --json {json_path!r}: {error.strerror or error}") from error
    _print_tables(planned, title)


def _print_tables(planned: Planned, title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[bold]{title}[/bold]", markup=True)
    console.print(f"strategy  {planned.reason}\nlayout    {planned.layout_reason}", markup=False)
    if planned.candidates:
        console.print(planned.candidates, markup=False)
    if planned.certificate:
        console.print("balance   " + planned.certificate.describe().replace("\n", "\n          "), markup=False)
    console.print(f"verified  forward and backward, {planned.mask.area:,} pairs, in {planned.verify_seconds:.3g} s")
    table = Table("", "forward", "backward", title_justify="left")
    directions = (planned.forward, planned.backward)
    programs = (planned.program, planned.backward_program)
    table.add_row("predicted on " + planned.forward.hardware.name, *(f"{1e3 * d.seconds:,.4g} ms" for d in directions))
    table.add_row("  ideal", *(f"{1e3 * d.ideal_seconds:,.4g} ms" for d in directions))
    exposed = (f"{1e3 * d.exposed_communication_seconds:,.4g} ms" for d in directions)
    table.add_row("  exposed communication", *exposed)
    table.add_row("efficiency", *(f"{d.efficiency:.1%}" for d in directions))
    table.add_row("imbalance (max/mean)", *(f"{d.cost.imbalance:.3f}" for d in directions))
    table.add_row("stages", *(str(p.num_stages) for p in programs))
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    console.print(_rank_table(planned))


def _rank_table(planned: Planned) -> Any:
    """One line a rank, or the least, the mean and the most over many ranks."""
    import numpy as np
    from rich.table import Table

    costs = (planned.forward.cost, planned.backward.cost)
    columns = [
        ("TFLOP", [cost.flops_per_rank / 1e12 for cost in costs]),
        ("sent MB", [cost.bytes_sent_per_rank / 1e6 for cost in costs]),
        ("received MB", [cost.bytes_received_per_rank / 1e6 for cost in costs]),
        ("peak MB", [cost.peak_memory_bytes_per_rank / 1e6 for cost in costs]),
    ]
    rows = planned.layout.counts
    ranks = len(rows)
    lines = [(str(rank), np.s_[rank : rank + 1], "mean") for rank in range(ranks)]
    if ranks > _MANY_RANKS:
        lines = [(name, np.s_[:], reduce) for name, reduce in (("least", "min"), ("mean", "mean"), ("most", "max"))]
    table = Table("rank", "rows", *(name for name, _ in columns), caption="forward / backward", caption_justify="left")
    for column in table.columns:
        column.justify = "right"
    for name, chosen, reduce in lines:
        cells = (" / ".join(_short(getattr(v[chosen], reduce)()) for v in values) for _, values in columns)
        table.add_row(name, f"{getattr(rows[chosen], reduce)():,.0f}", *cells)
    return table


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
