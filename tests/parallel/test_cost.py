"""Plan only: counts against brute force and against formulas."""

import numpy as np
import pytest
import torch

from distattn.errors import ConfigError
from distattn.kernels import BACKENDS
from distattn.mask import Mask
from distattn.parallel import in_process
from distattn.parallel.backward import derive_backward
from distattn.parallel.cost import Cost, Shape, attend_areas, count
from distattn.parallel.layout import Layout
from distattn.parallel.program import KV, KV_IN, Q_IN, Q_OUT, Program, ProgramBuilder, Q
from distattn.parallel.schedulers import all_gather, ring, ulysses
from distattn.parallel.transport.mailbox import Mailbox, MailboxEndpoint

MASKS = {
    "causal": Mask.causal(67),
    "full": Mask.full(67, 67),
    "window": Mask.sliding_window(67, 9, 2),
    "documents": Mask.documents([31, 1, 14, 21]),
    "global_window": Mask.global_window(67, 5, 6, 1),
    "block_causal": Mask.block_causal([40, 27], 8),
    "nothing": Mask.causal(67).cut(0, 0, 0, 0),
}


def random_sets(builder: ProgramBuilder, rng: np.random.Generator, rows: int, number: int) -> np.ndarray:
    """Row sets of up to five disjoint ranges in random order."""
    ids = []
    for _ in range(number):
        cuts = np.unique(rng.integers(0, rows + 1, 2 * int(rng.integers(1, 6))))
        ranges = np.stack([cuts[:-1], cuts[1:]], 1)[::2]
        ids.append(builder.add_row_set(rng.permutation(ranges)))
    return np.array(ids)


def rows_of(program: Program, row_set: int) -> np.ndarray:
    parts = [np.arange(a, b) for a, b in program.rows(row_set).tolist()]
    return np.concatenate([np.zeros(0, np.int64), *parts])


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("seed", range(4))
def test_attend_areas_are_those_of_the_dense_mask(name: str, seed: int):
    mask, rng = MASKS[name], np.random.default_rng(seed)
    builder = ProgramBuilder(Layout.contiguous(67, 1), 1, 1)
    q, kv = random_sets(builder, rng, 67, 7), random_sets(builder, rng, 67, 7)
    attends = np.zeros((40, 7), np.int64)
    attends[:, 2], attends[:, 3], attends[:, 4], attends[:, 6] = 1, rng.choice(q, 40), rng.choice(kv, 40), 1
    builder.add_attends(attends)
    program, dense = builder.build(), mask.dense()
    expected = [dense[np.ix_(rows_of(program, a[3]), rows_of(program, a[4]))].sum() for a in program.attends.tolist()]
    assert attend_areas(program, mask).tolist() == expected


@pytest.mark.parametrize("scheduler", [ring, all_gather, ulysses], ids=lambda module: module.__name__.split(".")[-1])
@pytest.mark.parametrize("name", MASKS)
def test_all_work_is_counted_in_both_directions(scheduler, name: str):
    mask, shape = MASKS[name], Shape(16, 24)
    for ranks in (1, 2, 4):
        forward = scheduler.plan(mask, Layout.zigzag(67, ranks), 4, 2)
        for program, factor in ((forward, 2 * (16 + 24)), (derive_backward(forward), 2 * (3 * 16 + 2 * 24))):
            cost = count(program, mask, shape)
            assert cost.area == mask.area * 4
            assert cost.flops.sum() == mask.area * 4 * factor
            assert cost.traffic.diagonal().sum() == 0
            assert cost.bytes_sent_per_rank.sum() == cost.bytes_received_per_rank.sum()
            assert cost.imbalance >= 1


def test_backward_has_two_and_a_half_times_the_flops_where_value_and_head_dim_agree():
    shape = Shape(128, 128)
    assert shape.flops_per_pair(backward=False) == 4 * 128
    assert shape.flops_per_pair(backward=True) == 10 * 128


def ring_cost(ranks: int, rows: int, **changes) -> Cost:
    mask = Mask.full(rows, rows)
    return count(ring.plan(mask, Layout.contiguous(rows, ranks), 8, 2), mask, Shape(64, 64, **changes))


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float32", 4), ("float64", 8)])
def test_a_ring_sends_keys_and_values_to_the_next_rank_at_every_hop(dtype: str, size: int):
    cost = ring_cost(4, 400, dtype=dtype)
    chunk = 100 * 2 * (64 + 64) * size
    assert cost.bytes_sent_per_rank.tolist() == [3 * chunk] * 4
    assert cost.traffic[1, 2] == 3 * chunk
    assert cost.traffic[1, 3] == 0
    assert sorted(map(tuple, cost.messages[cost.messages[:, 2] == 0].tolist())) == [
        (0, 1, 0, 1, chunk),
        (1, 2, 0, 1, chunk),
        (2, 3, 0, 1, chunk),
    ]


def test_a_ring_holds_its_home_and_two_chunks_whatever_the_ranks():
    query = 100 * 8 * (64 * 2 + (64 + 2) * 4)
    chunk = 100 * 2 * (64 + 64) * 2
    for ranks in (4, 7):
        peak = ring_cost(ranks, 100 * ranks).peak_memory_bytes_per_rank
        assert peak.tolist() == [query + 3 * chunk] * ranks


