"""What kernels take by the tiles of each rank, and that ``auto`` rests on it. Plan only."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from distattn.calibration import Calibration, KernelRate
from distattn.kernels.selection import LEAST_LAUNCH_S, Rates, predicted_seconds, shipped_rates
from distattn.kernels.workload import Work
from distattn.mask import Mask
from distattn.parallel import tile_time
from distattn.parallel.backward import derive_backward
from distattn.parallel.cost import attend_areas
from distattn.parallel.hardware import HARDWARE, Hardware
from distattn.parallel.kernel_time import Price
from distattn.parallel.layout import Layout, area_per_rank
from distattn.parallel.program import Program
from distattn.parallel.schedulers import ring, ulysses
from distattn.parallel.schedulers.auto import Candidate, LayoutChoice, _best_of, choose_strategy
from distattn.parallel.simulate import predict

H200 = replace(HARDWARE["h200"], kernels=shipped_rates().kernels, copy_gb_per_second=4300.0)


def found(program: Program, mask: Mask, hardware: Hardware = H200) -> tile_time.TileTime:
    made = tile_time.of_program(program, mask, attend_areas(program, mask), hardware, 128, 128)
    assert made is not None
    return made


def test_fragments_cost_more_than_their_area() -> None:
    mask = Mask.documents([512] * 32)
    whole = ring.plan(mask, Layout.contiguous(16384, 2), 64, 8)
    cut = ring.plan(mask, Layout.per_document_zigzag([512] * 32, 2, min_cut=1), 64, 8)
    areas = [area_per_rank(mask, program.layout) for program in (whole, cut)]
    np.testing.assert_allclose(areas[0], areas[1])
    assert found(cut, mask).seconds.max() > 1.5 * found(whole, mask).seconds.max()
    seconds = [predict(program, mask, H200, 128).free_links_seconds for program in (whole, cut)]
    assert seconds[1] > 1.5 * seconds[0], "the prediction sees it"


def test_a_kernel_must_suit_all_ranks() -> None:
    """The one whose slowest rank is the fastest, not the one that suits the busiest."""
    question = Mask.share_question(2048, [14336 // 64] * 64)
    made = found(ring.plan(question, Layout.contiguous(16384, 2), 64, 8), question)
    assert made.ranks.tolist() == [0, 1]
    slow = replace(H200, kernels=tuple(x for x in H200.kernels if x.backend in ("cudnn", "flash")))
    other = found(ring.plan(question, Layout.contiguous(16384, 2), 64, 8), question, slow)
    assert made.seconds.max() < other.seconds.max()
    assert other.launches.max() > 10 * made.launches.max()


def test_some_ranks_stand_for_all() -> None:
    work = np.arange(16.0)
    work[6] = 99
    assert tile_time.chosen_ranks(work).tolist() == [0, 6, 7, 15]
    assert tile_time.chosen_ranks(np.append(work, 1)).tolist() == [6]
    assert tile_time.chosen_ranks(np.ones(3)).tolist() == [0, 1, 2]
    factors = tile_time.factors(np.array([0, 2]), np.array([3.0, 0.0]), np.array([1.0, 1.0, 0.0, 2.0]))
    assert factors.tolist() == [3.0, 3.0, 0.0, 3.0], "a rank with nothing to do says nothing of others"


def test_what_is_cut_by_heads_to_fill_a_wait_is_one_call() -> None:
    mask = Mask.causal(8192)
    backward = derive_backward(ring.plan(mask, Layout.zigzag(8192, 2), 16, 16), ranks_per_node=8)
    calls = tile_time.calls_of(backward, mask, 0)
    assert sorted((int(x[0, 6]), int(x[0, 7])) for x in calls) == [(0, 16), (0, 16)]
    for program in (backward, ring.plan(mask, Layout.zigzag(8192, 2), 16, 16)):
        home, away = tile_time.calls_of(program, mask, 0)
        assert (home[0, :4].tolist(), away[0, :4].tolist()) == ([0, 4096, 0, 4096], [2048, 4096, 0, 4096]), "home comes first"
    full = Mask.full(8192, 8192)
    forward = ring.plan(full, Layout.contiguous(8192, 4), 16, 16)
    assert len(tile_time.calls_of(forward, full, 0)) == 4, "chunks that take turns in one place are calls of their own"


def test_sums_cost_where_results_of_several_calls_are_added() -> None:
    rates = tuple(x for x in H200.kernels if x.backend == "triton")
    machine = replace(H200, kernels=rates)
    free = replace(machine, copy_gb_per_second=float("inf"))
    for lengths, costs in (([8192, 8192], False), ([16384], True)):
        mask = Mask.documents(lengths)
        program = ring.plan(mask, Layout.contiguous(16384, 2), 8, 8)
        more = found(program, mask, machine).seconds - found(program, mask, free).seconds
        elements = 8192 * 8 * 128
        assert more == pytest.approx(costs * elements * tile_time.SUMS_BYTES[False] / 4.3e12)


def test_results_of_queries_that_came_go_through_sums() -> None:
    """A kernel that works in launches leaves results at home as they are, and those of others' queries in fp32."""
    machine = replace(H200, kernels=tuple(x for x in H200.kernels if x.backend == "fa4"))
    free = replace(machine, copy_gb_per_second=float("inf"))
    mask = Mask.causal(16384)
    at_home = ring.plan(mask, Layout.zigzag(16384, 2), 16, 16)
    moved = ulysses.plan(mask, Layout.contiguous(16384, 2), 16, 16)
    for program, elements in ((at_home, 0), (moved, 16384 * 8 * 128), (derive_backward(moved), 0)):
        more = found(program, mask, machine).seconds - found(program, mask, free).seconds
        assert more == pytest.approx(elements * tile_time.SUMS_BYTES[False] / 4.3e12)


