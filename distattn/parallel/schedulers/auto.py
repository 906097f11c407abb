"""Choosing a layout by measured balance, and a strategy with its options by predicted time. Every choice carries its reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np

from distattn.errors import PlanError
from distattn.mask import Mask
from distattn.parallel.backward import derive_backward
from distattn.parallel.hardware import HARDWARE, Hardware
from distattn.parallel.layout import Layout, area_per_rank
from distattn.parallel.program import Program
from distattn.parallel.schedulers import SCHEDULERS, find_scheduler
from distattn.parallel.simulate import Prediction, predict, total_seconds

BALANCE_TOLERANCE = 1.05
"""A layout with less traffic is preferred as long as its busiest rank is within this factor of the best layout's."""

CUT_SHARES = (4, 16, 64, 256)
"""Documents of at least one part in so many of all rows are cut over the ranks; the first that balances is taken."""

WHOLE_TOLERANCE = 1.01
"""Busiest rank over the mean up to which more documents stay whole."""

MIN_CUT = 128
"""Rows of the shortest chunk that a document is cut into."""

UNBALANCED = 1.25
"""Busiest rank over the mean from which schedulers that even out work themselves are worth their planning time."""

TIE = 1.03
"""Candidates within this factor of the least predicted time count as equal, which is about how far predictions are off: the one
that needs the least memory wins, and of those that need as much, the one that keeps the host least busy. Rows balanced in
chunks, where the rule has another layout, come last: predicted alike, they took 1.4 and 1.7 % longer than cut documents on four
and two H200."""

SAME_MEMORY = 1.03
"""Within this factor two candidates need as much memory. At 1.01 rows balanced in chunks were taken for 1.5 % less, and a step
on two H200 took 1.7 % longer than one with documents cut zigzag."""

WORTH_OPTIONS = 0.1
"""What other than a scheduler's default options must save: more pieces and travelling queries cost more than is predicted. On
two and four H100 they were never faster by more than 1 %, and up to twice as slow, where 4 % less was predicted."""

NUM_RELAID = 4
"""Best candidates for which other layouts are predicted too, where communication outweighs balance."""

MAX_VARIANTS = 4
"""Most options of one scheduler that are predicted; each costs a plan, a backward and two simulations."""


class _Shape(NamedTuple):
    """What ``predict`` is given of a call besides program, mask and hardware."""

    head_dim: int
    value_dim: int | None
    dtype: str
    kernel: str | None


@dataclass(frozen=True)
class LayoutChoice:
    layout: Layout
    reason: str


@dataclass(frozen=True, eq=False)
class Candidate:
    """One scheduler with options, planned and predicted on its layout; seconds and parts of it are forward + backward.

    usual: its options are the scheduler's default on these nodes. relaid: on another layout than ``choose_layout`` gives it.
    """

    strategy: str
    options: Any
    placed: LayoutChoice
    program: Program = field(repr=False)
    seconds: float
    ideal_seconds: float
    exposed_seconds: float
    peak_memory_bytes: int
    host_seconds: float = 0.0
    usual: bool = True
    relaid: bool = False

    @property
    def label(self) -> str:
        return f"{option_label(self.strategy, self.options)}, {self.placed.layout.name}"

    @property
    def dealt_anew(self) -> bool:
        """Whether its rows are balanced in chunks although the rule took another layout."""
        return self.relaid and self.placed.layout.name == "balanced"

    @property
    def lost_seconds(self) -> float:
        """Imbalance and launches: what the prediction has beyond the ideal and exposed communication."""
        return self.seconds - self.ideal_seconds - self.exposed_seconds


@dataclass(frozen=True)
class StrategyChoice:
    """The winner, its options, layout and program, why it won, and predicted forward + backward seconds of every candidate.

    table: the candidates, a line each, best first.
    """

    strategy: str
    layout: Layout
    program: Program
    reason: str
    predicted_seconds: dict[str, float] = field(default_factory=dict)
    options: Any = None
    layout_reason: str = ""
    table: str = ""


def option_label(strategy: str, options: Any) -> str:
    """A scheduler's name with the options that differ from the defaults, such as ``usp head_ranks=2 pieces=4``."""
    words = [strategy]
    for x in fields(options) if options is not None else ():
        value = getattr(options, x.name)
        if value != x.default:
            words.append(f"{x.name}={value}")
    return " ".join(words)


def default_options(strategy: str, heads: int, kv_heads: int, num_ranks: int, hardware: Hardware) -> Any:
    """What a scheduler takes on these nodes where the caller gives no options."""
    return find_scheduler(strategy).variants(heads, kv_heads, num_ranks, hardware.ranks_per_node)[0]


