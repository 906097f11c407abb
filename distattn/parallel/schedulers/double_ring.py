"""Double ring: a ring of nodes around rings of ranks (LoongTrain, arXiv 2406.18485).

P = W · M ranks, rank (w, m) in window w (a node, as a rule). A chunk of rank (w, m) at

    stage u·M        enters window w + u, at rank m's counterpart     sent on to window w + u + 1 at once
    stage u·M + i    is used by rank (w + u, m + i)                   … and passed on inside the window

so a transfer between nodes has a whole inner round, M stages, to arrive, and all ranks of a node share its links to the next
node instead of one rank at the border. A window or a rank that needs nothing of a chunk is skipped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distattn.errors import PlanError
from distattn.mask import Mask
from distattn.parallel.csr import segment_starts
from distattn.parallel.layout import Layout
from distattn.parallel.need import Need, analyse
from distattn.parallel.program import Program, ProgramBuilder
from distattn.parallel.relay import Path, pairs, relay
from distattn.parallel.schedulers.ring import add_home_attends, add_travelling_keys


@dataclass(frozen=True)
class DoubleRingOptions:
    """ranks_per_window: size M of the inner rings, a divisor of the ranks; None: the largest one up to their square root."""

    ranks_per_window: int | None = None


def variants(heads: int, kv_heads: int, num_ranks: int, ranks_per_node: int) -> list[DoubleRingOptions]:
    """Windows that are nodes, where there are several."""
    window = next(x for x in range(min(ranks_per_node, num_ranks), 0, -1) if num_ranks % x == 0)
    return [DoubleRingOptions(window if 1 < window < num_ranks else square_window(num_ranks))]


def square_window(num_ranks: int) -> int:
    """The largest divisor of the ranks up to their square root."""
    return max(x for x in range(1, int(num_ranks**0.5) + 1) if num_ranks % x == 0)


def plan(
    mask: Mask,
    layout: Layout,
    heads: int,
    kv_heads: int,
    options: DoubleRingOptions | None = None,
    key_layout: Layout | None = None,
) -> Program:
    """Double-ring attention over any mask and layout."""
    window = (options or DoubleRingOptions()).ranks_per_window or square_window(layout.num_ranks)
    if window < 1 or layout.num_ranks % window:
        raise PlanError(f"ranks_per_window must divide the ranks into equal windows, got {window} for {layout.num_ranks} ranks")
    need = analyse(mask, layout, key_layout)
    builder = ProgramBuilder(layout, heads, kv_heads, key_layout)
    add_home_attends(builder, need.area)
    add_travelling_keys(builder, relay(need, double_ring_path(need, window)))
    return builder.build()


def double_ring_path(need: Need, window: int) -> Path:
    """Between windows to the first rank that needs the chunk, inside a window from rank to rank."""
    ranks = need.layout.num_ranks
    owner, holder = pairs(need)
    outer = (holder // window - owner // window) % (ranks // window)
    inner = (holder - owner) % window
    order = np.lexsort((inner, outer, owner))
    owner, holder, outer, inner = owner[order], holder[order], outer[order], inner[order]
    due = outer * window + inner
    index = np.arange(len(owner))
    enters = np.zeros(len(owner), bool)
    enters[segment_starts(owner, outer)] = True
    entries = np.flatnonzero(enters)
    is_root = owner == holder
    source = index - 1
    source[entries] = np.append(0, entries)[: len(entries)]
    source[is_root] = index[is_root]
    # Between windows a chunk leaves as soon as it is there; inside, one stage before it is used.
    issue = np.where(enters, due[source], due - 1)
    issue[is_root] = 0
    whole = np.append(np.flatnonzero(is_root)[1:], len(owner))[np.cumsum(is_root) - 1]
    inside = np.append(entries[1:], len(owner))[np.cumsum(enters) - 1]
    return Path(owner, holder, source, np.where(enters, whole, inside), issue, due)
