"""Plan only, and all ranks in one process: exchange tables are proved, mutations of them are not, every operator composes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distattn.errors import PlanError, UnsupportedError, VerifyError
from distattn.parallel.exchanges import (
    EXCHANGES,
    OPERATORS,
    BoundaryOp,
    Chains,
    ExchangeRun,
    LinkRates,
    Map,
    StateShape,
    Table,
    choose_exchange,
    cut_stream,
    find_exchange,
    lower_exchange,
    verify_table,
)
from distattn.parallel.exchanges.all_scan import AllScanOptions
from distattn.parallel.exchanges.cost import Measurement, best_blocks, exchange_seconds, fit_rates, overtaking_ranks
from distattn.parallel.exchanges.two_level import TwoLevelOptions
from distattn.parallel.hardware import find_hardware
from distattn.parallel.layout import Layout
from distattn.parallel.transport import Mailbox

HEADS, ROWS, COLUMNS, BATCH = 3, 4, 5, 2


def random_chains(seed: int) -> Chains:
    """Of a random layout and random documents, forward or reversed, of states or halos."""
    rng = np.random.default_rng(seed)
    ranks, rows = int(rng.integers(1, 9)), int(rng.integers(1, 60))
    cuts = [0, *np.sort(rng.integers(0, rows + 1, ranks - 1)).tolist(), rows]
    layout = [
        Layout.contiguous(rows, ranks),
        Layout.zigzag(rows, ranks),
        Layout.striped(rows, ranks, block=int(rng.integers(1, 5))),
        Layout.given([[(cuts[r], cuts[r + 1])] for r in range(ranks)]),
    ][seed % 4]
    documents = np.array([0, *np.sort(rng.integers(0, rows + 1, int(rng.integers(0, 5)))), rows])
    stream = cut_stream(layout, documents)
    chains = stream.halo_chains(3) if rng.integers(2) else stream.chains
    return chains.reversed() if rng.integers(2) else chains


def options_of(name: str, rng: np.random.Generator) -> Any:
    if name == "all_scan":
        return AllScanOptions(int(rng.integers(1, 7)))
    return TwoLevelOptions(int(rng.integers(1, 5))) if name == "two_level" else None


def tables(seeds: range) -> Iterator[Table]:
    for seed in seeds:
        rng = np.random.default_rng(seed)
        chains = random_chains(seed)
        for name, exchange in EXCHANGES.items():
            yield exchange.plan(chains, HEADS, COLUMNS, options_of(name, rng))


def test_every_table_is_proved() -> None:
    proved = [verify_table(table) for table in tables(range(60))]
    assert len(proved) == 60 * len(EXCHANGES)


def mutations(table: Table, rng: np.random.Generator) -> Iterator[Table]:
    """The table with one row dropped, or one entry changed."""
    for name in ("hops", "folds", "outputs"):
        rows = getattr(table, name)
        if not len(rows):
            continue
        row = int(rng.integers(len(rows)))
        yield replace(table, **{name: np.delete(rows, row, axis=0)})
        changed = rows.copy()
        changed[row, int(rng.integers(rows.shape[1]))] += int(rng.choice([-1, 1]))
        yield replace(table, **{name: changed})


def test_mutated_tables_are_refused_or_right() -> None:
    """No mutation that the proof accepts computes anything wrong; most are refused."""
    op, refused, accepted = OPERATORS["dense"], 0, 0
    for seed, table in enumerate(tables(range(40))):
        for mutant in mutations(table, np.random.default_rng(seed)):
            try:
                verify_table(mutant)
            except (VerifyError, KeyError, IndexError):
                refused += 1
                continue
            accepted += 1
            maps, wanted = random_maps(mutant.chains, op, seed)
            assert_states(run_all(mutant, op, maps), wanted)
    assert refused > 4 * accepted > 0


# Execution.


def random_maps(chains: Chains, op: BoundaryOp, seed: int) -> tuple[dict[int, Map], dict[int, Tensor]]:
    """A map for each link that hands on, and by plain folds the state that enters each link but the first of a chain."""
    r = torch.Generator().manual_seed(seed)
    shape = state_shape(op)
    maps: dict[int, Map] = {}
    for entry, link in enumerate(chains.links.tolist()):
        if chains.last[entry]:
            continue
        offset = torch.randn(op.state_size(shape, shape.heads, COLUMNS), generator=r, dtype=torch.float64)
        if op.name == "softmax":
            offset[..., 1] = offset[..., 1].abs()
            if seed % 3 == 0:  # a shard that saw no key
                offset[..., 0], offset[..., 1:] = -torch.inf, 0.0
        size = op.transition_size(shape, shape.heads)
        transition = None
        if size is not None and not chains.first[entry]:
            transition = 0.5 * torch.randn(size, generator=r, dtype=torch.float64)
            if op.name == "halo":
                transition = torch.full(size, float(1 + seed % 2), dtype=torch.float64)
        maps[link] = Map(transition, offset)
    wanted: dict[int, Tensor] = {}
    state = torch.empty(0)
    for entry, link in enumerate(chains.links.tolist()):
        if chains.first[entry]:
            state = maps[link].offset
            continue
        wanted[link] = state
        if not chains.last[entry]:
            state = op.apply(maps[link], state)
    return maps, wanted


def state_shape(op: BoundaryOp) -> StateShape:
    heads = 1 if op.name == "halo" else HEADS
    return StateShape(BATCH, heads, ROWS, COLUMNS, torch.float64, torch.device("cpu"))


def run_all(table: Table, op: BoundaryOp, maps: dict[int, Map]) -> dict[int, Tensor]:
    """All ranks in lockstep through a mailbox."""
    chains, box = table.chains, Mailbox(table.chains.num_ranks)
    shape = state_shape(op)
    runs = []
    for rank in range(chains.num_ranks):
        mine = {link: held for link, held in maps.items() if chains.rank_of[link] == rank}
        runs.append(ExchangeRun(lower_exchange(table, rank), op, shape, mine, box.endpoint(rank)))
    running = [run.steps() for run in runs]
    while running:
        running = [steps for steps in running if next(steps, None) is not None]
    box.check_empty()
    return {link: state for run in runs for link, state in run.finish().items()}


def assert_states(found: dict[int, Tensor], wanted: dict[int, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for link, state in wanted.items():
        assert not state.isnan().any()
        torch.testing.assert_close(found[link], state, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_exchange_of_every_operator(operator: str) -> None:
    op, states = OPERATORS[operator], 0
    for seed in range(24):
        chains, rng = random_chains(seed), np.random.default_rng(seed)
        maps, wanted = random_maps(chains, op, seed)
        states += len(wanted)
        for name, exchange in EXCHANGES.items():
            table = exchange.plan(chains, state_shape(op).heads, COLUMNS, options_of(name, rng))
            assert_states(run_all(table, op, maps), wanted)
    assert states > 50


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name != "softmax"])
def test_adjoint(operator: str) -> None:
    """⟨A x, y⟩ = ⟨x, Aᵀ y⟩, and (A B)ᵀ = Bᵀ Aᵀ."""
    op, shape = OPERATORS[operator], state_shape(OPERATORS[operator])
    r = torch.Generator().manual_seed(0)
    x, y = (torch.randn(op.state_size(shape, shape.heads, COLUMNS), generator=r, dtype=torch.float64) for _ in range(2))
    zero = torch.zeros_like(x)
    size = op.transition_size(shape, shape.heads)
    a = b = None
    if operator == "halo":
        a, b = (torch.full((BATCH, 1), float(n), dtype=torch.float64) for n in (1, 2))
    elif size is not None:
        a, b = (torch.randn(size, generator=r, dtype=torch.float64) for _ in range(2))
    forward = op.apply(Map(a, zero), x)
    backward = op.apply(Map(op.adjoint(a), zero), y)
    torch.testing.assert_close((forward * y).sum(), (x * backward).sum())
    both = op.compose(Map(a, zero), Map(b, zero)).transition
    one_by_one = op.apply(Map(op.adjoint(b), zero), backward)
    torch.testing.assert_close(op.apply(Map(op.adjoint(both), zero), y), one_by_one)


def test_softmax_has_no_adjoint() -> None:
    with pytest.raises(UnsupportedError, match=r"gradients with respect to .* travel by the scalar operator"):
        OPERATORS["softmax"].adjoint(None)


# Bytes.


def one_chain(ranks: int) -> Chains:
    return cut_stream(Layout.contiguous(8 * ranks, ranks), np.array([0, 8 * ranks])).chains


@pytest.mark.parametrize("ranks", [2, 5, 32])
def test_all_scan_moves_one_state_whatever_the_transition(ranks: int) -> None:
    for name in ("serial", "all_scan"):
        table = EXCHANGES[name].plan(one_chain(ranks), HEADS, COLUMNS, AllScanOptions(3) if name == "all_scan" else None)
        for transition_bytes in (0.0, 8.0, 8.0 * ROWS * ROWS):
            sent = table.bytes_sent(8.0 * ROWS, transition_bytes)
            assert sent.tolist() == [8 * HEADS * ROWS * COLUMNS] * (ranks - 1) + [0]
    table = EXCHANGES["all_gather"].plan(one_chain(ranks), HEADS, COLUMNS)
    sent = table.bytes_sent(8.0 * ROWS, 8.0 * ROWS * ROWS)
    each = 8 * HEADS * ROWS * COLUMNS + 8 * HEADS * ROWS * ROWS * (np.arange(ranks - 1) > 0)
    assert sent.tolist() == [*(each * (ranks - 1 - np.arange(ranks - 1))).tolist(), 0]


@pytest.mark.parametrize("name", EXCHANGES)
def test_bytes_on_the_wire_are_those_of_the_table(name: str) -> None:
    op, chains = OPERATORS["dense"], one_chain(6)
    maps, _ = random_maps(chains, op, 0)
    table = EXCHANGES[name].plan(chains, HEADS, COLUMNS, TwoLevelOptions(3) if name == "two_level" else None)
    box, sent = Mailbox(6), []
    runs = []
    for rank in range(6):
        endpoint = box.endpoint(rank)
        mine = {link: held for link, held in maps.items() if chains.rank_of[link] == rank}
        runs.append((endpoint, ExchangeRun(lower_exchange(table, rank), op, state_shape(op), mine, endpoint).steps()))
    running = [steps for _, steps in runs]
    while running:
        running = [steps for steps in running if next(steps, None) is not None]
    sent = [endpoint.bytes_sent for endpoint, _ in runs]
    assert sent == table.bytes_sent(8.0 * BATCH * ROWS, 8.0 * BATCH * ROWS * ROWS).tolist()


def test_two_level_sends_a_share_between_nodes() -> None:
    """Between nodes of 4 ranks, a rank sends its heads of one state; whole maps stay inside."""
    table = EXCHANGES["two_level"].plan(one_chain(16), 4, COLUMNS, TwoLevelOptions(4))
    src, dst = table.hops[:, 2], table.hops[:, 3]
    across = table.hops[src // 4 != dst // 4]
    assert len(across) == 3 * 4
    assert (across[:, 10] == 0).all()
    assert (across[:, 7] - across[:, 6] == 1).all()


def test_a_long_piece_ends_a_halo() -> None:
    """Pieces that are longer than the halo need nothing from before them: all hops are in the first stage."""
    stream = cut_stream(Layout.contiguous(40, 4), np.array([0, 40]))
    table = EXCHANGES["serial"].plan(stream.halo_chains(3), 1, COLUMNS)
    assert table.num_stages == 1
    assert len(table.hops) == 3
    short = cut_stream(Layout.contiguous(8, 4), np.array([0, 8]))
    assert EXCHANGES["serial"].plan(short.halo_chains(3), 1, COLUMNS).num_stages == 3


# Cost. ZeCO's published communication times (arXiv 2507.01004, H100, GLA, 8K tokens a GPU, d = 4096, H = 32), ms.

RANKS = (8, 16, 32, 64, 128, 256)
PUBLISHED = {
    "all_gather": (0.375, 0.658, 1.616, 2.543, 4.350, 8.514),
    "all_scan": (0.226, 0.297, 0.448, 0.739, 1.272, 2.165),
}
STATE_BYTES = 32 * 128 * 128 * 4


def fitted() -> tuple[LinkRates, int]:
    """From the times at 8 and 16 ranks alone."""
    points = [
        Measurement(name, ranks, 1e-3 * ms)
        for name, times in PUBLISHED.items()
        for ranks, ms in zip(RANKS, times, strict=True)
        if ranks <= 16
    ]
    return fit_rates(points, STATE_BYTES, ranks_per_node=8, inside=LinkRates.of(find_hardware("h100")))


def deviation(name: str, ranks: int) -> float:
    rates, blocks = fitted()
    predicted = exchange_seconds(name, rates, ranks, STATE_BYTES, blocks=blocks)
    return predicted / (1e-3 * PUBLISHED[name][RANKS.index(ranks)]) - 1


def test_fit_repeats_what_it_was_fitted_to() -> None:
    """Three rates and K for four times: how a fit weighs its errors can hardly change what it predicts."""
    rates, blocks = fitted()
    alike = replace(rates, ranks_per_node=1)  # as the fit takes them: hops in nodes and between them
    for name, times in PUBLISHED.items():
        for ranks, ms in zip(RANKS[:2], times[:2], strict=True):
            seconds = exchange_seconds(name, alike, ranks, STATE_BYTES, blocks=blocks)
            assert seconds == pytest.approx(1e-3 * ms, rel=2e-3)


@pytest.mark.parametrize("ranks", [32, 64, 128, 256])
def test_cost_repeats_the_published_all_scan(ranks: int) -> None:
    assert abs(deviation("all_scan", ranks)) < 0.2


@pytest.mark.parametrize("ranks", [64, 128, 256])
def test_cost_repeats_the_published_all_gather(ranks: int) -> None:
    assert abs(deviation("all_gather", ranks)) < 0.2


def test_cost_misses_one_published_all_gather() -> None:
    """The time at 32 ranks is off its own neighbours: a line through the published times at 16 and 64 ranks misses it by more
    than 20 % too. A line from the one at 16 is within 20 % at both 32 and 256 only in a window of 0.4 % of its slope, which
    times at 8 and 16 ranks cannot tell: no model affine in the number of ranks meets it but by chance."""
    assert -0.25 < deviation("all_gather", 32) < -0.2
    at: dict[int, float] = dict(zip(RANKS, PUBLISHED["all_gather"], strict=True))
    between = at[16] + (at[64] - at[16]) * (32 - 16) / (64 - 16)
    assert between / at[32] - 1 < -0.2
    slopes = [((1 + sign * 0.2) * at[ranks] - at[16]) / (ranks - 16) for sign, ranks in ((-1, 32), (1, 256))]
    assert slopes[0] == pytest.approx(39.7e-3, abs=5e-5)
    assert 1 < slopes[1] / slopes[0] < 1.005
    assert (at[16] - at[8]) / 8 == pytest.approx(35.4e-3, abs=5e-5)


def test_two_level_overtakes_all_scan() -> None:
    rates, blocks = fitted()
    at = overtaking_ranks(rates, STATE_BYTES, blocks=blocks)
    assert at == 32
    assert exchange_seconds("two_level", rates, 1024, STATE_BYTES) < 0.2 * exchange_seconds(
        "all_scan", rates, 1024, STATE_BYTES, blocks=blocks
    )
    with pytest.raises(PlanError, match="no cost model for exchange='other'"):
        exchange_seconds("other", rates, 8, STATE_BYTES)


def test_best_blocks_is_the_best() -> None:
    rates = LinkRates.of(find_hardware("h100"))
    for ranks in (2, 16, 64, 1024):
        best = best_blocks(rates, ranks, STATE_BYTES)
        times = {k: exchange_seconds("all_scan", rates, ranks, STATE_BYTES, blocks=k) for k in range(1, 33)}
        assert times[best] <= 1.02 * min(times.values())


def test_choice_says_why() -> None:
    rates = LinkRates.of(find_hardware("h100"))
    assert choose_exchange(rates, 0, STATE_BYTES, 0) == ("serial", "no document crosses ranks")
    assert choose_exchange(rates, 2, STATE_BYTES, 0)[0] == "serial"
    name, why = choose_exchange(rates, 256, STATE_BYTES, STATE_BYTES)
    assert name == "two_level"
    assert why.startswith("least predicted time over 256 links, in µs: serial ")
    with pytest.raises(PlanError, match="exchange='ring' is unknown; it may be auto, serial"):
        find_exchange("ring")
    with pytest.raises(PlanError, match="all_scan needs blocks of at least 1, got 0"):
        AllScanOptions(0)
