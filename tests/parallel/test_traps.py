"""All ranks in one process: mistakes that users of other engines met, each shown to be caught.

Every trap is a check that holds, and a bug that makes it fail: the mistake, put back. Names are the upstream threads in which
users report it. Those that need processes are in test_traps_gloo.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from distattn.errors import DistattnError
from distattn.kernels import BACKENDS, Case, choose_backend
from distattn.kernels.protocol import Carry
from distattn.mask import Mask
from distattn.parallel import backward as backward_module
from distattn.parallel import executor, lowering
from distattn.parallel.in_process import run_in_process
from distattn.parallel.layout import Layout, area_per_rank
from distattn.parallel.lowering import HOME_KV, lower
from distattn.parallel.need import analyse
from distattn.parallel.program import KV, KV_IN, MOVE_KIND, MOVE_ROWS, Program
from distattn.parallel.schedulers import SCHEDULERS, auto, ring, usp
from distattn.parallel.schedulers.auto import choose_layout
from distattn.parallel.schedulers.ring import RingOptions
from tests.parallel.cases import inputs, oracle

# The package's name ``distattn.attention`` is the function.
attention_module = importlib.import_module("distattn.attention")

Bug = Callable[[pytest.MonkeyPatch], None]
NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclass(frozen=True)
class Trap:
    """threads: where users met it; check: raises if the mistake is made; bug: makes it."""

    threads: str
    check: Callable[[], None]
    bug: Bug

    @property
    def id(self) -> str:
        return self.threads.split(",")[0]


def exact(
    mask: Mask, name: str, ranks: int, layout: Layout | None = None, heads: tuple[int, int] = (4, 2), options: Any = None
) -> None:
    """Verified, and out, lse and gradients equal the dense oracle's to 1e-10, with memory that holds NaN where unwritten."""
    layout = layout or choose_layout(mask, ranks, name, heads=heads[0], options=options).layout
    program = SCHEDULERS[name].plan(mask, layout, *heads, options)
    program.verify(mask)
    tensors = inputs(mask.num_queries, *heads)
    got = run_in_process(program, mask, *tensors, backend=BACKENDS["reference"], poison=True)
    for part, want in zip(NAMES, oracle(*tensors, mask), strict=True):
        torch.testing.assert_close(getattr(got, part), want, rtol=0, atol=1e-10, msg=lambda m, p=part: f"{name} {p}: {m}")


def lowered_under(other: Callable[[Mask], Mask]) -> Bug:
    """The kernels compute another mask than the one that was planned."""

    def put_back(patch: pytest.MonkeyPatch) -> None:
        build = lowering.build_tiles
        patch.setattr(lowering, "build_tiles", lambda mask, *rest: build(other(mask), *rest))

    return put_back


def all_causal(mask: Mask) -> Mask:
    return Mask.causal(mask.num_queries)


# ring-flash-attention#42, #67: the error grows with the ranks


def error_is_flat_in_ranks() -> None:
    mask = Mask.global_window(64, 8, 0)  # rows that sum over all ranks
    q, k, v, do = (x.to(torch.bfloat16) for x in inputs(64, 2, 2, 16, 16))
    want = oracle(q.double(), k.double(), v.double(), do.double(), mask)[3][:, :8]
    errors = []
    for ranks in (2, 16):
        program = SCHEDULERS["ring"].plan(mask, Layout.contiguous(64, ranks), 2, 2)
        got = run_in_process(program, mask, q, k, v, do, backend=BACKENDS["reference"]).dk
        assert got is not None
        errors.append(float((got[:, :8].double() - want).norm() / want.norm()))
    assert errors[1] < 1.1 * errors[0]


