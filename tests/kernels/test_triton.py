"""The Triton kernels in Triton's interpreter, against the dense fp64 oracle; and their work lists, against brute force.

The interpreter is chosen where Triton is imported, so that kernels run in a process of their own, which this file starts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distattn.bench.masks import LONGCA_MASKS
from distattn.errors import InputError
from distattn.kernels import BACKENDS, Case, triton_here
from distattn.kernels.block_plan import BlockOperand, BlockPlan
from distattn.kernels.merge import empty_carry
from distattn.kernels.softmax import hopper_backend, triton_worklist
from distattn.kernels.softmax.hopper_backend import HopperBackend
from distattn.kernels.softmax.triton_backend import Call, TritonBackend, heads_alike
from distattn.kernels.softmax.triton_configs import INTERPRETER_CONFIG, LaunchConfigs
from distattn.kernels.softmax.triton_worklist import WorkList
from distattn.kernels.tiles import UNBOUNDED
from tests.kernels.extras_cases import EXTRAS_CASES, run_whole, with_extras
from tests.kernels.oracle import (
    CASES,
    ODD,
    Problem,
    Result,
    dense,
    nan_filled,
    oracle,
    problem,
    relative_error,
    run,
    table,
    visible,
)

U = UNBOUNDED
CPU = Case("cpu", torch.float32, 64, 64, 8, 2)
CPU_DEVICE = torch.device("cpu")

ALL_CASES = {**CASES, **ODD}


def plain_torch(p: Problem) -> Result:
    """Attention as one writes it in torch at the inputs' dtype, gradients by autograd."""
    return dense(p, p.q.dtype)


def spoiled(p: Problem) -> Problem:
    """The same problem with NaN in every row that no tile touches."""
    seen = visible(p.tiles, p.q.shape[1], p.k.shape[1], p.q.shape[2]).astype(bool)
    rows, keys = torch.from_numpy(seen.any(2).T), torch.from_numpy(seen.any((0, 1)))
    q, do = (x.masked_fill(~rows[None, :, :, None], float("nan")) for x in (p.q, p.do))
    k, v = (x.masked_fill(~keys[None, :, None, None], float("nan")) for x in (p.k, p.v))
    return replace(p, q=q, do=do, k=k, v=v)


def strided(x: Tensor) -> Tensor:
    """The same values as a slice of a packed, head-major, NaN-filled buffer."""
    wide = torch.full((x.shape[0], x.shape[2] + 1, x.shape[1] + 3, x.shape[3] + 16), float("nan"), dtype=x.dtype)
    view = wide.transpose(1, 2)[:, 2:-1, 1:, : x.shape[3]]
    view.copy_(x)
    return view


def packed(p: Problem) -> Problem:
    return replace(p, q=strided(p.q), k=strided(p.k), v=strided(p.v), do=strided(p.do))


def sparse_gradient(p: Problem) -> Problem:
    """The same gradient with gaps between its features, as autograd may hand it in."""
    return replace(p, do=torch.stack((p.do, torch.full_like(p.do, float("nan"))), -1).flatten(-2)[..., ::2])


def excess(
    name: str, options: dict[str, object], prepare: Callable[[Problem], Problem] | None = None, *, whole: bool = False
) -> dict[str, float]:
    """In the interpreter's process: each result's error over the limit, twice the error of plain torch.

    name: of a case with or without extras. whole: by the calls that need no carry. Outputs begin as NaN.
    """
    table_name, shape, extras = EXTRAS_CASES.get(name, (name, {}, {}))
    tiles, sizes = ALL_CASES[table_name]
    p = with_extras(problem(tiles, sizes, **{**shape, **options}), **extras)  # type: ignore[arg-type]
    want, plain = oracle(p), plain_torch(p)
    with np.errstate(all="ignore"), nan_filled():
        got = (run_whole if whole else run)(TritonBackend(), prepare(p) if prepare else p)
    floor = torch.finfo(p.q.dtype).eps / 2
    return {
        f.name: relative_error(getattr(got, f.name), getattr(want, f.name))
        / (2 * max(floor, relative_error(getattr(plain, f.name), getattr(want, f.name))))
        for f in fields(Result)
    }