def test_the_ring_backward_sums_gradients_in_fp32_on_the_wire():
    mask = Mask.full(400, 400)
    forward = ring.plan(mask, Layout.contiguous(400, 4), 8, 2)
    kept = count(derive_backward(forward, keep=True), mask, Shape(64, 64))
    resent = count(derive_backward(forward), mask, Shape(64, 64))
    gradients, keys = 100 * 2 * (64 + 64) * 4, 100 * 2 * (64 + 64) * 2
    assert kept.bytes_sent_per_rank.tolist() == [3 * gradients] * 4
    assert resent.bytes_sent_per_rank.tolist() == [3 * (gradients + keys)] * 4


def test_ulysses_sends_finished_results_in_the_input_dtype():
    mask = Mask.causal(100)
    program = ulysses.plan(mask, Layout.contiguous(100, 2), 4, 2)
    cost = count(program, mask, Shape(8, 16))
    queries, keys, out = 50 * 2 * 8 * 2, 50 * 1 * (8 + 16) * 2, 50 * 2 * (16 * 2 + 4)
    assert cost.bytes_sent_per_rank.tolist() == [queries + keys + out] * 2
    backward = count(derive_backward(program), mask, Shape(8, 16))
    sent = 50 * 2 * ((8 + 16) * 2 + 8) + 50 * 2 * 8 * 4 + 50 * (8 + 16) * (2 + 4)
    assert backward.bytes_sent_per_rank.tolist() == [sent] * 2


def helped_program() -> Program:
    """Rank 1 computes the second half of rank 0's queries over rank 0's keys, for rank 0 to merge or take."""
    builder = ProgramBuilder(Layout.given([[(0, 8)], []]), 1, 1)
    late, every = builder.add_row_set([(4, 8)]), builder.add_row_set([(0, 8)])
    q, kv = builder.add_slots(np.array([[1, Q, 0, 1, late], [1, KV, 0, 1, every]]))
    builder.add_moves(np.array([[Q_IN, 0, q, late, 0, 1], [KV_IN, 1, kv, every, 0, 1], [Q_OUT, q, 0, late, 2, 3]]))
    early = builder.add_row_set([(0, 4)])
    builder.add_attends(np.array([[0, 0, 1, early, every, 0, 1], [1, q, kv, late, every, 0, 1]]))
    return builder.build()


def test_a_result_that_is_merged_travels_as_accumulated():
    mask = Mask.causal(8)
    program = helped_program()
    program.verify(mask)
    cost = count(program, mask, Shape(8, 8))
    assert cost.bytes_sent_per_rank.tolist() == [4 * 8 * 2 + 8 * 16 * 2, 4 * (8 * 4 + 4)]
    assert cost.flops_per_rank.tolist() == [10 * 32, 26 * 32]
    assert cost.imbalance == pytest.approx(26 / 18)
    query, keys = 4 * (8 * 2 + 10 * 4), 8 * 16 * 2
    assert cost.resident_bytes[1].tolist() == [query + keys, query + keys, query, 0]


def test_rank_one_alone_sends_nothing():
    mask = Mask.causal(10)
    cost = count(ring.plan(mask, Layout.contiguous(10, 1), 2, 2), mask, Shape(4, 4))
    assert len(cost.messages) == 0
    assert cost.flops_per_rank.tolist() == [55 * 2 * 16]


def test_no_work_is_balanced():
    mask = MASKS["nothing"]
    cost = count(ring.plan(mask, Layout.contiguous(67, 3), 2, 2), mask, Shape(4, 4))
    assert cost.flops_per_rank.tolist() == [0, 0, 0]
    assert cost.imbalance == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 4), "head_dim=0"), ((4, -1), "value_dim=-1"), ((4, 4, "int8"), "choose one of float64, float32")],
)
def test_shapes_that_do_not_exist_are_refused(arguments: tuple, message: str):
    with pytest.raises(ConfigError, match=message):
        Shape(*arguments)


@pytest.mark.parametrize("scheduler", [ring, all_gather, ulysses], ids=lambda module: module.__name__.split(".")[-1])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("kernel", ["reference", "flash_cpu"])
def test_counted_bytes_are_those_that_the_executor_sends(
    monkeypatch: pytest.MonkeyPatch, scheduler, dtype: str, keep: bool, kernel: str
):
    endpoints = []

    class Recording(Mailbox):
        def endpoint(self, rank: int) -> MailboxEndpoint:
            endpoints.append(super().endpoint(rank))
            return endpoints[-1]

    monkeypatch.setattr(in_process, "Mailbox", Recording)
    mask, ranks, kind = Mask.documents([37, 3, 24]), 4, getattr(torch, dtype)
    forward = scheduler.plan(mask, Layout.zigzag(64, ranks), 4, 2)
    backward = derive_backward(forward, keep=keep)
    q, do = torch.randn(1, 64, 4, 8, dtype=kind), torch.randn(1, 64, 4, 16, dtype=kind)
    k, v = torch.randn(1, 64, 2, 8, dtype=kind), torch.randn(1, 64, 2, 16, dtype=kind)
    in_process.run_in_process(forward, mask, q, k, v, do, backend=BACKENDS[kernel], backward_program=backward)
    sent = [endpoint.bytes_sent for endpoint in endpoints]
    shape = Shape(8, 16, dtype, BACKENDS[kernel].needs_out)
    assert sent[:ranks] == count(forward, mask, shape).bytes_sent_per_rank.tolist()
    assert sent[ranks:] == count(backward, mask, shape).bytes_sent_per_rank.tolist()
    assert max(sent) > 0