def test_rows_cost_what_their_gradients_move() -> None:
    def row(group: int, *, backward: bool, kernel: str = "fa4") -> float:
        rates = Calibration("", kernels=tuple(replace(x, row_s=0.0) if x.backend == "cudnn" else x for x in H200.kernels))
        return tile_time._row_seconds(kernel, tile_time._Asked(Rates(rates, ""), 128, group, backward))

    assert row(1, backward=False) == row(8, backward=False)
    assert row(1, backward=True, kernel="flash") == pytest.approx(3 / 1.25 * row(8, backward=True, kernel="flash"))
    rate = Rates(Calibration("", kernels=H200.kernels), "").find("flash", True, 128)
    assert rate is not None
    rows = [row(group, backward=True, kernel="flash") for group in tile_time.RATED_GROUPS]
    assert np.mean(rows) == pytest.approx(rate.row_s)
    assert row(8, backward=True, kernel="cudnn") == pytest.approx(1.25 * tile_time.LEAST_ROW_S)


def test_what_launches_cost_the_host_is_not_the_devices_time() -> None:
    """Kernels of a few rows each: the device waits for none of them where the host is ahead."""
    machine = replace(H200, kernels=tuple(replace(x, launch_s=1.0, call_s=0.0) for x in H200.kernels if x.backend == "fa4"))
    mask = Mask.share_question(2048, [14336 // 64] * 64)
    program = ring.plan(mask, Layout.contiguous(16384, 2), 64, 8)
    made = found(program, mask, machine)
    assert made.launches.max() > 4
    assert made.seconds.max() == pytest.approx(1.0, rel=0.01), "one launch, which may be late"


def test_single_times_correct_the_rates_near_them() -> None:
    mask = Mask.causal(4096)
    program = ring.plan(mask, Layout.zigzag(4096, 1), 32, 4)
    rates = tuple(x for x in H200.kernels if x.backend == "fa4")
    plain, near = replace(H200, kernels=rates), replace(H200, kernels=rates, cells=shipped_rates().cells)
    slow = tuple(replace(x, ratio=2.0) for x in near.cells if x.cell.startswith("causal"))
    base = found(program, mask, plain).seconds.max()
    assert found(program, mask, near).seconds.max() == pytest.approx(base, rel=0.25)
    assert found(program, mask, replace(near, cells=slow)).seconds.max() > 1.5 * base


def test_a_known_kernel_says_nothing_of_another() -> None:
    """A measured time of the whole mask scales what its own kernel takes, and leaves others as their rates say."""
    mask = Mask.causal(16384)
    program = ring.plan(mask, Layout.zigzag(16384, 2), 64, 8)
    assert found(program, mask).backend == "fa4"
    base, twice = (
        predict(program, mask, H200, 128, price=Price("fa4", 0.0, 0.0, pair_s)).free_links_seconds for pair_s in (1e-12, 2e-12)
    )
    assert twice == pytest.approx(2 * base, rel=1e-6)
    base, twice = (
        predict(program, mask, H200, 128, price=Price("cudnn", 0.0, 0.0, pair_s)).free_links_seconds
        for pair_s in (1e-12, 2e-12)
    )
    assert twice == pytest.approx(base, rel=1e-6)


def test_a_named_kernel_is_predicted_by_its_own_rates() -> None:
    """Ideal and timeline alike; one without rates, or with those of one direction, by the fastest."""
    mask = Mask.documents([9000, 300, 7084])
    program = ring.plan(mask, Layout.zigzag(16384, 2), 32, 8)
    kernels = sorted({x.backend for x in H200.kernels})
    found = {kernel: predict(program, mask, H200, 128, kernel=kernel) for kernel in kernels}
    least = predict(program, mask, H200, 128)
    assert least.seconds <= min(x.seconds for x in found.values()) * 1.001
    for kernel, prediction in found.items():
        only = replace(H200, kernels=tuple(x for x in H200.kernels if x.backend in (kernel, "triton", "flash")))
        assert H200.rated(kernel) == kernel
        assert prediction.ideal_seconds <= prediction.seconds, kernel
        assert prediction.seconds == pytest.approx(predict(program, mask, only, 128, kernel=kernel).seconds), kernel
    assert found["cudnn"].ideal_seconds == found["flash"].ideal_seconds, "which computes what cudnn's cannot"
    assert len({round(1e9 * x.ideal_seconds) for x in found.values()}) == len(kernels) - 1
    one_way = replace(H200, kernels=tuple(x for x in H200.kernels if x.backward or x.backend != "hopper"))
    assert (H200.rated("auto"), H200.rated("reference"), one_way.rated("hopper")) == (None, None, None)
    tables = {
        name: choose_strategy(mask, 2, 32, 8, head_dim=128, hardware=H200, kernel=name).table for name in ("auto", "reference")
    }
    other = choose_strategy(mask, 2, 32, 8, head_dim=128, hardware=H200, kernel="hopper").table
    assert tables["auto"] == tables["reference"] != other


def test_many_launches_cost_the_host_whatever_the_rates_say() -> None:
    rate = KernelRate("cudnn", False, 128, call_s=0, launch_s=0, row_s=0, step_s=0, pair_s=1e-12, cut_pair_s=0)
    rates = Rates(Calibration("", kernels=(rate,)), "")
    one = Work(1, 1, 0, 0, 0, 0, 1e6, 0)
    assert predicted_seconds({"cudnn": one}, rates, backward=False, width=128) == pytest.approx(1e-6)
    many = one._replace(launches=18, merges=18)
    assert predicted_seconds({"cudnn": many}, rates, backward=False, width=128) == pytest.approx(36 * LEAST_LAUNCH_S)


def test_the_busiest_host_counts_launches() -> None:
    blocks = Mask.block_causal([8192], 512)
    program = ring.plan(blocks, Layout.contiguous(8192, 2), 8, 8)
    slow = replace(H200, kernels=tuple(x for x in H200.kernels if x.backend in ("cudnn", "flash")))
    hosts = [predict(program, blocks, machine, 128).host_seconds for machine in (H200, slow)]
    assert hosts[1] > hosts[0] + 8e-6 * H200.host_launch_us


def test_without_rates_nothing_is_known() -> None:
    mask = Mask.causal(1024)
    program = ring.plan(mask, Layout.zigzag(1024, 2), 8, 8)
    assert tile_time.of_program(program, mask, attend_areas(program, mask), HARDWARE["cpu"], 64, 64) is None
    nothing = Mask.from_bands(np.zeros((0, 6), np.int64), 1024, 1024)
    empty = ring.plan(nothing, Layout.contiguous(1024, 2), 8, 8)
    assert tile_time.of_program(empty, nothing, attend_areas(empty, nothing), H200, 64, 64) is None
    assert choose_strategy(nothing, 2, 8, 8, head_dim=64, hardware=H200).program.attends.shape[0] == 0


def test_of_candidates_about_as_fast_the_most_frugal_wins() -> None:
    mask = Mask.causal(256)
    program = ring.plan(mask, Layout.zigzag(256, 2), 8, 8)
    placed = LayoutChoice(program.layout, "given")

    def best(*entries: tuple[str, float, int, float], relaid: str = "") -> str:
        found = [
            Candidate(name, None, placed, program, seconds, 1.0, 0.0, memory, host, relaid=name == relaid)
            for name, seconds, memory, host in entries
        ]
        return _best_of(found).strategy

    assert best(("usp", 1.0, 100, 9), ("ulysses", 1.04, 50, 1)) == "usp", "4 % slower is slower"
    assert best(("usp", 1.0, 100, 9), ("ulysses", 1.02, 90, 99)) == "ulysses", "less memory"
    assert best(("usp", 1.0, 1000, 9), ("ulysses", 1.02, 1005, 8)) == "ulysses", "about as much, and less for the host"
    assert best(("double_ring", 1.0, 100, 9), ("ring", 1.01, 100, 9)) == "ring", "the simpler of two that are alike"
    alike = ("double_ring", 1.0, 100, 8), ("ring", 1.01, 100, 9)
    assert best(*alike) == best(*alike, relaid="double_ring") == "double_ring", "less for the host"
    placed = LayoutChoice(Layout.balanced(mask, 2), "least predicted time")
    assert best(*alike) == "double_ring", "the rule took it"
    assert best(*alike, relaid="double_ring") == "ring", "not balanced in chunks where the rule has another layout"
    assert best(*alike[:1], ("ring", 1.04, 100, 9), relaid="double_ring") == "double_ring", "4 % slower is slower"
