"""Which backend computes a case, and what the user is told: plan only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import distattn
from distattn import Mask, planning
from distattn.bands import UNBOUNDED as U
from distattn.bands import area
from distattn.bench.engines import Cell, tiles_of
from distattn.calibration import Calibration, KernelCell, KernelRate, load_calibration
from distattn.errors import UnsupportedError
from distattn.kernels import BACKENDS, Case, backend_report, choose_backend, selection, triton_here
from distattn.kernels import registry as registry_module
from distattn.kernels.measured import DOUBT, NEAR, SIZE_SCALE, UNCORRECTED, amounts_of, correction
from distattn.kernels.protocol import WholeBackend
from distattn.kernels.selection import Rates, fastest, predicted_seconds
from distattn.kernels.softmax import hopper_backend
from distattn.kernels.workload import work_of
from distattn.parallel import kernel_time
from distattn.parallel.hardware import HARDWARE
from distattn.parallel.layout import Layout
from distattn.parallel.lowering import lower
from distattn.parallel.schedulers import find_scheduler

CPU = Case("cpu", torch.float32, 64, 64, 8, 2)
CUDA = replace(CPU, device_type="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_auto_takes_the_fused_kernel_on_cpu(dtype: torch.dtype) -> None:
    backend, reason = choose_backend(replace(CPU, dtype=dtype))
    assert backend.name == "flash_cpu"
    assert "fastest" in reason


@pytest.mark.parametrize("feature", ["softcap", "lse_gradient"])
def test_auto_says_what_it_passed_over_and_why(feature: str) -> None:
    backend, reason = choose_backend(replace(CPU, **{feature: True}))
    assert backend.name == "reference"
    assert f"flash_cpu {BACKENDS['flash_cpu'].why_not(replace(CPU, **{feature: True}))}" in reason


def test_an_unknown_kernel_lists_what_exists() -> None:
    with pytest.raises(UnsupportedError, match="kernel='flsh' is unknown; it may be auto, reference, flash_cpu"):
        choose_backend(CPU, "flsh")


def test_an_asked_for_kernel_is_never_replaced() -> None:
    assert choose_backend(CPU, "reference")[0].name == "reference"
    with pytest.raises(
        UnsupportedError, match=r"kernel=flash_cpu cannot compute .* softcap: it has no soft-cap\. Use .* reference"
    ):
        choose_backend(replace(CPU, softcap=True), "flash_cpu")
    with pytest.raises(UnsupportedError, match=r"kernel=cudnn cannot compute float32 .* on cpu: it runs on cuda"):
        choose_backend(CPU, "cudnn")


def test_a_case_that_no_kernel_computes_is_an_error_with_every_reason() -> None:
    with pytest.raises(UnsupportedError, match=r"No kernel computes float8_e4m3fn .*: flash_cpu .*; reference .*\."):
        choose_backend(replace(CPU, dtype=torch.float8_e4m3fn))


def test_the_report_has_every_backend() -> None:
    report = backend_report(CPU)
    assert set(report) == set(BACKENDS)
    assert report["reference"] is None
    assert report["flash"] == "runs on cuda, not on cpu"


@pytest.mark.parametrize(
    ("capability", "change", "expected"),
    [
        ((9, 0), {}, "cudnn"),
        ((8, 0), {}, "flash"),
        ((9, 0), {"head_dim": 192, "value_dim": 128}, "flash"),
        ((9, 0), {"head_dim": 256, "value_dim": 256}, "flash"),
        ((9, 0), {"head_dim": 512, "value_dim": 512}, "reference"),
        ((9, 0), {"dtype": torch.float32}, "triton"),
        ((9, 0), {"softcap": True}, "triton"),
        ((9, 0), {"lse_gradient": True}, "hopper"),
        ((9, 0), {"deterministic": True}, "hopper"),
        ((8, 0), {"deterministic": True}, "triton"),
        ((9, 0), {"softcap": True, "dtype": torch.float64}, "reference"),
        ((7, 5), {}, "reference"),
    ],
)
def test_auto_on_cuda(
    capability: tuple[int, int], change: dict[str, object], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    monkeypatch.setattr(triton_here, "is_installed", lambda: True)
    monkeypatch.setattr(hopper_backend, "_has_gluon", lambda: True)
    case = replace(CUDA, **change)  # type: ignore[arg-type]
    backend, _ = choose_backend(case)
    assert backend.name == expected


def test_a_block_plan_leaves_our_own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(triton_here, "is_installed", lambda: True)
    monkeypatch.setattr(hopper_backend, "_has_gluon", lambda: True)
    case = replace(CUDA, block_plan=True)
    assert [name for name, reason in backend_report(case).items() if reason is None] == ["reference", "hopper", "triton"]
    assert "takes no positions" in str(BACKENDS["hopper"].why_not(replace(case, positions=True)))
    assert BACKENDS["hopper"].why_not(replace(case, deterministic=True)) is None
    rates = [rate(name, b, pair=x) for name, x in (("hopper", 1.0), ("triton", 2.0)) for b in (False, True)]
    monkeypatch.setattr(registry_module, "rates_here", lambda: rates_of(*rates))
    backend, reason = choose_backend(case, tables=[np.array([[0, 512, 0, 512, -U, U, 0, 8, 0]])])
    assert backend.name == "hopper"
    assert reason.startswith("predicted without the block plan: forward hopper")
    assert "fa4 takes no block plans" in reason


def test_flash_is_deterministic_when_torch_is_asked_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    case = replace(CUDA, deterministic=True)
    assert "use_deterministic_algorithms" in str(BACKENDS["flash"].why_not(case))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert BACKENDS["flash"].why_not(case) is None


def test_other_devices_have_the_reference() -> None:
    assert registry_module.choose_backend(replace(CPU, device_type="mps"))[0].name == "reference"


# The choice by measured rates

H100 = "NVIDIA H100 80GB HBM3"
ABLE = ["fa4", "cudnn", "flash", "triton"]


def rate(
    kernel: str, backward: bool = False, *, launch: float = 0.0, pair: float = 0.0, cut: float | None = None
) -> KernelRate:
    """Seconds for each launch, and for 10^12 pairs of whole and of cut blocks."""
    return KernelRate(kernel, backward, 64, 0.0, launch, 0.0, 0.0, pair * 1e-12, (pair if cut is None else cut) * 1e-12)


def rates_of(*rates: KernelRate) -> Rates:
    return Rates(Calibration(H100, kernels=rates), "a test")


def table_of(mask: Mask, heads: int = 8) -> np.ndarray:
    tiles = np.zeros((len(mask.bands), 9), np.int64)
    tiles[:, :6], tiles[:, 7] = mask.bands, heads
    return tiles


CAUSAL, DOCUMENTS = table_of(Mask.causal(4096)), table_of(Mask.documents([100, 30, 300, 66] * 8))
BOTH = (False, True)


def test_work_counts_launches_rows_steps_and_blocks() -> None:
    causal = work_of("triton", [CAUSAL])["triton"]
    assert causal[:8] == (1, 1, 0, 4096 * 8, 32, 32, 8 * 128**2 * (32 * 31 // 2), 8 * 128**2 * 32)
    assert work_of("fa4", [DOCUMENTS])["fa4"].launches == 1
    assert work_of("flash", [DOCUMENTS])["flash"].launches == 32
    cudnn = work_of("cudnn", [CAUSAL, DOCUMENTS])
    assert (cudnn["cudnn"].launches, cudnn["flash"].launches) == (1, 32)


@pytest.mark.parametrize("backend", ["triton", "flash", "cudnn", "fa4"])
@pytest.mark.parametrize(
    "mask",
    [Mask.full(300, 300), Mask.causal(1000), Mask.sliding_window(777, 200, 10), Mask.global_window(900, 100, 50, 50),
     Mask.share_question(130, [70, 200]), Mask.prefix_lm(700, 333)],
)  # fmt: skip
def test_blocks_hold_every_pair(mask: Mask, backend: str) -> None:
    found = work_of(backend, [table_of(mask)]).values()
    whole, pairs = sum(x.pairs for x in found), sum(x.pairs + x.cut_pairs for x in found)
    edges = 256 * sum(x.launches for x in found) * (mask.num_queries + mask.num_keys)
    assert whole <= 8 * mask.area <= pairs <= 8 * (mask.area + edges)


def test_results_that_are_merged_cost_launches_and_rows() -> None:
    shared = table_of(Mask.share_question(130, [70, 200]))
    assert work_of("flash", [DOCUMENTS])["flash"][:4] == (1, 32, 0, 0)
    assert work_of("flash", [DOCUMENTS, CAUSAL])["flash"][:4] == (2, 33, 33, 8 * (496 * 8 + 4096))
    once, together = work_of("flash", [shared[:1]])["flash"], work_of("flash", [shared])["flash"]
    assert (once.launches, once.merges, once.rows) == (1, 0, 0)
    assert (together.launches, together.merges, together.rows) == (5, 5, 8 * (130 + 2 * 270))
    assert (together.terms(backward=False)[1], together.terms(backward=True)[1]) == (10, 5)


def test_results_of_a_pass_are_merged_without_a_carry() -> None:
    """As the executor does where one launch has all rows; into a first one in pieces they are not."""
    half = CAUSAL.copy()
    half[:, 1] = 2048
    for calls, merges, rows in (
        ([CAUSAL, half], 1, 2048 / 4),
        ([CAUSAL, half, half], 2, 4096 / 4),
        ([DOCUMENTS, half], 33, 6016),
    ):
        found = work_of("flash", calls)["flash"]
        assert (found.merges, found.rows) == (merges, 8 * rows)
    assert work_of("triton", [CAUSAL, half])["triton"].rows == 8 * 6144


def test_the_longest_row_and_column_go_over_all_tiles_of_a_launch() -> None:
    shared = table_of(Mask.share_question(128, [128] * 20))
    triton, flash = work_of("triton", [shared])["triton"], work_of("flash", [shared])["flash"]
    assert (triton.row_steps, triton.column_steps) == (2, 21)
    assert (triton.terms(backward=False)[3], triton.terms(backward=True)[3]) == (2, 21)
    assert (flash.row_steps, flash.column_steps) == (flash.launches, flash.launches)


def test_rows_that_tiles_of_a_launch_share_count_once() -> None:
    tiles = table_of(Mask.from_bands([[0, 200, 0, 100, -U, U], [50, 300, 100, 400, -U, U]]))
    assert work_of("triton", [tiles])["triton"].rows == 300 * 8
    assert work_of("flash", [tiles])["flash"].rows == (200 + 250) * 8
    apart = np.concatenate([table_of(Mask.full(100, 100), 4), table_of(Mask.full(100, 100), 8)])
    apart[1, 6] = 4
    assert work_of("triton", [apart])["triton"].rows == 100 * 8


def test_the_least_predicted_time_wins() -> None:
    rates = rates_of(
        *(rate("cudnn", b, launch=1e-5, pair=1) for b in BOTH), *(rate("flash", b, launch=1e-5, pair=1.5) for b in BOTH),
        *(rate("triton", b, launch=1e-5, pair=1.3) for b in BOTH),
    )  # fmt: skip
    long = fastest(CUDA, ABLE, [CAUSAL], rates)
    assert long is not None
    assert (long.forward, long.backward) == ("cudnn", "cudnn")
    assert "predicted: forward cudnn 0.0" in long.reason
    assert "(triton" in long.reason
    assert "by a test" in long.reason
    short = fastest(CUDA, ABLE, [DOCUMENTS], rates)
    assert short is not None
    assert (short.forward, short.backward) == ("triton", "triton")
    assert fastest(CUDA, ABLE, [CAUSAL], rates_of(rate("cudnn"))) is None


@pytest.mark.parametrize(("saving", "expected"), [(0.015, "triton"), (0.03, "cudnn")])
def test_two_kernels_only_where_it_pays(saving: float, expected: str) -> None:
    rates = rates_of(
        rate("cudnn", pair=1 - saving), rate("cudnn", True, pair=2), rate("triton", pair=1), rate("triton", True, pair=1),
    )  # fmt: skip
    choice = fastest(CUDA, ["cudnn", "triton"], [CAUSAL], rates)
    assert choice is not None
    assert (choice.forward, choice.backward) == (expected, "triton")


def test_wider_heads_take_the_next_measured_width_or_scale_the_widest() -> None:
    rates = Rates(Calibration(H100, kernels=(rate("triton", pair=1), replace(rate("triton", pair=3), head_dim=128))), "a test")
    work = work_of("triton", [CAUSAL])
    seconds = [predicted_seconds(work, rates, backward=False, width=width) for width in (32, 64, 96, 128, 256)]
    assert np.allclose(np.array(seconds) / seconds[0], [1, 1, 3, 3, 6])  # type: ignore[arg-type]


def test_times_measured_nearby_correct_the_rates() -> None:
    """By the rates triton wins everywhere; on long causal masks it took twice as long as they say."""
    amounts = amounts_of(work_of("triton", [CAUSAL]), backward=False)
    cells = (
        KernelCell("causal 4K", "triton", False, 64, 1, *amounts, ratio=2.0),
        KernelCell("other", "triton", True, 64, 1, *amounts, ratio=2.0),
        KernelCell("wider", "cudnn", False, 128, 1, *amounts, ratio=0.1),
    )
    kernels = [rate(name, b, pair=pair) for name, pair in (("triton", 1.0), ("cudnn", 1.5)) for b in BOTH]
    plain, rates = (Rates(Calibration(H100, kernels=tuple(kernels), cells=x), "a test") for x in ((), cells))
    case = replace(CUDA, heads=8, kv_heads=8)
    choices = [fastest(case, ["cudnn", "triton"], [CAUSAL], x) for x in (plain, rates)]
    assert [x.forward for x in choices if x] == ["triton", "cudnn"]
    elsewhere = [fastest(case, ["cudnn", "triton"], [DOCUMENTS], x) for x in (plain, rates)]
    assert elsewhere[0] == elsewhere[1]
    alone = [fastest(case, ["triton"], [CAUSAL], x) for x in (plain, rates)]
    assert alone[0] is not None
    assert alone[1] is not None
    assert "measured near" not in alone[0].reason
    assert ", as measured near causal 4K" in alone[1].reason
    assert correction(rates.calibration, replace(cells[0], cell="")).factor == pytest.approx(2 ** (1 / (1 + DOUBT)))
    assert correction(rates.calibration, replace(cells[0], pairs=cells[0].pairs * 100)) == (pytest.approx(1.0), "")
    assert correction(Calibration(H100), cells[0]) == UNCORRECTED


def test_a_cell_of_half_the_size_stands_for_more_than_the_rates_say() -> None:
    """By the rates, waiting is half of the cell's time and does not grow; measured times of twice the heads nearly double."""
    seconds = 1e-12 * 8e9
    waiting = replace(rate("fa4", pair=1), step_s=seconds / 100)
    cell = KernelCell("half", "fa4", False, 64, 1, 1.0, 0.0, 100.0, 8e9, 0.0, ratio=1.0)
    rates = Calibration(H100, kernels=(waiting,), cells=(cell,))
    like = replace(cell, pairs=2 * cell.pairs)
    # 3 by the rates, 4 in proportion: √(4 ÷ 3), by as much as the cell counts.
    weight = np.exp(-((SIZE_SCALE * np.log(2)) ** 2) / NEAR**2)
    assert correction(rates, like).factor == pytest.approx((4 / 3) ** (0.5 * weight / (weight + DOUBT)))