def describe_degrees(strategy: str, options: Any, heads: int, num_ranks: int) -> str:
    """A scheduler's options in words, and where it splits ranks both ways, by how much."""
    text = option_label(strategy, options)
    groups = int(find_scheduler(strategy).groups(options, heads, num_ranks).max()) + 1
    if strategy in ("ulysses", "usp"):
        text += f", {num_ranks // groups} ways by heads × {groups} along the sequence"
    return text


def choose_layout(
    mask: Mask,
    num_ranks: int,
    strategy: str,
    *,
    heads: int | None = None,
    kv_heads: int | None = None,
    options: Any = None,
) -> LayoutChoice:
    """Contiguous where balance allows, else whole documents, zigzag, per-document zigzag or balanced: by area, not by the
    mask's name. For a strategy that balances itself, the one with which it sends least.

    heads (default: as many as ranks), kv_heads (default: heads), options: of the strategy; they decide which ranks compute on
    the same rows, and what travels.
    """
    rows = mask.num_queries
    contiguous = Layout.contiguous(rows, num_ranks)
    scheduler = find_scheduler(strategy)
    options = options or scheduler.options()
    servers = scheduler.servers(options)
    if servers:
        return LayoutChoice(server_layout(rows, num_ranks, servers), f"the last {servers} of {num_ranks} ranks only serve")
    if num_ranks == 1:
        return LayoutChoice(contiguous, "one rank holds all rows")
    groups = scheduler.groups(options, heads or num_ranks, num_ranks)
    if not groups.any():
        sizes = heads or num_ranks, kv_heads or heads or num_ranks
        square = mask.num_queries == mask.num_keys
        home = scheduler.home(mask, _layouts(mask, num_ranks, contiguous), *sizes, options) if square else None
        return LayoutChoice(*(home or (contiguous, f"{strategy} balances whatever the layout")))
    tried = _balance(mask, _layouts(mask, num_ranks, contiguous), groups)
    best = min(imbalance for _, imbalance in tried)
    chosen = next(layout for layout, imbalance in tried if imbalance <= BALANCE_TOLERANCE * best)
    balance = ", ".join(f"{layout.name} {imbalance:.2f}" for layout, imbalance in tried)
    return LayoutChoice(chosen, f"busiest {'rank' if groups.max() + 1 == num_ranks else 'group'} over mean: {balance}")


def server_layout(num_rows: int, num_ranks: int, servers: int) -> Layout:
    """Rows on all ranks but the last ``servers``, which hold none. PlanError where no rank would be left for them."""
    if not 0 <= servers < num_ranks:
        raise PlanError(f"servers must be fewer than the {num_ranks} ranks, got {servers}: somebody must hold the rows")
    return Layout.contiguous(num_rows, num_ranks - servers).extended(num_ranks)


def layouts_for(mask: Mask, num_ranks: int, groups: np.ndarray) -> Iterator[Layout]:
    """Every layout that is considered for a scheduler whose ranks compute in these groups, int64 [P]."""
    for layout, _ in _balance(mask, _layouts(mask, num_ranks, Layout.contiguous(mask.num_queries, num_ranks)), groups):
        yield layout


def _balance(mask: Mask, layouts: Iterator[Layout], groups: np.ndarray) -> list[tuple[Layout, float]]:
    """Each layout, dealt so that groups of ranks hold neighbouring shares, with its busiest group's work over the mean."""
    order = np.argsort(groups, kind="stable")
    mean = mask.area / (int(groups.max()) + 1)
    tried = []
    for layout in layouts:
        placed = layout if np.array_equal(order, np.arange(len(order))) else layout.reordered(order)
        busiest = np.bincount(groups, weights=area_per_rank(mask, placed)).max(initial=0)
        tried.append((placed, float(busiest / mean) if mean else 1.0))
    return tried


def _layouts(mask: Mask, num_ranks: int, contiguous: Layout) -> Iterator[Layout]:
    """Candidates, those with the least traffic first."""
    yield contiguous
    edges = mask.segments() if mask.num_queries == mask.num_keys else np.zeros(0, np.int64)
    whole = Layout.whole_documents(mask, num_ranks, edges) if len(edges) > 2 else None
    if whole is not None:
        yield whole
    yield Layout.zigzag(mask.num_queries, num_ranks)
    if len(edges) > 2:
        yield _documents_cut(mask, edges[1:] - edges[:-1], num_ranks)
    if mask.num_queries:
        yield Layout.balanced(mask, num_ranks)


