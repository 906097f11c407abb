"""Ping-pong: the order of its phases on one rank; exactness, both backward modes and faults on gloo with 1 to 4 ranks."""

from __future__ import annotations

import functools
import importlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distattn.attention import apply_sink, attention, checkpoint_contexts
from distattn.calibration import KernelRate
from distattn.errors import InputError, PlanError, TransportError
from distattn.mask import Mask
from distattn.nano_choice import choose_nano_batches
from distattn.parallel.backward import derive_backward
from distattn.parallel.disaggregation.halves import arrange
from distattn.parallel.hardware import Hardware
from distattn.parallel.keep import choose_mode, kept_bytes
from distattn.parallel.layout import Layout
from distattn.parallel.schedulers.disaggregated import DisaggregatedOptions
from distattn.parallel.schedulers.disaggregated import plan as plan_disaggregated
from distattn.pingpong import NanoBatches, PingPong, cut_in_two
from distattn.planning import plan
from distattn.testing import RankFailedError, run_ranks
from tests.parallel.cases import random_lengths

HEADS, KV_HEADS, HEAD_DIM, DIM, NUM_LAYERS = 6, 3, 4, 10, 2
SHAPE: dict[str, Any] = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
TOLERANCE = 1e-10
TIMEOUT_S = 1.5


class Before(nn.Module):
    """q, k and v of x scaled by info, and x for the residual."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
        self.weight = nn.Parameter(0.3 * torch.randn(DIM, width, dtype=torch.double, generator=generator))

    def forward(self, x: Tensor, info: Tensor) -> tuple[Tensor, ...]:
        parts = ((x * info[None, :, None]) @ self.weight).unflatten(-1, (-1, HEAD_DIM))
        return *parts.split([HEADS, KV_HEADS, KV_HEADS], 2), x


class After(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(100 + seed)
        self.weight = nn.Parameter(0.3 * torch.randn(HEADS * HEAD_DIM, DIM, dtype=torch.double, generator=generator))

    def forward(self, out: Tensor, x: Tensor, info: Tensor) -> Tensor:
        return x + torch.tanh(out.flatten(2) @ self.weight)


class SinkAfter(nn.Module):
    """With a logit a head that takes weight and gives none."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.after = After(seed)
        self.sink = nn.Parameter(torch.linspace(-1.0, 1.5 + seed, HEADS, dtype=torch.double))

    def forward(self, out: Tensor, lse: Tensor, x: Tensor, info: Tensor) -> Tensor:
        return self.after(apply_sink(out, lse, self.sink), x, info)


Layers = list[tuple[Before, After | SinkAfter]]


def make_layers(*, sinks: bool = False) -> Layers:
    return [(Before(i), SinkAfter(i) if sinks else After(i)) for i in range(NUM_LAYERS)]


def weights_of(layers: Layers) -> list[nn.Parameter]:
    return [weight for layer in layers for part in layer for weight in part.parameters()]


@dataclass(frozen=True)
class Case:
    """sinks: every layer has its own."""

    name: str
    mask: Mask
    arguments: dict[str, Any]
    at: int | None = None
    sinks: bool = False


def cases(world: int) -> Iterator[Case]:
    """One giant document, many tiny ones, odd lengths; in place and dedicated; both backward modes; other strategies."""
    rng = np.random.default_rng(world)
    masks = {
        "one giant": Mask.causal(61),
        "giant and tiny": Mask.documents([*random_lengths(rng, 9, 3), 44, *random_lengths(rng, 4, 2)]),
        "a thousand tiny": Mask.documents([19, *rng.permutation([1] * 980 + [2] * 20).tolist()]),
        "mixed": Mask.documents(random_lengths(rng, 55, 30)),
        "window": Mask.documents([30, 23]) & Mask.sliding_window(53, 7),
        "not causal": Mask.documents([9, 20, 14], causal=False),
        "two rows": Mask.causal(2),
    }
    for i, (name, mask) in enumerate(masks.items()):
        servers = {0, (1, world - 1)[i % 2]} if world > 1 else {0}
        for count in sorted(servers):
            for mode in ("resend", "keep"):
                options = DisaggregatedOptions(align=(1, 8)[i % 2], servers=count, tolerance=0.02)
                how = {"strategy": "disaggregated", "options": options, "backward": mode}
                yield Case(f"{name}, {count} servers, {mode}", mask, how)
    yield Case("ring", masks["giant and tiny"], {"strategy": "ring"})
    yield Case("all_gather, kept", masks["one giant"], {"strategy": "all_gather", "backward": "keep"}, at=17)
    yield Case("auto", masks["mixed"], {"strategy": "auto"}, at=30)
    pool = {"strategy": "disaggregated", "options": DisaggregatedOptions(align=1, servers=min(world - 1, 1))}
    yield Case("sinks", masks["window"], pool, at=41, sinks=True)


