"""Plan only: pools keep work inside them, sequences are dealt evenly, certificates hold, speeds are stable."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn.bench.lengths import draw
from distattn.errors import PlanError
from distattn.mask import Mask
from distattn.parallel.cost import Shape, count
from distattn.parallel.disaggregation.feedback import FASTEST, SLOWEST, updated_speeds
from distattn.parallel.disaggregation.pools import deal_sequences, pools_of
from distattn.parallel.layout import Layout
from distattn.parallel.schedulers.disaggregated import DisaggregatedOptions, assign, certificate, plan

RANK_ROWS = 16_384


def packed(ranks: int, distribution: str = "wlb") -> tuple[Mask, Layout]:
    return Mask.documents(draw(distribution, RANK_ROWS * ranks, 0)), Layout.contiguous(RANK_ROWS * ranks, ranks)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 300), st.integers(0, 80), st.integers(1, 16))
def test_pools_are_bounded_and_divide_no_node(ranks: int, pool: int, per_node: int) -> None:
    found = pools_of(ranks, pool, per_node)
    sizes, nodes = np.bincount(found), np.arange(ranks) // per_node
    assert len(found) == ranks
    assert (sizes > 0).all()
    assert (np.diff(found) >= 0).all()  # neighbours
    if pool == 0 or pool >= ranks:
        assert len(sizes) == 1
        return
    assert sizes.max() <= pool
    within, whole = (nodes, found) if pool < per_node else (found, nodes)
    assert all(len(set(within[whole == i].tolist())) == 1 for i in range(int(whole.max()) + 1))


@settings(deadline=None, max_examples=100)
@given(st.integers(2, 100), st.integers(1, 40), st.data())
def test_every_pool_gets_its_part_of_the_servers(ranks: int, pool: int, data: st.DataObject) -> None:
    servers = data.draw(st.integers(1, ranks - 1))
    homes = max(1, pool * (ranks - servers) // ranks)
    wanted = 1 if pool >= ranks else -(-(ranks - servers) // homes)
    if servers < wanted:
        with pytest.raises(PlanError, match=f"{servers} servers cannot be divided over {wanted} pools"):
            pools_of(ranks, pool, 1, servers)
        return
    found = pools_of(ranks, pool, 1, servers)
    serving = np.bincount(found[ranks - servers :], minlength=wanted)
    assert serving.min() >= 1
    assert serving.max() - serving.min() <= 1


def test_work_stays_in_its_pool_and_evens_out_there() -> None:
    ranks, pool = 32, 8
    mask, layout = packed(ranks)
    options = DisaggregatedOptions(tolerance=0.02, pool=pool)
    assignment = assign(mask, layout, 8, 4, options)
    assert all(server // pool == task.home // pool for server, task in assignment.placed)
    for first in range(0, ranks, pool):
        work = assignment.work[first : first + pool]
        assert work.max() <= 1.0201 * work.mean()
    found = certificate(mask, layout, 8, 4, options)
    assert found.num_pools == 4
    assert found.planning_loss <= 1.0201 < found.pooling_loss
    assert found.busiest <= found.pooling_loss * found.planning_loss * (1 + 1e-9)
    program = plan(mask, layout, 8, 4, options)
    assert program.verify(mask).area == mask.area
    assert count(program, mask, Shape(128, 128)).imbalance == pytest.approx(found.busiest)


def test_sequences_are_dealt_evenly_and_completely() -> None:
    """The longest sequences go apart, every bin gets as many, and the largest bin is within its last sequence of the mean."""
    work = [Mask.documents(draw("prolong512k", 1 << 18, seed)).area for seed in range(64)]
    bins = deal_sequences(work, 4, 2)
    assert (np.bincount(bins, minlength=8) == 8).all()
    load = np.bincount(bins, weights=work)
    in_order = np.bincount(np.arange(64) // 8, weights=work)
    assert load.max() / load.mean() < min(1.05, in_order.max() / in_order.mean())
    assert np.array_equal(bins, deal_sequences(work, 4, 2))
    with pytest.raises(PlanError, match="10 sequences cannot be dealt evenly to 4 pools × 1 microbatches"):
        deal_sequences([1.0] * 10, 4, 1)


def test_a_certificate_bounds_the_plan_and_its_bytes() -> None:
    mask, layout = packed(16)
    options = DisaggregatedOptions(tolerance=0.02)
    found = certificate(mask, layout, 8, 4, options)
    assert found.before > 1.5
    assert 1 <= found.lower_bound <= found.busiest <= 1.0201
    assert found.binding == ""
    assert found.gap == found.busiest / found.lower_bound
    received = count(plan(mask, layout, 8, 4, options), mask, Shape(128, 128)).bytes_received_per_rank
    assert 0 < found.worst_byte_floor <= found.byte_floor <= received.sum()
    assert "busiest rank 1.0" in found.describe()
    assert "no bound" not in found.describe()


def test_what_cannot_be_divided_is_the_lower_bound() -> None:
    """Two tiles of work for eight ranks: the bound is a whole tile, and the plan meets it."""
    mask = Mask.documents([128, 128], causal=False)
    found = certificate(mask, Layout.contiguous(256, 8), 1, 1, DisaggregatedOptions(tolerance=0.02))
    assert found.lower_bound >= 1.0
    assert found.busiest >= found.lower_bound


def test_a_cap_that_stops_the_plan_is_named() -> None:
    """Receivers without room: load stays where it was, and the certificate says which cap is the reason."""
    mask, layout = packed(16)
    free = assign(mask, layout, 8, 4, DisaggregatedOptions(receive_bytes=1e15))
    assert free.usage is not None
    home = assign(mask, layout, 8, 4, DisaggregatedOptions(tolerance=10, receive_bytes=1e15))
    assert home.usage is not None
    unit = 2 * 128 * 2
    cap = float(home.usage.received.max() * unit) * 1.02
    assert cap < free.usage.received.max() * unit
    found = certificate(mask, layout, 8, 4, DisaggregatedOptions(tolerance=0.02, receive_bytes=cap))
    assert found.busiest > 1.02
    assert found.binding == "receive_bytes"
    assert "bound by receive_bytes" in found.describe()


def test_speeds_follow_measurements_slowly_and_within_bounds() -> None:
    speeds = (1.0, 1.0, 1.0, 1.0)
    for _ in range(40):
        speeds = updated_speeds(speeds, [1.0, 1.1, 9.0, 0.0], [1.0, 1.0, 1.0, 1.0])
    assert speeds[0] == 1.0
    assert speeds[3] == 1.0
    assert speeds[1] == pytest.approx(1 / 1.1, abs=4 / 64)
    assert speeds[1] < 1
    assert SLOWEST <= speeds[2] < SLOWEST + 4 / 64
    once = updated_speeds([1.0], [0.1], [1.0], weight=1.0)
    assert once == (FASTEST,)
    assert once == updated_speeds([1.0], [0.1], [1.0], weight=1.0)
    # Noise below half a step changes nothing, so that the plan stays.
    assert updated_speeds([1.0, 1.0], [1.01, 0.99], [1.0, 1.0]) == (1.0, 1.0)
    with pytest.raises(PlanError, match="one number a rank, got 2, 1 and 2"):
        updated_speeds([1.0, 1.0], [1.0], [1.0, 1.0])
    with pytest.raises(PlanError, match="weight must be in"):
        updated_speeds([1.0], [1.0], [1.0], weight=0.0)