def rerun_in_another_order(name: str) -> list[bool]:
    """In the interpreter's process: bitwise equality of the results of a table and of its tiles in reverse."""
    tiles, sizes = ALL_CASES[name]
    p = problem(tiles, sizes, head_dim=16, dtype=torch.float32)
    with np.errstate(all="ignore"):
        first, second = run(TritonBackend(), p), run(TritonBackend(), replace(p, tiles=tiles[::-1].copy()))
    return [torch.equal(getattr(first, f.name), getattr(second, f.name)) for f in fields(Result)]


def rerun_with_other_long_blocks(name: str) -> list[bool]:
    """In the interpreter's process: bitwise equality of results with no, some and all blocks long."""
    tiles, sizes = ALL_CASES[name]
    p = problem(tiles, sizes, head_dim=16, dtype=torch.float32)
    blocks, _ = triton_worklist.build(tiles, 32, 32)
    middle = (blocks[:, 7] / (blocks[:, 6] - blocks[:, 5])).mean() / blocks[:, 7].sum()
    share, found, answers = triton_worklist.LONG_SHARE, set(), []
    for triton_worklist.LONG_SHARE in (1.0, middle, 0.0):
        triton_worklist._remembered.cache_clear()
        work = triton_worklist.query_work(tiles, 32, 32, torch.device("cpu"))
        assert work is not None
        found.add((work.num_long > 0) + (work.num_long == work.num_blocks))
        with np.errstate(all="ignore"):
            answers.append(run(TritonBackend(), p))
    triton_worklist.LONG_SHARE = share
    triton_worklist._remembered.cache_clear()
    assert found == {0, 1, 2}, "none, some and all were to be long"
    return [torch.equal(getattr(answers[0], f.name), getattr(other, f.name)) for other in answers[1:] for f in fields(Result)]


def rerun_with_lists_in_another_order(name: str) -> list[bool]:
    """In the interpreter's process: bitwise equality of results under a plan and under the same lists in reverse."""
    table_name, shape, extras = EXTRAS_CASES[name]
    p = with_extras(problem(*ALL_CASES[table_name], **shape, head_dim=16, dtype=torch.float32), **extras)
    assert p.extras is not None
    assert p.extras.blocks is not None
    plan = p.extras.blocks.plan
    listed = plan.seen(0, plan.full.counts.shape[-1])
    reverse = [(x.sum(-1), (x * torch.arange(1, x.shape[-1] + 1)).argsort(-1, descending=True)) for x in listed]
    sizes = {name: getattr(plan, name) for name in ("num_queries", "num_keys", "block_q", "block_k")}
    other = BlockPlan.from_lists(*reverse[0], *reverse[1], **sizes)
    again = replace(p, extras=replace(p.extras, blocks=replace(p.extras.blocks, plan=other)))
    with np.errstate(all="ignore"):
        first, second = run_whole(TritonBackend(), p), run_whole(TritonBackend(), again)
    return [torch.equal(getattr(first, f.name), getattr(second, f.name)) for f in fields(Result)]


def rerun_with_a_program_a_head(name: str, whole: bool) -> tuple[int, list[bool]]:
    """In the interpreter's process: (heads a program of dq, bitwise equality of results with those of a head a program)."""
    table_name, shape, extras = EXTRAS_CASES[name]
    p = problem(*ALL_CASES[table_name], **shape, head_dim=16, dtype=torch.float32)
    alone, packed = replace(INTERPRETER_CONFIG, pack=1), replace(INTERPRETER_CONFIG, pack=4)
    chosen, answers = [], []
    for config in (alone, packed):
        backend, answer = TritonBackend(LaunchConfigs(config, config, config)), run_whole if whole else run
        again = with_extras(p, **extras)
        call = backend.call(p.q, p.k, p.v, p.tiles, p.group, p.scale, p.softcap, again.extras, whole=whole)
        chosen.append(call.configs.dq.pack)
        with np.errstate(all="ignore"), nan_filled():
            answers.append(answer(backend, again))
    assert chosen[0] == 1
    return chosen[1], [torch.equal(*(getattr(x, f.name) for x in answers)) for f in fields(Result)]