def reference(case: Case, x: Tensor, info: Tensor) -> list[Tensor]:
    """Result and gradients (of x and all weights) of the whole stream with dense attention in this process."""
    layers = make_layers(sinks=case.sinks)
    x = x.clone().requires_grad_()
    allowed = torch.from_numpy(case.mask.dense())
    y = x
    for before, after in layers:
        q, k, v, kept = before(y, info)
        k, v = (part.repeat_interleave(HEADS // KV_HEADS, 2) for part in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * HEAD_DIM**-0.5
        scores = scores.masked_fill(~allowed, float("-inf"))
        if isinstance(after, SinkAfter):  # one more key of value 0
            column = after.sink[None, :, None, None].expand(*scores.shape[:3], 1)
            weights = torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
            y = after.after(torch.einsum("bhqk,bkhd->bqhd", weights, v), kept, info)
        else:
            y = after(torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, -1), v), kept, info)
    y.sin().sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(gradient(w) for w in weights_of(layers))]


def gradient(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return weight.grad


def worst_error(
    case: Case, x: Tensor, info: Tensor, wanted: list[Tensor], *, whole: bool, recompute: bool, device: str
) -> float:
    """Largest difference from the reference on this rank: of one nano-batch alone, or two in turns."""
    group = dist.group.WORLD
    arguments = {**SHAPE, "kernel": "reference", "group": group, **case.arguments}
    nano = NanoBatches.of(plan(case.mask, **arguments)) if whole else cut_in_two(case.mask, at=case.at, **arguments)
    layers = make_layers(sinks=case.sinks)
    stack = PingPong(layers).to(device)
    if recompute:
        stack.set_runner(functools.partial(checkpoint, use_reentrant=False, context_fn=checkpoint_contexts))
    local = [x[:, rows].to(device).clone().requires_grad_() for rows in nano.positions]
    ys = stack(local, [info[rows].to(device) for rows in nano.positions], nano, return_lse=case.sinks)
    torch.stack([y.sin().sum() for y in ys]).sum().backward()
    weights = weights_of(layers)
    for weight in weights:
        dist.all_reduce(gradient(weight))
    rows = torch.cat(nano.positions)
    found = [torch.cat([y.detach() for y in ys], 1), torch.cat([gradient(part) for part in local], 1)]
    pairs = [(a, b[:, rows]) for a, b in zip(found, wanted, strict=False)]
    pairs += list(zip(map(gradient, weights), wanted[2:], strict=True))
    return max(((a.cpu() - b).abs().max().item() if a.numel() else 0.0) for a, b in pairs)


def run_cases(rank: int, world: int, device: str = "cpu") -> dict[str, float]:
    """Every case in turns, and in one piece."""
    errors, wanted = {}, {}
    for i, case in enumerate(cases(world)):
        n = case.mask.num_queries
        x = torch.randn(1 if n > 100 else 2, n, DIM, dtype=torch.double, generator=torch.Generator().manual_seed(n))
        info = torch.linspace(0.5, 1.5, n, dtype=torch.double)
        known = case.mask.digest, case.sinks
        if known not in wanted:
            wanted[known] = reference(case, x, info)
        for whole in (False, True):
            recompute = (i % 2 == 0) == whole
            how = {"whole": whole, "recompute": recompute, "device": device}
            errors[f"{case.name}, {'alone' if whole else 'in turns'}"] = worst_error(case, x, info, wanted[known], **how)
    return errors


@pytest.mark.timeout(400)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_results_and_gradients_are_exact(world: int) -> None:
    """Masks × servers × what stays for the backward × ping-pong on and off."""
    for rank, errors in enumerate(run_ranks(run_cases, world, timeout_s=300)):
        assert len(errors) == 2 * len({case.name for case in cases(world)}) >= 2 * (7 * 2 * min(world, 2) + 4)
        assert {name: error for name, error in errors.items() if not error < TOLERANCE} == {}, f"rank {rank}"


def run_modes(rank: int, world: int) -> dict[str, tuple[int, int, int]]:
    """(bytes of the forward, of the backward, kept) on this rank, of whole calls; and transfers with recomputation."""
    mask = Mask.documents([50, 5, 9])
    results = {}
    for mode in ("resend", "keep"):
        options = DisaggregatedOptions(servers=1, align=1)
        made = plan(mask, **SHAPE, group=dist.group.WORLD, strategy="disaggregated", options=options, backward=mode)
        assert made.transport is not None
        q, k, v = (torch.randn(1, made.num_local_rows, h, HEAD_DIM).requires_grad_() for h in (HEADS, KV_HEADS, KV_HEADS))
        for recompute in (False, True):
            start = made.transport.bytes_sent
            if recompute:
                out = checkpoint(attention, q, k, v, made, use_reentrant=False, context_fn=checkpoint_contexts)
            else:
                out = attention(q, k, v, made)
            middle = made.transport.bytes_sent
            assert isinstance(out, Tensor)
            out.sum().backward()
            kept = int(kept_bytes(made.program, HEAD_DIM, HEAD_DIM, 4)[rank]) if made.keep else 0
            results[f"{mode}{' recomputed' * recompute}"] = (middle - start, made.transport.bytes_sent - middle, kept)
    return results


SLOW_LINKS = Hardware("slow", 1, 0.1, 0.1, 1, 0.1, 0, 0, 0)
VERY_SLOW_LINKS = Hardware("slow", 1, 0.1, 0.1, 1, 1e-3, 0, 0, 0)
FAST_LINKS = Hardware("fast", 1, 0.1, 0.1, 1e3, 1e3, 0, 0, 0)
RATED = replace(
    SLOW_LINKS,
    kernels=tuple(
        KernelRate(name, backward, 16, call_s=0, launch_s=0, row_s=0, step_s=0, pair_s=pair_s, cut_pair_s=pair_s)
        for name, pair_s in (("reference", 1e-7), ("flash_cpu", 1e-8))
        for backward in (False, True)
    ),
)


def choose_numbers(rank: int, world: int) -> dict[str, tuple[int, str]]:
    """(nano-batches, reason) of what is predicted on several machines and masks."""
    chosen = {}
    pool: dict[str, Any] = {"options": DisaggregatedOptions(servers=1, align=1)}
    even = Mask.documents([64] * 8)
    for name, mask, hardware, how in (
        ("slow", even, SLOW_LINKS, pool),
        ("fast", even, FAST_LINKS, pool),
        ("apart", even, SLOW_LINKS, {}),
        ("whole", Mask.full(64, 64), SLOW_LINKS, pool),
        ("giant", Mask.causal(512), VERY_SLOW_LINKS, {}),  # its keys would travel twice
    ):
        arguments: dict[str, Any] = {**SHAPE, **how, "group": dist.group.WORLD, "strategy": "disaggregated"}
        arguments |= {"topology": hardware, "linear_flops": 1e5, "layers": 2}
        nano = choose_nano_batches(mask, **arguments)
        chosen[name] = len(nano.plans), nano.reason
        assert nano.reason in nano.describe()
        assert choose_nano_batches(mask, **arguments).reason == nano.reason  # from what is known
    for kernel in ("reference", "flash_cpu"):
        arguments = {**SHAPE, "group": dist.group.WORLD, "topology": RATED, "linear_flops": 1e5, "layers": 2, "kernel": kernel}
        nano = choose_nano_batches(Mask.causal(512), **arguments)
        assert f"on slow with {kernel}: " in nano.plans[0].reasons["strategy"]
        chosen[kernel] = len(nano.plans), nano.reason
    return chosen


def test_the_number_of_nano_batches_is_chosen_by_predicted_time() -> None:
    for found in run_ranks(choose_numbers, 2):
        assert found["slow"][0] == 2
        assert re.match(r"two nano-batches: [0-9.]+ ms in one, [0-9.]+ ms in two, predicted on slow", found["slow"][1])
        assert found["fast"][0] == found["giant"][0] == 1
        assert re.match(r"one nano-batch: 0.0% of [0-9.]+ ms wait for transfers, predicted on fast; two must", found["fast"][1])
        assert re.match(r"one nano-batch: [0-9.]+ ms in one, [0-9.]+ ms in two, predicted on slow; two must", found["giant"][1])
        assert found["apart"] == (1, "one nano-batch: its attention sends nothing")
        assert found["whole"] == (1, "one nano-batch: no row of this mask can be cut at")
        slow, fast = (re.search(r"([0-9.e+]+) ms", found[kernel][1]) for kernel in ("reference", "flash_cpu"))
        assert slow is not None
        assert fast is not None
        assert float(slow[1]) > 2 * float(fast[1]), "a named kernel is predicted by its own rates"
    alone = choose_nano_batches(Mask.causal(9), linear_flops=1.0, layers=1, **SHAPE)
    assert alone.reason == "one nano-batch: nothing travels on one rank"
    with pytest.raises(PlanError, match="linear_flops and layers must be positive, got 0 and 1"):
        choose_nano_batches(Mask.causal(9), linear_flops=0, layers=1, **SHAPE)


def test_keeping_sends_less_and_recomputation_repeats_nothing() -> None:
    home, server = run_ranks(run_modes, 2)
    for found in (home, server):
        assert found["keep"] == found["keep recomputed"]
        assert found["resend"] == found["resend recomputed"]
        assert found["keep"][0] == found["resend"][0]
    rows = 64
    assert server["keep"][2] == rows * 4 * (HEADS + 2 * KV_HEADS) * HEAD_DIM  # q, k and v of all rows, in fp32
    assert home["keep"][2] == 0
    assert home["resend"][1] - home["keep"][1] == server["keep"][2]
    assert server["resend"][1] == server["keep"][1]


def test_auto_keeps_within_its_limit_on_the_busiest_rank() -> None:
    mask, layout = Mask.documents([500, 30, 94]), Layout.contiguous(624, 4)
    program = plan_disaggregated(mask, layout, HEADS, KV_HEADS, DisaggregatedOptions(align=1))
    worst = int(kept_bytes(program, 64, 64, 2).max())
    sizes = {"head_dim": 64, "value_dim": 64, "element_bytes": 2}
    assert choose_mode(program, "auto", worst, **sizes)[0]
    keep, why = choose_mode(program, "auto", worst - 1, **sizes)
    assert not keep
    assert re.match(rf"resend: [0-9.]+ MB of received .* would be more than keep_bytes={worst - 1}", why)
    assert derive_backward(program, keep=True).keep
    assert "nothing is received" in plan(mask, **SHAPE, backward="keep").describe()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backward": "maybe"}, "backward='maybe' is unknown; choose one of resend, keep, auto"),
        ({"backward": "auto"}, 'backward="auto" needs keep_bytes'),
        ({"keep_bytes": 5}, 'keep_bytes=5 must not be negative, and belongs to backward="auto"'),
        ({"backward": "auto", "keep_bytes": -1}, "keep_bytes=-1 must not be negative"),
        ({"layout": Layout.contiguous(8, 1)}, "cut_in_two chooses where rows lie: leave layout out"),
        ({"at": 8}, "at=8 must leave rows on both sides: choose it from 1 to 7"),
        (
            {"mask": Mask.causal(1)},
            "only a stream of 2 or more rows, queries and keys alike, can be cut in two; the mask is 1",
        ),
        ({"mask": Mask.full(8, 8)}, "rows of the first half see rows of the second, and there is no row that no pair crosses"),
        ({"mask": Mask.documents([3, 5], causal=False), "at": 4}, "at=4 is no place to cut: rows before it see rows behind it"),
    ],
)
def test_what_cannot_be_planned_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"mask": Mask.causal(8), **SHAPE, **change}
    with pytest.raises(PlanError, match=re.escape(message)):
        cut_in_two(**arguments)