def sums_travel_in_bf16(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(executor.Shape, "travelling_sums", property(lambda shape: shape.dtype))


# ring-flash-attention#23: memory above expectation


def a_ring_holds_two_chunks() -> None:
    mask = Mask.causal(16 * 8)
    lowered = lower(SCHEDULERS["ring"].plan(mask, Layout.zigzag(16 * 8, 8), 4, 2), mask, 0)
    arena = sum(x.num_rows for i, x in enumerate(lowered.arenas) if x.kind == KV and i != HOME_KV)
    assert arena <= 16, "one chunk in the arena; the other is in flight"


def received_rows_are_never_reused(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lowering, "share_rows", lambda birth, death, sizes: (np.cumsum(sizes) - sizes, int(sizes.sum())))


# ring-flash-attention#52, #81, PR #82: an all-gather whose ranks have unequal work


def all_gather_is_balanced() -> None:
    for mask in (Mask.causal(4096), Mask.documents([1500, 40, 900, 1656]), Mask.share_question(1000, [700, 300, 96])):
        area = area_per_rank(mask, choose_layout(mask, 8, "all_gather").layout)
        assert area.max() <= 1.1 * area.mean()


def only_contiguous_layouts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(auto, "_layouts", lambda mask, ranks, contiguous: iter([contiguous]))


# ring-flash-attention#46, #39: packed zigzag crashes, or ranks call different collectives


def every_rank_posts_the_same_exchanges() -> None:
    mask = Mask.documents([3, 1, 30, 17, 5])
    layout = Layout.per_document_zigzag([3, 1, 30, 17, 5], 4, min_cut=1)
    exact(mask, "ring", 4, layout)
    # Only ranks 0 and 1 have rows for one another, and yet all must call what those two call.
    mask = Mask.documents([20, 4, 12, 12])
    program = SCHEDULERS["ring"].plan(mask, Layout.contiguous(48, 4), 4, 2)
    posted = {tuple((x.issue, x.due) for x in lower(program, mask, rank).exchanges) for rank in range(4)}
    assert len(posted) == 1


def ranks_skip_exchanges_without_rows_of_theirs(patch: pytest.MonkeyPatch) -> None:
    exchanges = lowering._Lowering._exchanges
    patch.setattr(
        lowering._Lowering, "_exchanges", lambda self, alone: tuple(x for x in exchanges(self, alone) if x.sends or x.receives)
    )


# EasyContext#47: a length that 2P does not divide breaks the backward. TransformerEngine#1930, #1929, Megatron-LM#1669: tokens
# of packed documents are dropped down to a multiple of 2P


def lengths_that_divide_by_nothing() -> None:
    for name in ("ring", "double_ring", "all_gather"):
        exact(Mask.causal(37), name, 4, Layout.zigzag(37, 4))


def zigzag_drops_the_rest(patch: pytest.MonkeyPatch) -> None:
    zigzag = Layout.zigzag
    patch.setattr(Layout, "zigzag", lambda rows, ranks: zigzag(rows // (2 * ranks) * 2 * ranks, ranks))


def packed_tokens_are_all_there() -> None:
    lengths = [13, 21, 9]
    layout = Layout.per_document_zigzag(lengths, 2, min_cut=1)
    assert layout.num_rows == sum(lengths)
    exact(Mask.documents(lengths), "ring", 2, layout)


def documents_are_rounded_down(patch: pytest.MonkeyPatch) -> None:
    cut = Layout.per_document_zigzag

    def rounded(lengths: list[int], ranks: int, **more: Any) -> Layout:
        return cut([x // (2 * ranks) * 2 * ranks for x in lengths], ranks, **more)

    patch.setattr(Layout, "per_document_zigzag", rounded)


# TransformerEngine#1557, Megatron-LM#1464: wrong gradients with point-to-point transfers


def ring_gradients() -> None:
    exact(Mask.causal(24), "ring", 4)


def gradients_overwrite_instead_of_adding(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(executor, "_add", executor._copy)


# TransformerEngine#3331, PR #3332: padding at the end drops real keys, and reruns differ


def padding_at_the_end_hides_no_key() -> None:
    mask = Mask.documents([7, 12, 6]).shift(0, 0) | Mask.from_bands(np.zeros((0, 6), np.int64), 25, 25)
    padded = Mask(32, 32, mask.bands)  # 7 rows of padding, which see and are seen by nobody
    for name in SCHEDULERS:
        exact(padded, name, 4, Layout.zigzag(32, 4))
    program = SCHEDULERS["ring"].plan(padded, Layout.zigzag(32, 4), 4, 2)
    tensors = [x.float() for x in inputs(32, 4, 2)]
    first, second = (run_in_process(program, padded, *tensors, backend=BACKENDS["reference"]) for _ in range(2))
    assert all(torch.equal(getattr(first, x), getattr(second, x)) for x in NAMES)


def the_last_key_of_a_tile_is_dropped(patch: pytest.MonkeyPatch) -> None:
    attend = executor.Execution._attend

    def shortened(self: Any, q: int, kv: int, tiles: np.ndarray) -> None:
        attend(self, q, kv, tiles - np.array([0, 0, 0, 1, 0, 0, 0, 0, 0]))

    patch.setattr(executor.Execution, "_attend", shortened)


# TransformerEngine#2186: NaN for very short documents


def very_short_documents() -> None:
    mask = Mask.documents([1, 2, 1, 1, 3, 1, 9, 1, 1])
    for options in (RingOptions(), RingOptions(moves="q")):
        exact(mask, "ring", 4, Layout.striped(20, 4), options=options)


def merging_without_care_for_empty_rows(patch: pytest.MonkeyPatch) -> None:
    def merge(carry: Carry, out: torch.Tensor, lse: torch.Tensor, **_: Any) -> None:
        m = torch.maximum(carry.m, lse)
        old, new = torch.exp(carry.m - m), torch.exp(lse - m)
        carry.acc.mul_(old.unsqueeze(-1)).addcmul_(new.unsqueeze(-1), out)
        carry.l.mul_(old).add_(new)
        carry.m.copy_(m)

    patch.setattr(executor, "merge_partial", merge)


# TransformerEngine#2541: sinks only with all-to-all


SINK = torch.tensor([0.7, -1.0, 2.0, 0.1], dtype=torch.double)


def sinks_under_every_scheduler() -> None:
    mask = Mask.sliding_window(24, 6)
    q, k, v, _ = inputs(24, 4, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, 2)) * 0.5
    scores = scores.masked_fill(~torch.from_numpy(mask.dense()), float("-inf"))
    weights = torch.softmax(torch.cat([scores, SINK.view(1, 4, 1, 1).expand(1, 4, 24, 1)], -1), -1)[..., :-1]
    want = torch.einsum("bhqk,bkhd->bqhd", weights, v.repeat_interleave(2, 2))
    for scheduler in SCHEDULERS.values():
        for options in scheduler.variants(4, 4, 4, 2):
            program = scheduler.plan(mask, Layout.zigzag(24, 4), 4, 2, options)
            got = run_in_process(program, mask, q, k, v, backend=BACKENDS["reference"])
            out = attention_module._with_sink(got.out, got.lse, SINK, False)
            assert isinstance(out, torch.Tensor)
            torch.testing.assert_close(out, want, rtol=0, atol=1e-10)


def sinks_join_every_partial_result(patch: pytest.MonkeyPatch) -> None:
    finish, with_sink = executor.finish, attention_module._with_sink

    def finish_with_sink(carry: Carry, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = finish(carry, dtype)
        if out.shape[2] != 4:  # a share of the heads
            return out, lse
        joined = with_sink(out, lse, SINK, True)
        return joined[0], joined[1]

    patch.setattr(executor, "finish", finish_with_sink)
    patch.setattr(attention_module, "_with_sink", lambda out, lse, sink, return_lse: out)


# TransformerEngine#2052, flash-attention#1807: masks other than causal. torchtitan#2417: FlexAttention's masks. pytorch#141429,
# #152261: non-causal with a balancing layout. axolotl#3608, PR #3867: packed documents as one causal sequence. accelerate#3867,
# PR #4198: windows as full causal


def masks_other_than_causal() -> None:
    for mask in (Mask.prefix_lm(24, 9), Mask.share_question(8, [7, 9]), Mask.global_window(24, 3, 4, 2)):
        exact(mask, "ring", 4, Layout.zigzag(24, 4))


def flex_masks() -> None:
    mask = Mask.from_flex((Mask.documents([9, 15]) & Mask.sliding_window(24, 5)).to_flex(block_size=8))
    for name in SCHEDULERS:
        exact(mask, name, 4, Layout.zigzag(24, 4))


def only_whole_blocks(mask: Mask) -> Mask:
    """What a BlockMask's index lists say without its mask function."""
    blocks = mask.dense().reshape(3, 8, 3, 8).any((1, 3))
    return Mask.from_bands([(8 * i, 8 * i + 8, 8 * j, 8 * j + 8, -99, 99) for i, j in np.argwhere(blocks).tolist()], 24, 24)


def full_masks_on_balancing_layouts() -> None:
    for name in SCHEDULERS:
        exact(Mask.full(24, 24), name, 4, Layout.zigzag(24, 4))


def packed_documents() -> None:
    for name in SCHEDULERS:
        exact(Mask.documents([5, 12, 1, 6]), name, 4, Layout.zigzag(24, 4))


def windows_in_every_scheduler() -> None:
    for name in SCHEDULERS:
        exact(Mask.sliding_window(24, 5), name, 4, Layout.contiguous(24, 4))


# Megatron-LM PR #1160, PR #5597: windows move whole chunks


def windows_move_the_halo_only() -> None:
    mask = Mask.sliding_window(64, 3)
    exact(mask, "ring", 4, Layout.contiguous(64, 4))
    program = SCHEDULERS["ring"].plan(mask, Layout.contiguous(64, 4), 4, 2)
    sent = program.moves[program.moves[:, MOVE_KIND] == KV_IN, MOVE_ROWS]
    assert program.row_counts[sent].tolist() == [3, 3, 3]


def every_rank_needs_every_chunk(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ring, "analyse", lambda mask, *layouts: analyse(Mask.full(*mask.shape), *layouts))


# Megatron-LM#5643, Megatron-Bridge#4586, SkyRL#1019, verl PR #5057: the number of ranks changes during a run


def ranks_change_between_calls() -> None:
    for ranks in (4, 2, 3, 1, 4):
        exact(Mask.causal(24), "ring", ranks, Layout.contiguous(24, ranks))


def plans_are_told_apart_by_mask_alone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Program, "digest", property(lambda program: f"{program.backward}"))


# torchtitan#3340, pytorch#147793: no context parallelism in fp32, or on a CPU


def cpu_and_fp32() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        backend, _ = choose_backend(Case("cpu", dtype, 8, 8, 4, 2))
        q, k, v, do = (x.to(dtype) for x in inputs(16, 4, 2, 8, 8))
        program = SCHEDULERS["ring"].plan(Mask.causal(16), Layout.zigzag(16, 2), 4, 2)
        got = run_in_process(program, Mask.causal(16), q, k, v, do, backend=backend)
        assert got.out.dtype == dtype
        want = oracle(q.double(), k.double(), v.double(), do.double(), Mask.causal(16))
        torch.testing.assert_close(got.out.double(), want[0], rtol=2e-2, atol=2e-2)


def no_kernel_on_a_cpu(patch: pytest.MonkeyPatch) -> None:
    for backend in BACKENDS.values():
        patch.setattr(type(backend), "why_not", lambda self, case: "needs a GPU and 16 bits")


# DeepSpeed#7473, #5248, #5419, #7458, #7833, PR #8587, PR #8316: Ulysses scales gradients, and keeps head counts in globals


def ulysses_gradients_and_head_counts() -> None:
    for heads in ((8, 2), (8, 4), (4, 4), (8, 2)):
        exact(Mask.causal(24), "ulysses", 4, heads=heads)


def gradients_count_every_rank(patch: pytest.MonkeyPatch) -> None:
    result = executor.Execution.result

    def scaled(self: executor.Execution) -> tuple[torch.Tensor, ...]:
        return tuple(x * self.lowered.num_ranks for x in result(self)) if self.lowered.backward else result(self)

    patch.setattr(executor.Execution, "result", scaled)


# verl#1226, prime-rl PR #3042, LlamaFactory PR #10794, vllm-omni PR #5716, InternEvo PR #224: fewer KV heads than ranks


def fewer_kv_heads_than_ranks() -> None:
    for name in SCHEDULERS:
        for heads in ((8, 1), (8, 2)):
            exact(Mask.causal(24), name, 4, heads=heads)


def kv_heads_are_dealt_round_robin(patch: pytest.MonkeyPatch) -> None:
    make = usp._Grid.make

    def wrong(options: Any, share: int, builder: Any) -> Any:
        grid = make(options, share, builder)
        first = grid.key_member % builder.kv_heads
        object.__setattr__(grid, "k0", first)
        object.__setattr__(grid, "k1", first + 1)
        return grid

    patch.setattr(usp._Grid, "make", wrong)


# Automodel PR #3157: the ring's backward reuses stale keys


def the_backward_fetches_its_keys() -> None:
    exact(Mask.causal(24), "ring", 4)


def keys_of_the_last_stage_are_taken_for_all(patch: pytest.MonkeyPatch) -> None:
    def nothing(program: Program, attends: np.ndarray, ranks_per_node: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return np.zeros((0, 6), np.int64), program.row_ptr, program.row_ranges

    patch.setattr(backward_module, "_route_keys", nothing)


TRAPS = [
    Trap("ring-flash-attention#42, #67", error_is_flat_in_ranks, sums_travel_in_bf16),
    Trap("ring-flash-attention#23", a_ring_holds_two_chunks, received_rows_are_never_reused),
    Trap("ring-flash-attention#52, #81, PR #82", all_gather_is_balanced, only_contiguous_layouts),
    Trap("ring-flash-attention#46, #39", every_rank_posts_the_same_exchanges, ranks_skip_exchanges_without_rows_of_theirs),
    Trap("EasyContext#47", lengths_that_divide_by_nothing, zigzag_drops_the_rest),
    Trap("TransformerEngine#1557, Megatron-LM#1464", ring_gradients, gradients_overwrite_instead_of_adding),
    Trap("TransformerEngine#3331, PR #3332", padding_at_the_end_hides_no_key, the_last_key_of_a_tile_is_dropped),
    Trap("TransformerEngine#1930, #1929, Megatron-LM#1669", packed_tokens_are_all_there, documents_are_rounded_down),
    Trap("TransformerEngine#2186", very_short_documents, merging_without_care_for_empty_rows),
    Trap("TransformerEngine#2541", sinks_under_every_scheduler, sinks_join_every_partial_result),
    Trap("TransformerEngine#2052, flash-attention#1807", masks_other_than_causal, lowered_under(all_causal)),
    Trap("Megatron-LM PR #1160, PR #5597", windows_move_the_halo_only, every_rank_needs_every_chunk),
    Trap("Megatron-LM#5643, Megatron-Bridge#4586, SkyRL#1019, verl PR #5057", ranks_change_between_calls,
         plans_are_told_apart_by_mask_alone),
    Trap("torchtitan#2417", flex_masks, lowered_under(only_whole_blocks)),
    Trap("torchtitan#3340, pytorch#147793", cpu_and_fp32, no_kernel_on_a_cpu),
    Trap("pytorch#141429, #152261", full_masks_on_balancing_layouts, lowered_under(all_causal)),
    Trap("axolotl#3608, PR #3867", packed_documents, lowered_under(all_causal)),
    Trap("accelerate#3867, PR #4198", windows_in_every_scheduler, lowered_under(all_causal)),
    Trap("DeepSpeed#7473, #5248, #5419, #7458, #7833, PR #8587, PR #8316", ulysses_gradients_and_head_counts,
         gradients_count_every_rank),
    Trap("verl#1226, prime-rl PR #3042, LlamaFactory PR #10794, vllm-omni PR #5716, InternEvo PR #224",
         fewer_kv_heads_than_ranks, kv_heads_are_dealt_round_robin),
    Trap("Automodel PR #3157", the_backward_fetches_its_keys, keys_of_the_last_stage_are_taken_for_all),
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_cached_lowerings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs lowered with a bug must not be found without it, nor the other way round."""
    monkeypatch.setattr(lowering, "_cache", type(lowering._cache)())


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.id)
def test_holds(trap: Trap) -> None:
    trap.check()


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.id)
def test_fails_with_the_bug_put_back(trap: Trap, monkeypatch: pytest.MonkeyPatch) -> None:
    trap.bug(monkeypatch)
    with pytest.raises((AssertionError, DistattnError, IndexError, RuntimeError)):
        trap.check()