def _documents_cut(mask: Mask, lengths: np.ndarray, num_ranks: int) -> Layout:
    """Per-document zigzag of as few documents as balance allows: each that is cut is a kernel launch of its own on every rank,
    and sends its keys."""
    mean = mask.area / num_ranks
    for share in CUT_SHARES:
        min_cut = mask.num_queries // (2 * num_ranks * share)
        layout = Layout.per_document_zigzag(lengths, num_ranks, min_cut=max(min_cut, MIN_CUT))
        if min_cut <= MIN_CUT or area_per_rank(mask, layout).max(initial=0) <= WHOLE_TOLERANCE * mean:
            return layout
    return Layout.per_document_zigzag(lengths, num_ranks, min_cut=MIN_CUT)


def choose_strategy(
    mask: Mask,
    num_ranks: int,
    heads: int,
    kv_heads: int,
    *,
    head_dim: int,
    value_dim: int | None = None,
    dtype: str = "bfloat16",
    hardware: Hardware | None = None,
    layout: Layout | None = None,
    key_layout: Layout | None = None,
    kernel: str = "auto",
) -> StrategyChoice:
    """The scheduler and options with the least predicted forward + backward time on ``hardware`` (default: h100 nodes).

    layout: a given layout, which all candidates must use; None lets each choose its own. key_layout: of the keys, in cross
    attention. kernel: the backend by whose rates is predicted, where there are any; else by the fastest for each candidate.
    """
    hardware = hardware or HARDWARE["h100"]
    if num_ranks == 1:
        chosen = layout or Layout.contiguous(mask.num_queries, 1)
        program = SCHEDULERS["ring"].plan(mask, chosen, heads, kv_heads, None, key_layout)
        why = "one rank: every strategy is the same local attention"
        return StrategyChoice("ring", chosen, program, why, layout_reason="one rank holds all rows")
    given = LayoutChoice(layout, "given") if layout else None
    placed = given or choose_layout(mask, num_ranks, "ring")
    unbalanced = area_per_rank(mask, placed.layout).max(initial=0) * num_ranks > UNBALANCED * mask.area
    shape = _Shape(head_dim, value_dim, dtype, hardware.rated(kernel))
    found: list[Candidate] = []
    seen: set[str] = set()

    def consider(name: str, options: Any, placed: LayoutChoice, usual: bool, *, relaid: bool = False) -> None:
        program = SCHEDULERS[name].plan(mask, placed.layout, heads, kv_heads, options, key_layout)
        if program.digest not in seen:  # such as usp where it is ulysses or ring
            seen.add(program.digest)
            made = _predicted(name, options, placed, program, mask, hardware, shape)
            found.append(replace(made, usual=usual, relaid=relaid))

    variants = _variants(heads, kv_heads, num_ranks, hardware, balancing=unbalanced and not key_layout)
    for usual in (True, False):
        if not usual and found and not _leaves_room(found):
            break
        for name, options in variants[usual]:
            at = given or choose_layout(mask, num_ranks, name, heads=heads, kv_heads=kv_heads, options=options)
            consider(name, options, at, usual)
    found.sort(key=lambda x: x.seconds)
    if given is None:
        for x, placed in _other_layouts(mask, num_ranks, heads, found[:]):
            consider(x.strategy, x.options, placed, x.usual, relaid=True)
        found.sort(key=lambda x: x.seconds)
    best = _best_of(found)
    found.insert(0, found.pop(found.index(best)))
    return StrategyChoice(
        best.strategy, best.placed.layout, best.program, _why(found, hardware, shape.kernel),
        {x.label: x.seconds for x in found}, best.options, best.placed.reason, candidate_table(found),
    )  # fmt: skip


def _best_of(found: list[Candidate]) -> Candidate:
    """The winner among candidates, the fastest first; of those that are about as fast, the most frugal, then the simplest."""
    first = found[0]
    usual = next((x for x in found if x.usual), first)
    if first.seconds > (1 - WORTH_OPTIONS) * usual.seconds:
        first = usual
    ties = [x for x in found if x.seconds <= TIE * first.seconds and x.usual == first.usual]
    least = SAME_MEMORY * min(x.peak_memory_bytes for x in ties)
    simplest = list(SCHEDULERS)
    frugal = [x for x in ties if x.peak_memory_bytes <= least]
    return min(frugal, key=lambda x: (x.dealt_anew, round(1e6 * x.host_seconds), simplest.index(x.strategy)))