def test_wrong_inputs_are_refused() -> None:
    nano = cut_in_two(Mask.causal(9), **SHAPE)
    stack = PingPong(make_layers())
    x = torch.zeros(1, 9, DIM, dtype=torch.double)
    for arguments, options, message in (
        (([x], [x], nano), {}, "there are 2 nano-batches, but 1 inputs and 1 infos"),
        (([x, x], [x, x], nano), {}, r"nano-batch 0's x must be \[B, 5, …\], its rows on this rank, got \[1, 9, 10\]"),
        (([x[:, :5], x[:, 5:]], [x, x], nano), {"sink": 1}, "takes scale, softcap and return_lse of attention, not sink"),
    ):
        with pytest.raises(InputError, match=message):
            stack(*arguments, **options)
    with pytest.raises(InputError, match="at least one layer"):
        PingPong([])
    with pytest.raises(InputError, match="one nano-batch or two, got the plans of 3"):
        NanoBatches.of(*3 * nano.plans[:1])


def test_halves_hold_every_row_once_and_only_what_the_second_sees_comes_again() -> None:
    mask = Mask.documents([10, 30, 21])
    nano = cut_in_two(mask, **SHAPE, at=31)
    assert [rows.tolist() for rows in nano.positions] == [list(range(31)), list(range(31, 61))]
    assert nano.carried.tolist() == list(range(10, 31))  # of the document that the cut goes through
    assert sum(made.mask.area for made in nano.plans) == mask.area
    assert len(cut_in_two(Mask.documents([31, 30]), **SHAPE).carried) == 0
    assert [len(rows) for rows in cut_in_two(Mask.documents([9, 20, 14], causal=False), **SHAPE).positions] == [20, 23]
    assert nano.describe().startswith("nano-batch 0\nmask       31 × 31")


