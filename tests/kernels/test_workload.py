"""What the busiest processor has to do beyond the mean, and which rows a vendor's kernel writes: plan only."""

from __future__ import annotations

import heapq
from dataclasses import replace

import numpy as np
import pytest

from distattn import Mask
from distattn.calibration import Calibration, KernelRate
from distattn.kernels.selection import LEAST_LAUNCH_S, Rates, predicted_seconds
from distattn.kernels.workload import BLOCK, PROCESSORS, SHARE_OF_DQ, count, work_of

U = 1 << 40
SHARED = Mask.share_question(128, [128] * 20)
"""Of one block that 20 others see: a row of one block and 20 of two; a column of 21 and 20 of one."""


def table_of(mask: Mask, heads: int = 8) -> np.ndarray:
    tiles = np.zeros((len(mask.bands), 9), np.int64)
    tiles[:, :6], tiles[:, 7] = mask.bands, heads
    return tiles


def test_a_launch_takes_as_long_as_its_busiest_processor() -> None:
    triton, fa4 = (work_of(name, [table_of(SHARED)], group=8)[name] for name in ("triton", "fa4"))
    mean = 8 * (1 + 20 * 2) / PROCESSORS
    # 160 programs of two blocks: some processors get two of them. One program for dk and dv has 8 heads of 21 blocks.
    assert triton.row_waits == pytest.approx(2 * 2 - mean)
    columns = 8 * 21 - mean
    assert triton.column_waits == pytest.approx(SHARE_OF_DQ * triton.row_waits + (1 - SHARE_OF_DQ) * columns)
    assert triton.terms(backward=False)[7] == triton.row_waits
    assert triton.terms(backward=True)[7] == triton.column_waits
    # A vendor's program for dk and dv has a head, each of the launches its own end.
    assert fa4.launches > 1
    assert fa4.column_waits < triton.column_waits


def test_rows_that_a_vendors_kernel_writes() -> None:
    causal = table_of(Mask.causal(1000))
    assert [work_of(name, [causal])[name].vendor_rows for name in ("fa4", "flash", "triton", "hopper")] == [8000, 8000, 0, 0]
    merged = work_of("fa4", [table_of(SHARED)])["fa4"]
    assert merged.vendor_rows == merged.rows > 0
    assert work_of("fa4", [causal])["fa4"].rows == 0


@pytest.mark.parametrize("seed", range(8))
def test_no_order_of_programs_is_faster_and_the_longest_first_nearly_as_fast(seed: int) -> None:
    """Graham's bound: the longest first is at most 4/3 of the best order, which is no shorter than what is counted."""
    rng = np.random.default_rng(seed)
    num, heads = int(rng.integers(1, 200)), int(rng.integers(1, 9))
    lengths = rng.integers(1, 60, num) if seed % 2 else np.where(rng.random(num) < 0.1, 500, 3)
    tiles = np.zeros((num, 9), np.int64)
    tiles[:, 0] = np.arange(num) * BLOCK
    tiles[:, 1], tiles[:, 3], tiles[:, 7] = tiles[:, 0] + BLOCK, lengths * BLOCK, heads
    tiles[:, 4], tiles[:, 5] = -U, U
    busy = [0.0] * PROCESSORS
    for length in sorted(np.repeat(lengths, heads), reverse=True):
        heapq.heapreplace(busy, busy[0] + float(length))
    mean = lengths.sum() * heads / PROCESSORS
    counted = mean + count([tiles]).row_waits
    assert max(mean, lengths.max()) <= counted + 1e-9
    assert counted <= max(busy) + 1e-9 <= 4 / 3 * counted + 1e-9


def test_launches_wait_each_for_itself() -> None:
    one, other = table_of(Mask.causal(1024), 1), table_of(Mask.full(512, 2048), 1)
    apart = [count([x]).row_waits for x in (one, other)]
    assert count([one, other]).row_waits == pytest.approx(sum(apart))
    assert all(x > 0 for x in apart)


@pytest.mark.parametrize("backward", [False, True])
def test_each_number_of_a_rate_multiplies_what_its_name_says(backward: bool) -> None:
    work = work_of("fa4", [table_of(SHARED)])["fa4"]
    steps = max(work.row_steps, work.column_steps) if backward else work.row_steps
    amounts = {
        "call_s": work.calls, "row_s": work.rows, "step_s": steps, "pair_s": work.pairs, "cut_pair_s": work.cut_pairs,
        "vendor_row_s": work.vendor_rows, "wait_s": work.column_waits if backward else work.row_waits,
    }  # fmt: skip
    nothing = KernelRate("fa4", backward, 128, *[0.0] * 6)
    for name, amount in amounts.items():
        rates = Rates(Calibration("", kernels=(replace(nothing, **{name: 1.0}),)), "a test")
        seconds = predicted_seconds({"fa4": work}, rates, backward=backward, width=128)
        # Beside what the host takes for launches, which is the same for all.
        wanted = amount + (LEAST_LAUNCH_S * work.terms(backward=backward)[1] if name == "call_s" else 0)
        assert seconds == pytest.approx(wanted), name