def gradients_of_hopper(name: str, whole: bool) -> dict[str, float]:
    """In the interpreter's process: how far ``hopper``'s gradients are from ``triton``'s, with ``triton``'s kernels in place of
    its own, which no interpreter runs: what is left is which work lists they get, and what of the call."""
    table_name, extras = HOPPER_CASES[name]
    p = with_extras(problem(*ODD[table_name], head_dim=16, dtype=torch.float32, lse_gradient=True), **extras)
    launched = []

    def launch(
        self: Call, kernel: Any, grid: tuple[int, int], work: WorkList, key_rows: int, do: Tensor, lse: Tensor, delta: Tensor,
        sums: tuple[Tensor, ...], constants: dict[str, int],
    ) -> None:  # fmt: skip
        launched.append(len(sums))
        assert grid[0] >= work.num_blocks
        portable = Call(**vars(self))
        if len(sums) == 1:
            by_query = portable.query_work(portable.configs.dq)
            assert by_query is not None
            portable.add_dq(by_query, do, lse, delta, *sums)
        else:
            by_key = portable.key_work()
            assert by_key is not None
            portable.add_dkdv(by_key, do, lse, delta, sums[0], sums[1])

    answer = run_whole if whole else run
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(hopper_backend, "_launch_backward", launch)
        patch.setattr(hopper_backend, "_kernel", str)
        triton, hopper = TritonBackend(), HopperBackend()
        patch.setattr(hopper, "attend", triton.attend)
        patch.setattr(hopper, "attend_whole", triton.attend_whole)
        want, got = answer(triton, p), answer(hopper, p)
    assert sorted(launched) == {"portable_plan": [], "pairs": [1]}.get(name, [1, 2])
    return {name: relative_error(getattr(got, name), getattr(want, name)) for name in ("dq", "dk", "dv")}


HOPPER_CASES: dict[str, tuple[str, dict]] = {
    "window": ("window_260", {}),
    "plan": ("window_260", {"blocks": (128, 128)}),
    "pairs": ("window_260", {"blocks": (64, 64)}),
    "portable_plan": ("shared_rows", {"blocks": (64, 64)}),
}


def assert_within_limits(errors: dict[str, float]) -> None:
    for name, error in errors.items():
        assert error <= 1, f"the error of {name} is {error:.3g} times its limit"


FP16, FP32 = torch.float16, torch.float32


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("causal_63", {"head_dim": 16, "dtype": FP16, "batch": 2}),
        ("causal_130", {"head_dim": 64, "dtype": FP32}),
        ("window_130", {"head_dim": 32, "dtype": FP32}),
        ("window_130", {"head_dim": 64, "value_dim": 32, "dtype": FP16}),
        ("shared_rows", {"head_dim": 16, "value_dim": 64, "dtype": FP32, "splits": (1,)}),
        ("shared_rows", {"head_dim": 20, "value_dim": 5, "dtype": FP16}),
        ("heads_of_a_slot", {"head_dim": 16, "dtype": FP16, "splits": (1,)}),
        ("documents", {"head_dim": 16, "dtype": FP32, "splits": (1, 2)}),
        ("tall_band", {"head_dim": 16, "dtype": FP32}),
        ("wide_causal", {"head_dim": 16, "dtype": FP32}),
        ("rows_without_keys", {"head_dim": 16, "dtype": FP16}),
        ("nothing_at_all", {"head_dim": 16, "dtype": FP32}),
        ("window_130", {"head_dim": 16, "dtype": FP32, "softcap": 0.7}),
        ("rows_without_keys", {"head_dim": 16, "dtype": FP32, "softcap": 20.0, "lse_gradient": True}),
        ("causal_63", {"head_dim": 16, "dtype": FP16, "lse_gradient": True}),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(f"{k}={v}".removeprefix("dtype=torch.") for k, v in x.items()),
)
def test_error_is_at_most_twice_that_of_plain_torch(name: str, options: dict[str, object], interpreter: Executor) -> None:
    assert_within_limits(interpreter.submit(excess, name, options).result())