@pytest.mark.parametrize(
    ("lengths", "causal", "halves", "num_carried"),
    [
        ([10, 30, 21], True, (30, 31), 0),  # whole documents
        ([5, 40, 9, 6], True, (30, 30), 10),  # one of more than half: the rest of the first half, which the second sees
        ([20, 20, 20], True, (30, 30), 10),
        ([5, 40, 9, 6], False, (20, 40), 0),  # rows look ahead: never inside a document
        ([60], True, (30, 30), 30),
    ],
)
def test_halves_are_of_whole_documents_where_tokens_allow(
    lengths: list[int], causal: bool, halves: tuple[int, int], num_carried: int
) -> None:
    """Every row is in one half, and sees through the arranged mask what it saw in the stream."""
    mask = Mask.documents(lengths, causal=causal)
    nano = cut_in_two(mask, **SHAPE)
    assert tuple(len(rows) for rows in nano.positions) == halves
    assert len(nano.carried) == num_carried
    assert torch.equal(torch.cat(nano.positions).sort()[0], torch.arange(sum(lengths)))
    found = arrange(mask)
    assert found is not None
    order = np.arange(sum(lengths)) if found.order is None else found.order
    assert (mask.dense()[np.ix_(order, order)] == found.mask.dense()).all()
    assert sum(made.mask.area for made in nano.plans) == mask.area