def _variants(
    heads: int, kv_heads: int, num_ranks: int, hardware: Hardware, *, balancing: bool
) -> dict[bool, list[tuple[str, Any]]]:
    """Schedulers with options, by whether these are their defaults. balancing: with those that even out work themselves."""
    found: dict[bool, list[tuple[str, Any]]] = {True: [], False: []}
    for name, scheduler in SCHEDULERS.items():
        if scheduler.why_not(heads, num_ranks) or (scheduler.balances and not balancing):
            continue
        default = default_options(name, heads, kv_heads, num_ranks, hardware)
        for options in scheduler.variants(heads, kv_heads, num_ranks, hardware.ranks_per_node)[:MAX_VARIANTS]:
            found[options == default].append((name, options))
    return found


def _leaves_room(usual: list[Candidate]) -> bool:
    """Whether other than default options could save what they must, even if nothing but the ideal were left."""
    best = min(usual, key=lambda x: x.seconds)
    return best.ideal_seconds < (1 - WORTH_OPTIONS) * best.seconds


def _other_layouts(mask: Mask, num_ranks: int, heads: int, found: list[Candidate]) -> Iterator[tuple[Candidate, LayoutChoice]]:
    """Layouts that balance worse but may move less, for the best candidates: those whose ideal time, stretched by their
    imbalance, is still below the best prediction. Where computing dominates there are none."""
    contiguous = Layout.contiguous(mask.num_queries, num_ranks)
    for x in found[:NUM_RELAID]:
        groups = find_scheduler(x.strategy).groups(x.options, heads, num_ranks)
        if not groups.any():
            continue
        for layout, imbalance in _balance(mask, _layouts(mask, num_ranks, contiguous), groups):
            if layout.name != x.placed.layout.name and imbalance * x.ideal_seconds < found[0].seconds:
                why = f"least predicted time, although its busiest rank has {imbalance:.2f} times the mean"
                yield x, LayoutChoice(layout, why)


def _predicted(
    name: str,
    options: Any,
    placed: LayoutChoice,
    program: Program,
    mask: Mask,
    hardware: Hardware,
    shape: _Shape,
) -> Candidate:
    backward = derive_backward(program, ranks_per_node=hardware.ranks_per_node)
    both: list[Prediction] = [predict(direction, mask, hardware, **shape._asdict()) for direction in (program, backward)]
    seconds = total_seconds(*both)
    return Candidate(
        name,
        options,
        placed,
        program,
        seconds=seconds,
        ideal_seconds=sum(x.ideal_seconds for x in both),
        exposed_seconds=seconds - total_seconds(*both, free_links=True),
        peak_memory_bytes=max(int(x.cost.peak_memory_bytes_per_rank.max()) for x in both),
        host_seconds=sum(x.host_seconds for x in both),
    )


def _why(found: list[Candidate], hardware: Hardware, kernel: str | None) -> str:
    """What the winner has over the next scheduler of another name."""
    best = found[0]
    place = f"{hardware.name} with {kernel}" if kernel else hardware.name
    text = f"least predicted forward + backward time on {place}: {best.label} {1e3 * best.seconds:.4g} ms"
    least = min(found, key=lambda x: x.seconds)
    if least.usual != best.usual:
        text += f"; {least.label} would save {1 - least.seconds / best.seconds:.1%}, less than the {WORTH_OPTIONS:.0%} to trust"
    elif best.seconds > least.seconds:
        text += f", least memory, then least work for the host, of those within {TIE - 1:.0%} of the least time"
    other = next((x for x in found if x.strategy != best.strategy), None)
    if other is None:
        return text
    exposed = 1e3 * (other.exposed_seconds - best.exposed_seconds)
    lost = 1e3 * (other.lost_seconds - best.lost_seconds)
    return (
        f"{text}; next {other.label} {1e3 * other.seconds:.4g} ms, with {exposed:+.3g} ms of exposed communication and "
        f"{lost:+.3g} ms of imbalance and launches"
    )


def candidate_table(found: list[Candidate]) -> str:
    """A line a candidate: predicted ms = ideal + imbalance and launches + exposed communication; layout; peak memory."""
    width = max(len(x.label) for x in found)
    lines = [
        f"{x.label:{width}}  {1e3 * x.seconds:9.4g} ms = ideal {1e3 * x.ideal_seconds:.4g} + imbalance and launches "
        f"{1e3 * x.lost_seconds:.3g} + exposed {1e3 * x.exposed_seconds:.3g}; "
        f"peak {x.peak_memory_bytes / 1e6:.4g} MB"
        for x in found
    ]
    return "\n".join(lines)