@pytest.mark.parametrize("name", EXTRAS_CASES)
def test_extras_are_as_good_as_plain_torch(name: str, interpreter: Executor) -> None:
    assert_within_limits(interpreter.submit(excess, name, {"head_dim": 16, "dtype": FP32}).result())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("causal_63", {"head_dim": 16, "dtype": FP16, "batch": 2}),
        ("shared_rows", {"head_dim": 16, "value_dim": 32, "dtype": FP32, "lse_gradient": True}),
        ("rows_without_keys", {"head_dim": 16, "dtype": FP16}),
        ("nothing_at_all", {"head_dim": 16, "dtype": FP32}),
        ("heads_of_a_slot", {"head_dim": 16, "dtype": FP32}),
        ("plan_of_a_slot", {"head_dim": 16, "dtype": FP32}),
        ("everything", {"head_dim": 16, "dtype": FP32}),
        ("plan_of_each_head", {"head_dim": 16, "value_dim": 32, "dtype": FP16}),
        ("packs_of_kv_heads", {"head_dim": 20, "value_dim": 5, "dtype": FP16}),
        ("packs_of_a_slot", {"head_dim": 16, "dtype": FP32}),
    ],
    ids=str,
)
def test_the_whole_without_a_carry(name: str, options: dict[str, object], interpreter: Executor) -> None:
    assert_within_limits(interpreter.submit(excess, name, options, whole=True).result())


@pytest.mark.parametrize("whole", [False, True], ids=["carried", "whole"])
@pytest.mark.parametrize("name", HOPPER_CASES)
def test_hopper_has_the_same_backward_but_for_its_kernels(name: str, whole: bool, interpreter: Executor) -> None:
    errors = interpreter.submit(gradients_of_hopper, name, whole).result()
    assert set(errors.values()) == {0.0}, errors


@pytest.mark.parametrize(
    ("name", "whole", "pack"),
    [("packs_of_a_group", True, 4), ("packs_of_kv_heads", False, 4), ("packs_of_two", True, 2), ("packs_of_a_slot", False, 4)],
)
def test_a_pack_of_heads_computes_what_each_would_alone(name: str, whole: bool, pack: int, interpreter: Executor) -> None:
    found, equal = interpreter.submit(rerun_with_a_program_a_head, name, whole).result()
    assert found == pack
    assert all(equal)


@pytest.mark.parametrize(
    ("change", "alike"),
    [
        ({}, 4),
        ({"plan_heads": 4}, 2),
        ({"plan_heads": 8}, 1),
        ({"group": 2}, 2),
        ({"group": 1}, 1),
        ({"group": 3}, 1),
        ({"heads": (0, 8), "group": 8, "plan_heads": 1}, 8),
        ({"heads": (0, 6), "group": 8, "plan_heads": 1}, 2),
        ({"heads": (0, 5), "group": 8, "plan_heads": 1}, 1),
        ({"heads": (2, 6), "shift": 2, "offset": 6}, 4),
        ({"heads": (2, 6), "shift": 0, "offset": 6}, 2),
        ({"heads": (2, 6), "shift": 2, "offset": 5}, 1),
        ({"heads": (3, 7), "shift": 1, "offset": -3}, 4),
        ({"no_tiles": True}, 1),
    ],
    ids=str,
)
def test_which_heads_are_alike(change: dict[str, Any], alike: int) -> None:
    given = {"heads": (0, 8), "shift": 0, "offset": 0, "group": 4, "plan_heads": 2, "no_tiles": False, **change}
    listed = torch.ones(1, given["plan_heads"], 1, 1, dtype=torch.bool)
    plan = BlockPlan.from_blocks(listed, num_queries=64, num_keys=64, block_q=64, block_k=64)
    tiles = table() if given["no_tiles"] else table((0, 64, 0, 64, -U, U, *given["heads"], given["shift"]))
    operand = BlockOperand(plan, 8, np.tile(np.array((0, 0, given["offset"])), (len(tiles), 1)))
    assert heads_alike(tiles, operand, given["group"]) == alike