def test_a_schedule_waits_for_the_longest_column_of_a_whole_group() -> None:
    waiting = replace(rate("triton", True, pair=1), step_s=1e-5)
    machine = replace(HARDWARE["h100"], kernels=(rate("triton", pair=1), waiting))
    prices = [kernel_time.price(Mask.causal(1024), machine, 8, 64, backward=True, group=group) for group in (1, 8)]
    assert all(prices)
    area = 8 * Mask.causal(1024).area
    waits = [x.pair_s * area for x in prices if x]
    # A column has 8 blocks of 128, and a program goes over all 8 query heads.
    assert waits[1] - waits[0] == pytest.approx(8 * 7 * 1e-5)


def test_cells_are_kept_in_the_file_and_compared(tmp_path: Path) -> None:
    cell = KernelCell("causal 4K", "triton", False, 64, 8, 1.0, 2.0, 3.0, 4.0, 5.0, 1.25)
    made = Calibration(H100, kernels=(rate("triton"),), cells=(cell, replace(cell, backward=True)))
    path = made.save(tmp_path / "c.json")
    assert load_calibration(path) == made
    assert made.digest != made.updated(cells=(cell,)).digest
    assert load_calibration(made.updated(cells=()).save(path)) == made.updated(cells=())


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: H100)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    monkeypatch.setattr(triton_here, "is_installed", lambda: True)
    monkeypatch.setattr(hopper_backend, "_has_gluon", lambda: True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    selection.rates_here.cache_clear()
    yield
    selection.rates_here.cache_clear()


@pytest.mark.usefixtures("hopper")
def test_auto_looks_at_the_tiles() -> None:
    Calibration(
        H100,
        kernels=(
            rate("cudnn", launch=1e-5, pair=0.5), rate("cudnn", True, launch=1e-5, pair=4), rate("flash", launch=1e-5, pair=2),
            rate("flash", True, launch=1e-5, pair=4), rate("triton", pair=1.2), rate("triton", True, pair=3),
        ),
    ).save()  # fmt: skip
    backend, reason = choose_backend(CUDA, tables=[CAUSAL])
    assert backend.name == "cudnn+triton"
    assert backend.needs_out == BACKENDS["triton"].needs_out
    assert f"the calibration of this {H100}" in reason
    assert "fa4 needs" in reason
    assert choose_backend(CUDA, tables=[DOCUMENTS])[0] is BACKENDS["triton"]
    assert choose_backend(CUDA, tables=[DOCUMENTS[:0]])[0].name == "cudnn"
    assert choose_backend(CUDA, "flash", [CAUSAL])[0].name == "flash"
    assert choose_backend(replace(CUDA, dtype=torch.float32), tables=[CAUSAL])[0].name == "triton"


@pytest.mark.usefixtures("hopper")
def test_the_rates_that_come_with_it_serve_hopper_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = selection.rates_here()
    assert rates is not None
    assert rates.calibration == selection.shipped_choice_rates()
    assert "measured on NVIDIA H200s" in rates.origin
    for tiles in (table_of(Mask.causal(32768), 64), table_of(Mask.documents([600, 90, 2000, 31, 777] * 9), 64)):
        choice = fastest(replace(CUDA, heads=64, kv_heads=8, head_dim=128, value_dim=128), ABLE, [tiles], rates)
        assert choice is not None
        assert choice.forward != "flash"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    selection.rates_here.cache_clear()
    assert selection.rates_here() is None
    assert choose_backend(CUDA, tables=[CAUSAL])[0].name == "flash"


@pytest.mark.parametrize(
    ("mask", "forward", "backward"),
    [
        ("full", "fa4", "fa4"),
        ("causal", "fa4", "fa4"),
        ("causal_document", "fa4", "fa4"),
        ("sliding_window_causal", "fa4", "fa4"),
        ("share_question", "hopper", "hopper"),
        ("global_sliding_window", "hopper", "hopper"),
        ("prefix_lm_document", "hopper", "hopper"),
        ("variable_block", "hopper", "hopper"),
    ],
)
def test_the_rates_that_come_with_it_choose_what_was_fastest(mask: str, forward: str, backward: str) -> None:
    """At 32K with 64:8 heads of 128 on an H200, or within 3 % of it (prefix_lm_document forward)."""
    tiles, _ = tiles_of(Cell(mask, 32768, 64, 8, 128))
    case = replace(CUDA, heads=64, kv_heads=8, head_dim=128, value_dim=128)
    choice = fastest(
        case, ["fa4", "cudnn", "hopper", "flash", "triton"], [tiles], Rates(selection.shipped_choice_rates(), "shipped")
    )
    assert choice is not None
    assert (choice.forward, choice.backward) == (forward, backward)


@pytest.mark.parametrize("kind", ["carry", "whole"])
def test_a_split_backend_is_one_forward_and_the_other_backward(kind: str) -> None:
    calls: list[tuple[str, str]] = []

    def make(name: str) -> Any:
        methods = ["attend", "attend_backward"] + (["attend_whole", "attend_backward_whole"] if kind == "whole" else [])
        record = {m: lambda *_, m=m, **settings: calls.append((name, m)) or settings["group"] for m in methods}
        return SimpleNamespace(name=name, needs_out=name == "b", why_not=lambda case: f"{name} cannot", **record)

    made: Any = selection.split(make("a"), make("b"))
    assert (made.name, made.needs_out, made.why_not(CUDA)) == ("a+b", True, "a cannot")
    assert isinstance(made, WholeBackend) == (kind == "whole")
    settings = {"group": 4, "scale": 1.0, "softcap": None}
    made.attend(*[None] * 5, **settings)
    made.attend_backward(*[None] * 11, **settings)
    assert calls == [("a", "attend"), ("b", "attend_backward")]
    if kind == "whole":
        calls.clear()
        assert (made.attend_whole(*[None] * 4, **settings), made.attend_backward_whole(*[None] * 8, **settings)) == (4, 4)
        assert calls == [("a", "attend_whole"), ("b", "attend_backward_whole")]


def test_ranks_compare_the_rates_that_they_choose_by(monkeypatch: pytest.MonkeyPatch) -> None:
    made = distattn.plan(Mask.causal(64), heads=2, head_dim=8)
    shared = {name: getattr(made, name) for name in ("mask", "heads", "kv_heads", "head_dim", "value_dim", "kernel", "dtype")}
    fields: dict[str, Any] = dict.fromkeys(planning._Request.__dataclass_fields__) | shared | {"num_ranks": 2}
    monkeypatch.setattr(planning, "rates_here", lambda: rates_of(rate("triton", pair=1)))
    one = planning._Request(**fields).summary()
    monkeypatch.setattr(planning, "rates_here", lambda: rates_of(rate("triton", pair=2)))
    other = planning._Request(**fields).summary()
    assert "kernel_rates=" in one
    assert one != other
    fields["kernel"] = "triton"
    assert "kernel_rates=" not in planning._Request(**fields).summary()


@pytest.mark.parametrize("kernel", ["auto", "triton"])
def test_every_rank_chooses_by_the_tiles_of_the_busiest(kernel: str) -> None:
    mask = Mask.documents([200, 20, 20, 16])
    layout = Layout.contiguous(256, 4)
    made = distattn.plan(mask, heads=4, kv_heads=2, head_dim=8, kernel=kernel)
    program = find_scheduler("ring").plan(mask, layout, 4, 2)
    tables = [replace(made, layout=layout, program=program, rank=rank).tables(CUDA) for rank in range(4)]
    if kernel == "triton":
        assert tables == [[]] * 4
        return
    passes = [[group.tiles for step in lower(program, mask, rank).steps for group in step.groups] for rank in range(4)]
    areas = [sum(int(area(tiles[:, :6]).sum()) for tiles in calls) for calls in passes]
    busiest = areas.index(max(areas))
    for found in tables:
        assert len(found) == len(passes[busiest])
        assert all(np.array_equal(a, b) for a, b in zip(found, passes[busiest]))