def test_the_backward_goes_through_the_ticks_in_reverse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward: what one nano-batch posts travels while the other computes; the backward is the exact mirror of that."""
    seen: list[str] = []
    module = importlib.import_module("distattn.attention")  # the package's attribute of this name is the function
    phases = module._Phases

    class Recorded(phases):
        def __init__(self, execution: Any) -> None:
            super().__init__(execution)
            self.name = f"{execution.lowered.arenas[0].num_rows}"  # the nano-batches differ in length
            self.note("post")

        def note(self, what: str) -> None:
            seen.append(f"{what}{self.name}{'b' if self.execution.lowered.backward else 'f'}")

        def compute(self) -> None:
            self.note("compute")
            super().compute()

        def finish(self) -> tuple[Tensor, ...]:
            self.note("wait")
            return super().finish()

    monkeypatch.setattr(module, "_Phases", Recorded)
    nano = NanoBatches.of(plan(Mask.causal(5), **SHAPE), plan(Mask.causal(4), **SHAPE))
    xs = [torch.randn(1, rows, DIM, dtype=torch.double, requires_grad=True) for rows in (5, 4)]
    infos = [torch.ones(rows, dtype=torch.double) for rows in (5, 4)]
    torch.stack([y.sum() for y in PingPong(make_layers())(xs, infos, nano)]).sum().backward()
    forward = "post5 post4 compute5 compute4 wait5 post5 wait4 post4 compute5 compute4 wait5 wait4"
    mirror = {"post": "wait", "wait": "post", "compute": "compute"}
    backward = [mirror[step[:-1]] + step[-1] for step in reversed(forward.split())]
    assert seen == [f"{step}f" for step in forward.split()] + [f"{step}b" for step in backward]


# Faults: a server that is dead or stuck.


def serve_or_fail(rank: int, world: int, fault: str, folder: str) -> None:
    """The last rank, a dedicated server, ends or falls asleep in the middle of a phase; the others write what they hear."""
    options = DisaggregatedOptions(servers=1, align=1)
    arguments: dict[str, Any] = {**SHAPE, "group": dist.group.WORLD, "strategy": "disaggregated", "options": options}
    nano = cut_in_two(Mask.documents([20, 11]), timeout_s=TIMEOUT_S, **arguments)
    stack = PingPong(make_layers())

    def once() -> None:
        xs = [torch.ones(1, len(rows), DIM, dtype=torch.double) for rows in nano.positions]
        torch.stack([y.sum() for y in stack(xs, [torch.ones(len(rows)) for rows in nano.positions], nano)]).sum().backward()

    once()
    dist.barrier()
    if rank == world - 1:
        if fault == "dead":
            os._exit(7)
        time.sleep(4 * TIMEOUT_S)
        return
    started = time.monotonic()
    try:
        once()
    except TransportError as error:
        Path(folder, str(rank)).write_text(f"{time.monotonic() - started:.1f} {error}")
        if fault == "dead":
            raise


@pytest.mark.parametrize("fault", ["dead", "stuck"])
def test_a_server_that_fails_is_named_in_time(fault: str, tmp_path: Path) -> None:
    if fault == "dead":
        with pytest.raises(RankFailedError, match="rank 2 failed first: it ended with exit code 7"):
            run_ranks(serve_or_fail, 3, fault, str(tmp_path))
    else:
        run_ranks(serve_or_fail, 3, fault, str(tmp_path))
    for rank in (0, 1):
        seconds, message = (tmp_path / str(rank)).read_text().split(" ", 1)
        assert float(seconds) < 3 * TIMEOUT_S + 10
        assert re.match(rf"rank {rank} waited \d+\.\d s at stage \d of the disaggregated forward for ", message), message
        assert "ranks not seen waiting: 2" in message, message


def test_the_documents_example_runs() -> None:
    text = (Path(__file__).resolve().parent.parent / "docs" / "pingpong.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(example, "docs/pingpong.md", "exec"), names)
    assert [y.shape for y in names["ys"]] == [(1, 512, 64), (1, 512, 64)]