@pytest.mark.parametrize("name", ["plan_with_positions", "plan_128"])
def test_the_order_of_a_plans_lists_does_not_change_a_bit(name: str, interpreter: Executor) -> None:
    assert all(interpreter.submit(rerun_with_lists_in_another_order, name).result())


@pytest.mark.parametrize(
    ("name", "prepare"), [("shared_rows", spoiled), ("shared_rows", packed), ("rows_without_keys", sparse_gradient)]
)
def test_only_the_rows_of_tiles_are_read(name: str, prepare: Callable[[Problem], Problem], interpreter: Executor) -> None:
    assert_within_limits(interpreter.submit(excess, name, {"head_dim": 16, "dtype": FP32}, prepare).result())


def negated(p: Problem) -> Problem:
    return replace(p, q=-p.q, scale=-p.scale)


def test_a_negative_scale(interpreter: Executor) -> None:
    """Same scores; dq comes out negated, so only the others are compared."""
    errors = interpreter.submit(excess, "causal_63", {"head_dim": 16, "dtype": FP32}, negated).result()
    assert errors.pop("dq") > 1
    assert_within_limits(errors)


def test_the_order_of_tiles_does_not_change_a_bit(interpreter: Executor) -> None:
    assert all(interpreter.submit(rerun_in_another_order, "shared_rows").result())


@pytest.mark.parametrize("name", ["documents", "causal_130"])
def test_which_blocks_start_first_does_not_change_a_bit(name: str, interpreter: Executor) -> None:
    assert all(interpreter.submit(rerun_with_other_long_blocks, name).result())


