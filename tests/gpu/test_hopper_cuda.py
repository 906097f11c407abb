"""The Hopper kernels on a GPU against the dense fp64 oracle, on the grid of the portable ones and with the same limits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from distattn.kernels import BACKENDS, Case
from distattn.kernels.protocol import Backend
from distattn.kernels.softmax import hopper_backend, triton_worklist
from distattn.kernels.tiles import UNBOUNDED
from tests.gpu.test_triton_cuda import ALL_CASES, assert_within_twice_plain_torch
from tests.kernels.extras_cases import run_whole, with_extras
from tests.kernels.oracle import Sizes, nan_filled, problem, run, table
from tests.kernels.test_triton import spoiled

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16


# name → (table, arguments of ``with_extras``). Under blocks of 64 programs take pairs of heads. The portable kernels compute
# all dk and dv of blocks of 64, and the last two.
PLANS: dict[str, tuple[str, dict]] = {
    "of_all_heads": ("causal_1000", {"blocks": (128, 128), "density": 0.4}),
    "of_kv_heads": ("window_1000", {"blocks": (128, 128), "plan_heads": 2}),
    "long": ("causal_4097", {"blocks": (128, 128), "density": 0.2}),
    "of_a_slot": ("slots", {"blocks": (128, 128), "plan_heads": 3, "model_heads": 12, "offsets": (200, 77, 2), "density": 0.7}),
    "of_documents": ("documents", {"blocks": (128, 128), "plan_heads": 2}),
    "of_all_blocks": ("window_1000", {"blocks": (128, 128), "density": 1.0}),
    "of_no_block": ("causal_1000", {"blocks": (128, 128), "density": 0.0}),
    "of_pairs": ("causal_1000", {"blocks": (64, 64), "density": 0.4}),
    "of_pairs_of_kv_heads": ("window_1000", {"blocks": (64, 64), "plan_heads": 2}),
    "of_pairs_long": ("causal_4097", {"blocks": (64, 64), "density": 0.1}),
    "of_pairs_of_documents": ("documents", {"blocks": (64, 64), "plan_heads": 2}),
    "of_pairs_of_a_slot": (
        "a_group_of_4", {"blocks": (64, 64), "plan_heads": 4, "model_heads": 16, "offsets": (50, 101, 6), "density": 0.7},
    ),
    "of_pairs_of_groups": ("groups_1000", {"blocks": (64, 64), "plan_heads": 2}),
    "of_pairs_of_no_block": ("causal_1000", {"blocks": (64, 64), "density": 0.0}),
    "of_query_heads": ("window_1000", {"blocks": (128, 128), "plan_heads": 4}),
    "of_small_blocks": ("slots", {"blocks": (64, 64), "density": 0.4}),
}  # fmt: skip


@pytest.fixture(scope="module")
def backend() -> Backend:
    reason = BACKENDS["hopper"].why_not(Case("cuda", BF16, 64, 64, 8, 2))
    if reason is not None:
        pytest.skip(f"gpu: hopper {reason}")
    return BACKENDS["hopper"]


@pytest.mark.parametrize("name", ALL_CASES)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_error_is_at_most_twice_that_of_plain_torch(name: str, dtype: torch.dtype, head_dim: int, backend: Backend) -> None:
    tiles, sizes = ALL_CASES[name]
    p = problem(tiles, sizes, head_dim=head_dim, batch=2, dtype=dtype, device="cuda", splits=(1,), lse_gradient=True)
    assert_within_twice_plain_torch(run(backend, p), p)


@pytest.mark.parametrize("name", ALL_CASES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_whole_without_a_carry(name: str, head_dim: int, backend: Backend) -> None:
    tiles, sizes = ALL_CASES[name]
    p = problem(tiles, sizes, head_dim=head_dim, batch=2, dtype=BF16, device="cuda", lse_gradient=True)
    assert_within_twice_plain_torch(run_whole(backend, p), p)


@pytest.mark.parametrize("whole", [False, True], ids=["carried", "whole"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", PLANS)
def test_block_plans(name: str, head_dim: int, whole: bool, backend: Backend) -> None:
    table_name, extras = PLANS[name]
    p = problem(*ALL_CASES[table_name], head_dim=head_dim, batch=2, dtype=BF16, device="cuda", lse_gradient=True)
    p = with_extras(p, **extras)
    assert_within_twice_plain_torch((run_whole if whole else run)(backend, p), p)


@pytest.mark.parametrize("name", ["ring", "slots", "documents", "heads_apart"])
@pytest.mark.parametrize("whole", [False, True], ids=["carried", "whole"])
def test_rows_that_no_tile_holds_may_be_nan(name: str, whole: bool, backend: Backend) -> None:
    tiles, sizes = ALL_CASES[name]
    p = problem(tiles, sizes, head_dim=128, dtype=BF16, device="cpu")
    on_device = {key: getattr(spoiled(p), key).cuda() for key in ("q", "k", "v", "do", "dlse")}
    dirty = replace(p, **on_device)
    clean = replace(p, **{key: getattr(p, key).cuda() for key in ("q", "k", "v", "do", "dlse")})
    answer = run_whole if whole else run
    got, want = answer(backend, dirty), answer(backend, clean)
    # Rows of q and do that are NaN have gradients that nobody asks for; keys and values take no part in them.
    assert torch.equal(got.lse, want.lse)
    assert torch.equal(got.out, want.out)


@pytest.mark.parametrize("whole", [False, True], ids=["carried", "whole"])
@pytest.mark.parametrize("name", ["slots", "rows_without_keys", "nothing_at_all"])
def test_outputs_may_begin_as_nan(name: str, whole: bool, backend: Backend) -> None:
    p = problem(*ALL_CASES[name], head_dim=64, batch=2, dtype=BF16, device="cuda", lse_gradient=True)
    with nan_filled():
        got = (run_whole if whole else run)(backend, p)
    assert_within_twice_plain_torch(got, p)


@pytest.mark.parametrize("offset", [0, 1])
def test_slices_of_nan_filled_buffers(offset: int, backend: Backend) -> None:
    """offset 1: addresses and strides that the copy engine does not take."""
    tiles, sizes = ALL_CASES["ring"]
    p = problem(tiles, sizes, head_dim=64, batch=2, dtype=BF16, device="cuda")

    def packed(x: torch.Tensor) -> torch.Tensor:
        shape = (x.shape[0], x.shape[2] + 1, x.shape[1] + 3, x.shape[3] + 8 + offset)
        view = torch.full(shape, float("nan"), device="cuda", dtype=BF16).transpose(1, 2)[
            :, 2:-1, 1:, offset : offset + x.shape[3]
        ]
        return view.copy_(x)

    p = replace(p, q=packed(p.q), k=packed(p.k), v=packed(p.v), do=packed(p.do))
    assert_within_twice_plain_torch(run(backend, p), p)


@pytest.mark.parametrize("long_share", [1.0, 0.005, 0.0], ids=["none", "some", "all"])
@pytest.mark.parametrize("busiest", [0.0, 99.0], ids=["a_program_each", "persistent"])
def test_any_order_of_programs(long_share: float, busiest: float, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 32 blocks none, some or all are long; programs take one each, or several in turn."""
    monkeypatch.setattr(triton_worklist, "LONG_SHARE", long_share)
    monkeypatch.setattr(hopper_backend, "MAX_BUSIEST", busiest)
    triton_worklist._remembered.cache_clear()
    n = 4096
    tiles, sizes = table((0, n, 0, n, -UNBOUNDED, 0, 0, 4, 0)), Sizes(n, n, 4, 2, 2)
    p = problem(tiles, sizes, head_dim=64, batch=2, dtype=BF16, device="cuda")
    assert_within_twice_plain_torch(run_whole(backend, p), p)
    triton_worklist._remembered.cache_clear()


