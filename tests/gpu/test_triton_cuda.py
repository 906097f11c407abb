"""The Triton kernels on a GPU against the dense fp64 oracle: at most twice the error of plain torch at the same dtype."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from distattn.kernels import BACKENDS, Case
from distattn.kernels.merge import empty_carry, finish
from distattn.kernels.protocol import Backend, Carry
from distattn.kernels.softmax.triton_backend import LaunchConfig, LaunchConfigs, TritonBackend
from distattn.kernels.tiles import UNBOUNDED
from tests.kernels.extras_cases import EXTRAS_CASES, run_whole, with_extras
from tests.kernels.oracle import CASES, ODD, Problem, Result, Sizes, nan_filled, oracle, problem, relative_error, run, table
from tests.kernels.test_triton import plain_torch

pytestmark = pytest.mark.gpu

U = UNBOUNDED
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LARGE = {
    "causal_1000": (table((0, 1000, 0, 1000, -U, 0, 0, 4, 0)), Sizes(1000, 1000, 4, 1, 4)),
    "window_1000": (table((0, 1000, 0, 1000, -300, 40, 0, 4, 0)), Sizes(1000, 1000, 4, 2, 2)),
    "ring": (
        table((0, 512, 0, 512, -U, 0, 0, 4, 0), (256, 512, 512, 1024, -U, U, 0, 4, 0)),
        Sizes(512, 1024, 4, 2, 2),
    ),
    # Rows 900 and up see nothing.
    "groups_1000": (table((0, 900, 0, 1000, -600, 90, 0, 16, 0)), Sizes(1000, 1000, 16, 2, 8)),
    "causal_4097": (table((0, 4097, 0, 4097, -U, 0, 0, 2, 0)), Sizes(4097, 4097, 2, 1, 2)),
    # Rows 700 and up see nothing; heads through a slot's shift; two tiles share rows 100 to 639.
    "slots": (
        table((0, 640, 0, 300, -U, U, 0, 5, 2), (100, 700, 300, 900, 11, 450, 0, 5, 2), (0, 700, 0, 900, -U, 0, 5, 6, 2)),
        Sizes(830, 901, 6, 2, 4),
    ),
}
ALL_CASES = {**CASES, **ODD, **LARGE}

# name → (case, sizes of the problem, arguments of ``with_extras``): block plans, positions and biases at sizes of their own.
LARGE_EXTRAS: dict[str, tuple[str, dict, dict]] = {
    "plan_1000": ("causal_1000", {"head_dim": 128}, {"blocks": (128, 128), "plan_heads": 1, "density": 0.4}),
    "plan_of_heads_1000": ("window_1000", {"batch": 2}, {"blocks": (64, 64), "plan_heads": 4, "plan_batch": 2}),
    "plan_4097": ("causal_4097", {"head_dim": 128}, {"blocks": (128, 64), "plan_heads": 2, "density": 0.2}),
    "plan_of_a_slot_1000": (
        "slots", {}, {"blocks": (128, 128), "plan_heads": 3, "model_heads": 12, "offsets": (200, 77, 5), "density": 0.7},
    ),
    "packs_1000": ("groups_1000", {"head_dim": 128, "batch": 2}, {"blocks": (64, 64), "plan_heads": 2, "plan_batch": 2}),
    "packs_of_two_1000": ("window_1000", {"head_dim": 128}, {"blocks": (64, 128), "plan_heads": 2}),
    "packs_with_everything_1000": (
        "groups_1000", {"head_dim": 128, "softcap": 5.0, "lse_gradient": True},
        {"blocks": (64, 64), "positions": True, "key_bias": True, "density": 0.4},
    ),
    "bias_1000": ("slots", {"softcap": 20.0, "lse_gradient": True}, {"key_bias": True}),
    "bias_and_positions_1000": ("window_1000", {"head_dim": 128}, {"key_bias": True, "positions": True}),
    "everything_1000": (
        "slots", {"softcap": 5.0, "lse_gradient": True},
        {"blocks": (64, 64), "positions": True, "key_bias": True, "density": 0.8},
    ),
}  # fmt: skip
ALL_EXTRAS = {**EXTRAS_CASES, **LARGE_EXTRAS}


@pytest.fixture(scope="module")
def backend() -> Backend:
    reason = BACKENDS["triton"].why_not(Case("cuda", BF16, 64, 64, 8, 2))
    if reason is not None:
        pytest.skip(f"gpu: triton {reason}")
    return BACKENDS["triton"]


def assert_within_twice_plain_torch(got: Result, p: Problem) -> None:
    want, plain = oracle(p), plain_torch(p)
    for field in fields(Result):
        error = relative_error(getattr(got, field.name), getattr(want, field.name))
        limit = 2 * max(torch.finfo(p.q.dtype).eps / 4, relative_error(getattr(plain, field.name), getattr(want, field.name)))
        if getattr(want, field.name).norm() < 1e-6:
            # A gradient that vanishes, as where rows see one key: plain torch may hit 0, fused kernels leave fp32 rounding.
            limit = max(limit, 5e-3)
        assert error <= limit, f"{field.name} is off by {error:.3g}, more than {limit:.3g}"


@pytest.mark.parametrize("name", ALL_CASES)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_error_is_at_most_twice_that_of_plain_torch(name: str, dtype: torch.dtype, backend: Backend) -> None:
    tiles, sizes = ALL_CASES[name]
    p = problem(tiles, sizes, head_dim=64, batch=2, dtype=dtype, device="cuda", splits=(1,))
    assert_within_twice_plain_torch(run(backend, p), p)


@pytest.mark.parametrize("whole", [False, True], ids=["carried", "whole"])
@pytest.mark.parametrize("name", ALL_EXTRAS)
def test_plans_positions_and_biases(name: str, whole: bool, backend: Backend) -> None:
    table_name, sizes, extras = ALL_EXTRAS[name]
    tiles, shape = ALL_CASES[table_name]
    p = problem(tiles, shape, **{"head_dim": 64, "dtype": BF16, "device": "cuda", **sizes})
    p = with_extras(p, **extras)
    assert_within_twice_plain_torch((run_whole if whole else run)(backend, p), p)


@pytest.mark.parametrize("name", ["causal_1000", "slots", "nothing_at_all", "documents"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_the_whole_without_a_carry(name: str, dtype: torch.dtype, backend: Backend) -> None:
    tiles, sizes = ALL_CASES[name]
    p = problem(tiles, sizes, head_dim=64, batch=2, dtype=dtype, device="cuda", lse_gradient=True)
    assert_within_twice_plain_torch(run_whole(backend, p), p)


@pytest.mark.parametrize(
    ("head_dim", "value_dim"), [(128, 128), (16, 16), (32, 64), (24, 40), (96, 96), (192, 128), (192, 192), (256, 256)], ids=str
)
@pytest.mark.parametrize("name", ["causal_1000", "slots"])
def test_head_dims(name: str, head_dim: int, value_dim: int, backend: Backend) -> None:
    tiles, sizes = ALL_CASES[name]
    p = problem(tiles, sizes, head_dim=head_dim, value_dim=value_dim, dtype=BF16, device="cuda")
    assert_within_twice_plain_torch(run(backend, p), p)


@pytest.mark.parametrize("softcap", [0.7, 20.0])
@pytest.mark.parametrize("name", ["window_1000", "slots"])
def test_softcap_and_the_gradient_through_the_lse(name: str, softcap: float, backend: Backend) -> None:
    tiles, sizes = ALL_CASES[name]
    p = problem(tiles, sizes, head_dim=64, dtype=BF16, device="cuda", softcap=softcap, lse_gradient=True)
    assert_within_twice_plain_torch(run(backend, p), p)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (128, 32)], ids=str)
def test_fp32_products_keep_24_bits(head_dim: int, value_dim: int, backend: Backend) -> None:
    tiles, sizes = ALL_CASES["slots"]
    p = problem(tiles, sizes, head_dim=head_dim, value_dim=value_dim, dtype=FP32, device="cuda")
    got, want = run(backend, p), oracle(p)
    for field in fields(Result):
        assert relative_error(getattr(got, field.name), getattr(want, field.name)) <= 3e-6, field.name


@pytest.mark.parametrize("whole", [False, True], ids=["carried", "whole"])
@pytest.mark.parametrize("name", ["slots", "rows_without_keys", "nothing_at_all"])
def test_outputs_may_begin_as_nan(name: str, whole: bool, backend: Backend) -> None:
    p = problem(*ALL_CASES[name], head_dim=64, batch=2, dtype=BF16, device="cuda", lse_gradient=True)
    with nan_filled():
        got = (run_whole if whole else run)(backend, p)
    assert_within_twice_plain_torch(got, p)


def test_slices_of_nan_filled_buffers(backend: Backend) -> None:
    tiles, sizes = ALL_CASES["ring"]
    p = problem(tiles, sizes, head_dim=64, batch=2, dtype=BF16, device="cuda")

    def packed(x: torch.Tensor) -> torch.Tensor:
        wide = torch.full((x.shape[0], x.shape[2] + 1, x.shape[1] + 3, x.shape[3] + 8), float("nan"), device="cuda", dtype=BF16)
        view = wide.transpose(1, 2)[:, 2:-1, 1:, : x.shape[3]]
        return view.copy_(x)

    p = replace(p, q=packed(p.q), k=packed(p.k), v=packed(p.v), do=packed(p.do))
    assert_within_twice_plain_torch(run(backend, p), p)


def test_reruns_and_orders_of_tiles_are_bitwise_equal(backend: Backend) -> None:
    tiles, sizes = ALL_CASES["slots"]
    p = problem(tiles, sizes, head_dim=128, dtype=BF16, device="cuda")
    first = run(backend, p)
    for again in (p, replace(p, tiles=tiles[::-1].copy())):
        second = run(backend, again)
        assert all(torch.equal(getattr(first, f.name), getattr(second, f.name)) for f in fields(Result))


def test_a_configuration_with_too_many_stages_takes_fewer() -> None:
    tiles, sizes = ALL_CASES["causal_1000"]
    p = problem(tiles, sizes, head_dim=128, dtype=BF16, device="cuda")
    wide = LaunchConfig(64, 128, 8, 6)
    assert_within_twice_plain_torch(run(TritonBackend(LaunchConfigs(wide, wide, wide)), p), p)


def test_rows_past_2_to_the_31_elements(backend: Backend) -> None:
    """The last rows of an arena whose element offsets do not fit 32 bits."""
    rows, heads, dim = (1 << 31) // (64 * 128) + 4096, 64, 128
    if torch.cuda.mem_get_info()[0] < 3 * rows * heads * dim * 2:
        pytest.skip("gpu: needs 13 GB of free device memory")
    q = torch.zeros(1, rows, heads, dim, dtype=BF16, device="cuda")
    q[:, -256:].normal_()
    k = torch.randn(1, 256, 8, dim, dtype=BF16, device="cuda")
    tiles = table((rows - 256, rows, 0, 256, -U, -(rows - 256), 63, 64, 0))
    carry = empty_carry(1, rows, 1, dim, dtype=BF16, device="cuda")
    # One head's rows as 64 heads, by a stride of 0: the full carry would not leave room.
    acc, m, l = carry.acc.expand(-1, -1, heads, -1), carry.m.expand(-1, -1, heads), carry.l.expand(-1, -1, heads)
    settings = {"scale": dim**-0.5, "softcap": None}
    backend.attend(q, k, k, tiles, Carry(acc, m, l), group=8, **settings)
    last = empty_carry(1, 256, 1, dim, dtype=BF16, device="cuda")
    small, head = table((0, 256, 0, 256, -U, 0, 0, 1, 0)), slice(63, 64)
    BACKENDS["reference"].attend(q[:, -256:, head], k[:, :, 7:], k[:, :, 7:], small, last, group=1, **settings)
    out, lse = finish(carry, BF16)
    want_out, want_lse = finish(last, BF16)
    assert relative_error(out[:, -256:], want_out) < 1e-2
    assert relative_error(lse[:, -256:], want_lse) < 1e-4


def test_an_empty_table_launches_nothing(backend: Backend) -> None:
    q = torch.randn(1, 8, 2, 16, dtype=BF16, device="cuda")
    carry = empty_carry(1, 8, 2, 16, dtype=BF16, device="cuda")
    backend.attend(q, q, q, np.zeros((0, 9), np.int64), carry, group=1, scale=1.0, softcap=None)
    assert (carry.l == 0).all()
