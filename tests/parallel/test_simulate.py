"""Plan only: the event model on schedules that are small enough to work out by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from distattn.calibration import Calibration, KernelRate, LinkRate
from distattn.errors import ConfigError
from distattn.mask import Mask
from distattn.parallel import kernel_time
from distattn.parallel.backward import derive_backward
from distattn.parallel.cost import Shape, count
from distattn.parallel.hardware import HARDWARE, Hardware, calibrated, find_hardware, hardware_here
from distattn.parallel.layout import Layout
from distattn.parallel.schedulers import SCHEDULERS, all_gather, ring
from distattn.parallel.simulate import STRIDED_GB_PER_SECOND, Timeline, predict, simulate, total_seconds
from distattn.parallel.tile_time import SUMS_BYTES

# One FLOP and one byte take a second.
UNIT = Hardware(
    name="unit",
    ranks_per_node=1 << 20,
    forward_tflops=1e-12,
    backward_tflops=1e-12,
    inside_gb_per_second=1e-9,
    between_gb_per_second=1e-9,
    inside_latency_us=0,
    between_latency_us=0,
    launch_us=0,
)


def run(compute: list[list[float]], messages: list[tuple[int, ...]], hardware: Hardware = UNIT) -> Timeline:
    """messages: (issue, due, src, dst, seconds)."""
    table = np.array(messages, np.int64).reshape(-1, 5)
    return simulate(np.array(compute, float), table, table[:, 4].astype(float), hardware)


def test_a_transfer_that_fits_under_the_compute_is_hidden():
    line = run([[5, 5], [5, 5]], [(0, 1, 0, 1, 3)])
    assert line.seconds == 10
    assert line.received.tolist() == [3]
    assert line.wait_seconds_per_rank.tolist() == [0, 0]


def test_what_does_not_fit_is_waited_for_at_both_ends():
    line = run([[2, 5], [5, 5]], [(0, 1, 0, 1, 7)])
    assert line.go[:, 1].tolist() == [7, 7]
    assert line.seconds == 12
    assert line.wait_seconds_per_rank.tolist() == [5, 2]


def test_a_transfer_starts_when_both_ends_have_posted():
    line = run([[1, 1, 0], [4, 1, 0]], [(1, 2, 0, 1, 3), (1, 2, 1, 0, 1)])
    assert line.sent.tolist() == [4, 4]
    assert line.received.tolist() == [7, 5]
    assert line.go[:, 2].tolist() == [7, 7]


def test_a_link_serves_one_message_after_the_other():
    to_one = run([[0], [0], [0]], [(0, 1, 0, 2, 4), (0, 1, 1, 2, 4)])
    from_one = run([[0], [0], [0]], [(0, 1, 0, 1, 4), (0, 1, 0, 2, 4)])
    apart = run([[0], [0], [0]], [(0, 1, 0, 1, 4), (0, 1, 1, 2, 4)])
    assert (to_one.seconds, from_one.seconds, apart.seconds) == (8, 8, 4)


def test_a_long_transfer_may_stay_in_flight_over_stages():
    line = run([[2, 2, 2, 2], [2, 2, 2, 2]], [(0, 3, 0, 1, 6), (1, 2, 1, 0, 1)])
    assert line.seconds == 8


@pytest.mark.parametrize("ranks_per_node", [1, 3, 4, 12])
def test_an_all_to_all_keeps_every_link_busy(ranks_per_node: int):
    ranks = 12
    pairs = [(0, 1, a, b, 1) for a in range(ranks) for b in range(ranks) if a != b]
    line = run([[0.0]] * ranks, pairs, replace(UNIT, ranks_per_node=ranks_per_node))
    assert line.seconds == max(ranks_per_node - 1, ranks - ranks_per_node)


def test_links_in_and_between_nodes_work_at_once():
    node_of_two = replace(UNIT, ranks_per_node=2)
    line = run([[0], [0], [0]], [(0, 1, 0, 1, 4), (0, 1, 0, 2, 4)], node_of_two)
    assert line.seconds == 4
    assert node_of_two.crosses_nodes(np.array([0, 0]), np.array([1, 2])).tolist() == [False, True]


def test_transfer_seconds_are_latency_plus_bytes_over_rate():
    machine = replace(UNIT, ranks_per_node=2, inside_gb_per_second=2, between_gb_per_second=1, between_latency_us=5)
    seconds = machine.transfer_seconds(np.array([0, 0]), np.array([1, 2]), np.array([4e9, 4e9]))
    assert seconds.tolist() == pytest.approx([2, 4 + 5e-6])


def test_a_full_ring_on_fast_links_is_ideal_but_for_the_launches():
    mask = Mask.full(4096, 4096)
    program = ring.plan(mask, Layout.contiguous(4096, 4), 8, 8)
    fast = replace(HARDWARE["h100"], inside_gb_per_second=1e6, inside_latency_us=0, launch_us=7)
    prediction = predict(program, mask, fast, 128)
    assert prediction.ideal_seconds == pytest.approx(4 * 4096**2 * 8 * 128 / 4 / (fast.forward_tflops * 1e12))
    assert prediction.seconds == pytest.approx(prediction.ideal_seconds + 4 * 7e-6)
    assert prediction.exposed_communication_seconds == pytest.approx(0, abs=1e-12)


def test_an_unbalanced_layout_costs_its_imbalance():
    mask = Mask.causal(8192)
    quick = replace(HARDWARE["h100"], inside_gb_per_second=1e9, inside_latency_us=0, launch_us=0)
    contiguous = predict(all_gather.plan(mask, Layout.contiguous(8192, 4), 8, 8), mask, quick, 64)
    zigzag = predict(all_gather.plan(mask, Layout.zigzag(8192, 4), 8, 8), mask, quick, 64)
    assert contiguous.efficiency == pytest.approx(1 / contiguous.cost.imbalance, rel=1e-3)
    assert contiguous.cost.imbalance == pytest.approx(7 / 4, rel=1e-2)
    assert zigzag.efficiency == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("strategy", SCHEDULERS)
@pytest.mark.parametrize("machine", HARDWARE)
def test_parts_of_every_prediction_add_up(strategy: str, machine: str):
    mask = Mask.documents([3000, 70, 1, 5121])
    forward = SCHEDULERS[strategy].plan(mask, Layout.zigzag(8192, 4), 8, 4)
    for program in (forward, derive_backward(forward)):
        prediction = predict(program, mask, HARDWARE[machine], 64, 128, "torch.float16")
        line = prediction.timeline
        assert 0 < prediction.ideal_seconds <= prediction.free_links_seconds <= prediction.seconds
        assert 0 < prediction.efficiency <= 1
        compute = (line.done - line.go[:, :-1]).sum(1)
        assert np.allclose(compute + line.wait_seconds_per_rank, prediction.seconds)
        assert (line.received >= line.sent).all()
        messages = prediction.cost.messages
        assert (line.sent >= line.go[messages[:, 2], messages[:, 0]]).all()
        assert (line.received <= line.go[messages[:, 3], messages[:, 1]] + 1e-15).all()


def test_backward_runs_at_the_backward_rate():
    mask = Mask.full(64, 64)
    program = ring.plan(mask, Layout.contiguous(64, 1), 1, 1)
    slow = replace(UNIT, backward_tflops=5e-13)
    assert predict(program, mask, slow, 2).seconds == 64 * 64 * 8
    assert predict(derive_backward(program), mask, slow, 2).seconds == 2 * 64 * 64 * 20


def test_spans_tell_what_a_rank_does():
    mask = Mask.full(8, 8)
    program = ring.plan(mask, Layout.contiguous(8, 2), 1, 1)
    prediction = predict(program, mask, replace(UNIT, inside_gb_per_second=1e-10), 1)  # ten seconds a byte
    # Stages compute 16 pairs × 4 FLOPs; four rows of k and v in bf16 are 16 bytes.
    spans = [(s.kind, s.stage, s.start, s.end, s.peer) for s in prediction.spans(0)]
    assert spans == [
        ("compute", 0, 0, 64, -1),
        ("transfer", 0, 0, 160, 1),
        ("wait", 1, 64, 160, -1),
        ("compute", 1, 160, 224, -1),
    ]
    assert prediction.exposed_communication_seconds == 96


def test_nothing_to_do_takes_no_time():
    mask = Mask.causal(10).cut(0, 0, 0, 0)
    prediction = predict(ring.plan(mask, Layout.contiguous(10, 2), 1, 1), mask, UNIT, 4)
    assert (prediction.seconds, prediction.efficiency) == (0, 1)


RATES = (
    KernelRate("triton", False, 128, call_s=1e-5, launch_s=0, row_s=1e-10, step_s=0, pair_s=1e-12, cut_pair_s=2e-12),
    KernelRate("triton", True, 128, call_s=2e-5, launch_s=0, row_s=1e-10, step_s=0, pair_s=3e-12, cut_pair_s=6e-12),
    KernelRate("flash", False, 128, call_s=1e-5, launch_s=0, row_s=1e-10, step_s=0, pair_s=9e-12, cut_pair_s=9e-12),
)
LINKS = (LinkRate("inside", "all_to_all", 2, 200.0, 30.0), LinkRate("inside", "ring", 2, 300.0, 20.0))
MEASURED_H100 = Calibration("NVIDIA H100 80GB HBM3", kernels=RATES, links=LINKS)


def test_measured_rates_take_the_place_of_the_presets():
    machine = calibrated(MEASURED_H100, ranks_per_node=4)
    assert (machine.inside_gb_per_second, machine.inside_latency_us, machine.ranks_per_node) == (300.0, 20.0, 4)
    assert machine.between_gb_per_second == HARDWARE["h100"].between_gb_per_second
    assert machine.calibration == MEASURED_H100.digest
    assert MEASURED_H100.digest in repr(machine), "ranks compare it"
    assert calibrated(Calibration("NVIDIA H100 80GB HBM3", links=LINKS)).kernels, (
        "kernels of the package where none were measured"
    )
    assert calibrated(Calibration("cpu", links=LINKS)).kernels == ()


def test_kernels_take_what_was_measured():
    machine, n = calibrated(MEASURED_H100), 4096
    mask = Mask.full(n, n)
    alone = predict(ring.plan(mask, Layout.contiguous(n, 1), 8, 8), mask, machine, 128)
    assert alone.seconds == pytest.approx(1e-5 + 8 * n * 1e-10 + 8 * n * n * 1e-12)
    assert alone.efficiency == pytest.approx(1)
    shared = predict(ring.plan(mask, Layout.contiguous(n, 4), 8, 8), mask, machine, 128)
    compute = 4 * 1e-5 + 4 * 8 * n / 4 * 1e-10 + 8 * n * n / 4 * 1e-12
    sums = n / 4 * 8 * 128 * SUMS_BYTES[False] / (machine.copy_gb_per_second * 1e9)
    assert shared.free_links_seconds == pytest.approx(compute + sums), "each of four stages calls, and writes all its rows"


def test_short_documents_pay_for_blocks_that_they_cut():
    machine = calibrated(MEASURED_H100)
    prices = [
        kernel_time.price(Mask.documents([length] * (8192 // length)), machine, 1, 128, backward=False) for length in (8192, 64)
    ]
    assert prices[0] is not None
    assert prices[1] is not None
    assert prices[0].pair_s == pytest.approx(1e-12, rel=0.1)
    assert prices[1].pair_s > 5e-12


def test_adding_up_costs_memory_bandwidth():
    mask = Mask.full(4096, 4096)
    backward = derive_backward(ring.plan(mask, Layout.contiguous(4096, 2), 8, 8))
    machine = replace(HARDWARE["h100"], inside_gb_per_second=1e9, inside_latency_us=0)
    free, paid = (predict(backward, mask, replace(machine, copy_gb_per_second=x), 128) for x in (float("inf"), 1000.0))
    # Each rank takes dK and dV of its chunk once, in 16 bits; reading both and writing the sum are three passes.
    assert paid.seconds - free.seconds == pytest.approx(3 * 2 * 2048 * 8 * 128 * 2 / 1e12, rel=1e-6)


def test_rows_that_see_nothing_of_a_halo_cost_nothing() -> None:
    mask = Mask.sliding_window(65536, 512)
    program = ring.plan(mask, Layout.contiguous(65536, 4), 8, 8)
    cost = kernel_time.Price("fa4", 0.0, 1.0, 0.0)
    seconds = kernel_time.stage_seconds(program, mask, count(program, mask, Shape(128, 128)).attend_area, cost)
    assert seconds[:, 0].tolist() == [8 * 16384] * 4, "all rows at home"
    assert seconds[0, 1] == 0
    assert (seconds[1:, 1] > 0).all()
    assert seconds.max() == 8 * 16384
    assert (seconds[1:, 1] <= 8 * 512).all(), "a window's rows in the halo"


def test_without_a_calibration_there_is_no_measured_hardware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="run `distattn bench calibrate`"):
        find_hardware("measured")
    assert hardware_here(on_gpu=True) == HARDWARE["h100"]
    replace(MEASURED_H100, device="cpu").save()
    assert find_hardware("measured").inside_gb_per_second == 300.0
    assert hardware_here(on_gpu=True).inside_latency_us == 20.0


def test_hardware_is_checked_and_listed():
    with pytest.raises(ConfigError, match="unknown hardware 'tpu': choose one of cpu, h100, h200, a100, measured"):
        find_hardware("tpu")
    with pytest.raises(ConfigError, match="forward_tflops must be positive, got 0"):
        replace(UNIT, forward_tflops=0)
    with pytest.raises(ConfigError, match="launch_us must not be negative"):
        replace(UNIT, launch_us=-1)


def test_the_hosts_work_counts_where_it_is_longer() -> None:
    mask = Mask.causal(4096)
    nothing = {f"host_{part}_us": 0.0 for part in ("exchange", "message", "launch", "ahead")}
    machine = replace(HARDWARE["h100"], **nothing)
    program = ring.plan(mask, Layout.zigzag(4096, 4), 8, 8)
    backward = derive_backward(program)

    def total(**host: float) -> float:
        here = replace(machine, **host)
        return total_seconds(predict(program, mask, here, 128), predict(backward, mask, here, 128))

    device = total()
    assert total(host_launch_us=1) == device
    # Four calls a rank forward; backward five, for what is computed at home is cut to fill the time before the first keys.
    assert total(host_launch_us=10_000) == pytest.approx(0.09)
    assert total(host_launch_us=10_000, host_ahead_us=30_000) == pytest.approx(0.06)
    # Three exchanges forward; in the backward keys and gradients have five times of their own.
    assert total(host_exchange_us=10_000) == pytest.approx(0.08)


def test_packing_some_heads_takes_time() -> None:
    mask = Mask.causal(4096)
    machine = replace(HARDWARE["h100"], inside_gb_per_second=1e9, inside_latency_us=0)
    program = SCHEDULERS["ulysses"].plan(mask, Layout.contiguous(4096, 2), 8, 8)
    for rate in (1000.0, 4000.0):
        free, paid = (predict(program, mask, replace(machine, copy_gb_per_second=x), 128) for x in (float("inf"), rate))
        half = 2048 * 4 * 128 * 2  # of a rank's q, k, v or out in 16 bits
        # The other rank's heads are packed and its own ones copied, both element by element; what comes is placed as it is.
        strided, plain = 2 * 2 * 3 * half, 2 * 3 * half
        # Results of some heads: half of them come, half were there.
        strided += 3 * 2 * (half + 2048 * 4 * 4)
        assert paid.seconds - free.seconds == pytest.approx(
            strided / 1e9 / min(rate, STRIDED_GB_PER_SECOND) + plain / 1e9 / rate
        )
    whole = ring.plan(mask, Layout.contiguous(4096, 2), 8, 8)
    free, paid = (predict(whole, mask, replace(machine, copy_gb_per_second=x), 128) for x in (float("inf"), 1000.0))
    assert paid.seconds == free.seconds, "what is a whole slot is neither packed nor placed"


def test_who_is_done_with_the_forward_begins_the_backward() -> None:
    """A rank with little to do forward and much backward: the others do not wait for it in between."""
    mask = Mask.documents([2048, 2048])
    program = ring.plan(mask, Layout.contiguous(4096, 2), 8, 8)
    forward, backward = (predict(p, mask, HARDWARE["h100"], 128) for p in (program, derive_backward(program)))
    assert not len(forward.cost.messages)
    first, second = (replace(p, busy=np.array([[a, 0.0], [b, 0.0]])) for p, a, b in ((forward, 3, 1), (backward, 1, 4)))
    assert total_seconds(first, second) == 5.0
    both = ring.plan(Mask.full(4096, 4096), Layout.contiguous(4096, 2), 8, 8)
    sent = predict(derive_backward(both), Mask.full(4096, 4096), HARDWARE["h100"], 128)
    busy = np.zeros_like(sent.busy)
    busy[1, 0] = 4.0
    second = replace(sent, busy=busy)
    assert 4.99 < total_seconds(first, second) < 5.01
    busy[:, 0] = [4.0, 0.0]
    assert total_seconds(first, replace(sent, busy=busy)) > 7.0


def test_transfers_that_take_no_time_leave_what_is_computed() -> None:
    mask = Mask.causal(4096)
    machine = replace(HARDWARE["h100"], host_exchange_us=0, host_message_us=0, host_launch_us=0)
    program = ring.plan(mask, Layout.zigzag(4096, 2), 8, 8)
    both = [predict(p, mask, machine, 128) for p in (program, derive_backward(program))]
    assert total_seconds(*both, free_links=True) < total_seconds(*both)
    assert total_seconds(*both, free_links=True) == pytest.approx(sum(x.free_links_seconds for x in both), rel=1e-6)