@pytest.mark.parametrize("busiest", [0.0, 99.0], ids=["a_program_each", "persistent"])
def test_pairs_in_any_order_of_programs(busiest: float, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_backend, "MAX_BUSIEST", busiest)
    p = problem(*ALL_CASES["causal_4097"], head_dim=64, batch=2, dtype=BF16, device="cuda")
    p = with_extras(p, blocks=(64, 64), density=0.3)
    assert_within_twice_plain_torch(run_whole(backend, p), p)


def test_a_negative_scale(backend: Backend) -> None:
    tiles, sizes = ALL_CASES["window_1000"]
    p = replace(problem(tiles, sizes, head_dim=128, dtype=BF16, device="cuda"), scale=-0.1)
    assert_within_twice_plain_torch(run(backend, p), p)
    assert_within_twice_plain_torch(run_whole(backend, p), p)


def test_reruns_and_orders_of_tiles_are_bitwise_equal(backend: Backend) -> None:
    tiles, sizes = ALL_CASES["slots"]
    p = problem(tiles, sizes, head_dim=128, dtype=BF16, device="cuda")
    first = run(backend, p)
    for again in (p, replace(p, tiles=tiles[::-1].copy())):
        second = run(backend, again)
        assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in ("out", "lse", "dq", "dk", "dv"))


@pytest.mark.parametrize("block", [64, 128])
def test_under_a_block_plan_all_results_are_bitwise_equal_in_reruns(block: int, backend: Backend) -> None:
    p = with_extras(problem(*ALL_CASES["causal_4097"], head_dim=128, dtype=BF16, device="cuda"), blocks=(block, block))
    first, second = run_whole(backend, p), run_whole(backend, p)
    assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in ("out", "lse", "dq", "dk", "dv"))


def test_what_it_does_not_take(backend: Backend) -> None:
    taken = Case("cuda", BF16, 128, 128, 8, 2)
    for change in ({}, {"deterministic": True}, {"lse_gradient": True}, {"block_plan": True}):
        assert backend.why_not(replace(taken, **change)) is None
    for change, words in (
        ({"dtype": torch.float32}, "computes bf16 and fp16"),
        ({"head_dim": 96, "value_dim": 96}, "takes head dimensions 64 and 128"),
        ({"softcap": True}, "takes no soft-cap"),
        ({"key_bias": True}, "takes no bias of keys"),
    ):
        assert words in (backend.why_not(replace(taken, **change)) or "")