@pytest.mark.parametrize("name", ALL_CASES)
@pytest.mark.parametrize(("block_rows", "block_columns"), [(32, 16), (16, 32), (128, 64)])
@pytest.mark.parametrize("by_key", [False, True], ids=["by_query", "by_key"])
def test_work_lists_visit_every_pair_once(name: str, block_rows: int, block_columns: int, by_key: bool) -> None:
    tiles, sizes = ALL_CASES[name]
    blocks, ranges = triton_worklist.build(tiles, block_rows, block_columns, sizes.group if by_key else 0)
    counts = np.zeros((sizes.heads, sizes.queries, sizes.keys), dtype=np.int64)
    if by_key:
        counts = counts.transpose(0, 2, 1)
    assert (np.diff(blocks[:, 7]) <= 0).all()
    for row0, row1, full, boundary, end, g0, g1, _ in blocks.tolist():
        assert 0 < row1 - row0 <= block_rows
        for number, (start, stop, lo, hi, h0, h1, shift, _) in enumerate(ranges[full:end].tolist(), full):
            diagonal = np.arange(start, stop)[None, :] - np.arange(row0, row1)[:, None]
            inside = (diagonal >= lo) & (diagonal <= hi)
            assert inside.any(0).all(), "a range holds a column that none of its rows sees"
            if number < boundary:
                assert inside.all()
                assert (stop - start) % block_columns == 0
            heads = [h for h in range(h0, h1) if g0 <= ((h + shift) // sizes.group if by_key else h) < g1]
            counts[heads, row0:row1, start:stop] += inside
    if by_key:
        counts = counts.transpose(0, 2, 1)
    assert np.array_equal(counts, visible(tiles, sizes.queries, sizes.keys, sizes.heads))


def test_a_long_causal_mask_masks_only_its_diagonal() -> None:
    n = 1 << 20
    blocks, ranges = triton_worklist.build(table((0, n, 0, n, -U, 0, 0, 64, 0)), 128, 128)
    full, masked = 0, 0
    for _, _, a, b, c, *_ in blocks[:100].tolist():
        full += int((ranges[a:b, 1] - ranges[a:b, 0]).sum())
        masked += int((ranges[b:c, 1] - ranges[b:c, 0]).sum())
    assert len(blocks) == n // 128
    assert masked == 100 * 128
    assert full == sum(n - 128 * (i + 1) for i in range(100)), "the longest blocks come first"


@pytest.mark.parametrize("name", LONGCA_MASKS)
def test_tables_of_a_million_tokens_grow_with_the_tokens_not_their_square(name: str) -> None:
    n = 1 << 20
    bands = LONGCA_MASKS[name](n, 42).bands
    tiles = np.concatenate((bands, np.tile(np.array((0, 64, 0)), (len(bands), 1))), 1)
    for work in (
        triton_worklist.query_work(tiles, 128, 128, CPU_DEVICE),
        triton_worklist.key_work(tiles, 128, 64, 8, CPU_DEVICE),
    ):
        assert work is not None
        assert n // 128 <= work.num_blocks < n // 128 + 2 * len(bands)
        assert len(work.ranges) < 8 * work.num_blocks


def test_positions_that_overflow_are_refused() -> None:
    with pytest.raises(InputError, match="takes rows below"):
        triton_worklist.build(table((0, 1 << 31, 0, 1, -U, U, 0, 1, 0)), 128, 128)


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = BACKENDS["triton"]
    monkeypatch.setattr(triton_here, "is_installed", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in str(backend.why_not(CPU))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.why_not(replace(CPU, softcap=True, lse_gradient=True, deterministic=True)) is None
    for change, word in (
        ({"dtype": torch.float64}, "float64"),
        ({"dtype": torch.bfloat16}, "bf16"),
        ({"head_dim": 300}, "300"),
        ({"device_type": "mps"}, "mps"),
    ):
        assert word in str(backend.why_not(replace(CPU, **change)))  # type: ignore[arg-type]
    monkeypatch.setattr(triton_here, "is_installed", lambda: False)
    assert backend.why_not(CPU) == "needs the package triton"


@pytest.mark.parametrize("name", ["q", "k", "v", "acc"])
def test_inputs_that_cannot_be_addressed_are_named(name: str) -> None:
    tiles, sizes = ALL_CASES["causal_63"]
    p = problem(tiles, sizes, dtype=torch.float32)
    carry = empty_carry(1, 63, 2, 8, dtype=torch.float32, device="cpu")
    sparse = torch.zeros(1, 63, 2, 16)[..., ::2]
    p = replace(p, **{name: sparse}) if name != "acc" else p
    carry = carry._replace(acc=sparse) if name == "acc" else carry
    with pytest.raises(InputError, match=rf"^{name} has stride 2 .* {name}\.contiguous"):
        TritonBackend().attend(p.q, p.k, p.v, tiles, carry, group=2, scale=1.0, softcap=None)


def test_inputs_of_another_dtype_are_named() -> None:
    tiles, sizes = ALL_CASES["causal_63"]
    p = problem(tiles, sizes, dtype=torch.float32)
    carry = empty_carry(1, 63, 2, 8, dtype=torch.float32, device="cpu")
    with pytest.raises(InputError, match=r"k is torch\.float16; with q of torch\.float32"):
        TritonBackend().attend(p.q, p.k.half(), p.v, tiles, carry, group=2, scale=1.0, softcap=None)


def test_the_package_imports_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import distattn.kernels"
    path = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env={**os.environ, "PYTHONPATH": path})
