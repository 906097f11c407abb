"""gloo on CPU, 1 to 4 ranks: the running softmax over sharded documents against a loop over tokens in fp64, to 1e-10."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import distattn
from distattn.errors import AgreementError, InputError, PlanError
from distattn.linear_planning import transport_of
from distattn.parallel.exchanges import EXCHANGES
from distattn.parallel.exchanges.all_scan import AllScanOptions
from distattn.parallel.exchanges.two_level import TwoLevelOptions
from distattn.parallel.layout import Layout
from distattn.running_softmax import running_softmax, running_softmax_step
from distattn.testing import run_ranks

TOLERANCE = 1e-10
OPTIONS: dict[str, Any] = {"all_scan": AllScanOptions(blocks=2), "two_level": TwoLevelOptions(ranks_per_node=2)}


def token_loop(scores: Tensor, v: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """One row after the other: (o, lse)."""
    outs, lses = [], []
    for s, x in zip(scores.split(lengths, 1), v.split(lengths, 1), strict=True):
        lse, o = torch.full_like(s[:, 0], -torch.inf) if s.shape[1] else None, 0.0
        for t in range(s.shape[1]):
            assert lse is not None
            after = torch.logaddexp(lse, s[:, t])
            o = (lse - after).exp()[..., None] * o + (s[:, t] - after).exp()[..., None] * x[:, t]
            lse = after
            outs.append(o)
            lses.append(lse)
    return torch.stack(outs, 1), torch.stack(lses, 1)


def random_case(rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scores, far apart so that maxima move, v, and gradients of o and lse."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(2, rows, 3, n, generator=generator, dtype=torch.float64) for n in (1, 5, 5, 1)]
    return made[0][..., 0] * 6, made[1], made[2], made[3][..., 0]


def uneven(rows: int, world: int) -> Layout:
    """Unequal shares in the order of ranks; one of several ranks has nothing."""
    cuts = [0, *np.sort(np.random.default_rng(world).integers(1, rows, world - 1)).tolist(), rows]
    if world > 1:
        empty = 1 if world > 2 else 0
        cuts[empty + 1] = cuts[empty]
    return Layout.given([[(cuts[r], cuts[r + 1])] for r in range(world)])


def streams(world: int) -> dict[str, tuple[Layout | None, list[int]]]:
    return {
        "one document": (None, [40 * world]),
        "packed": (Layout.contiguous(61, world), [1, 9, 34, 13, 4]),
        "uneven, an empty shard": (uneven(47, world), [3, 0, 40, 4]),
        "zigzag": (Layout.zigzag(43, world), [5, 37, 1]),
        "striped": (Layout.striped(33, world, block=3), [33]),
        "fewer rows than ranks": (Layout.contiguous(1, world), [0, 1]),
    }


def differentiate(run: Any, scores: Tensor, v: Tensor, do: Tensor, dlse: Tensor) -> tuple[Tensor, ...]:
    """o, lse, dscores, dv."""
    s, x = scores.clone().requires_grad_(), v.clone().requires_grad_()
    o, lse = run(s, x)
    torch.autograd.backward([o, lse], [do, dlse])
    assert s.grad is not None
    assert x.grad is not None
    return o.detach(), lse.detach(), s.grad, x.grad


def run_grid(rank: int, world: int) -> dict[str, float]:
    worst = {}
    for name, (layout, lengths) in streams(world).items():
        case = random_case(sum(lengths))
        wanted = differentiate(lambda s, x, n=lengths: token_loop(s, x, n), *case)
        mine = torch.from_numpy((layout or Layout.contiguous(sum(lengths), world)).rows(rank))
        for exchange in EXCHANGES:
            shared: dict[str, Any] = {
                "group": dist.group.WORLD,
                "exchange": exchange,
                "layout": layout,
                "cu_seqlens": np.concatenate([[0], np.cumsum(lengths)]),
                "options": OPTIONS.get(exchange),
            }
            found = differentiate(lambda s, x, kw=shared: running_softmax(s, x, **kw), *(t[:, mine] for t in case))
            errors = [(a - b[:, mine]).abs().max() for a, b in zip(found, wanted, strict=True) if a.numel()]
            worst[f"{name}, {exchange}"] = float(torch.stack(errors).max()) if errors else 0.0
    return worst


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_equals_the_token_loop(world: int) -> None:
    for worst in run_ranks(run_grid, world, timeout_s=250):
        assert len(worst) == 6 * len(EXCHANGES)
        assert {name: error for name, error in worst.items() if not error < TOLERANCE} == {}


def run_refusals(rank: int, world: int) -> str:
    scores, v, *_ = random_case(4)
    try:
        running_softmax(scores, v, group=dist.group.WORLD, exchange="serial" if rank else "all_scan")
    except AgreementError as error:
        return str(error)
    return ""


def test_ranks_must_make_the_same_call() -> None:
    assert all("exchange=serial" in said and "exchange=all_scan" in said for said in run_ranks(run_refusals, 2, timeout_s=60))


def run_checkpointed(rank: int, world: int) -> tuple[list[int], float]:
    """Messages of a forward, of its checkpointed backward and of a plain one; difference of their gradients."""
    scores, v, do, dlse = random_case(32)
    group = dist.group.WORLD

    def call(s: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return running_softmax(s * 2, x, group=group)

    def kept(s: Tensor, x: Tensor) -> Any:
        return checkpoint(call, s, x, use_reentrant=False, context_fn=distattn.checkpoint_contexts)

    mine = slice(16 * rank, 16 * rank + 16)
    parts = [t[:, mine] for t in (scores, v, do, dlse)]
    assert group is not None
    before = transport_of(group).num_transfers
    plain = differentiate(call, *parts)
    between = transport_of(group).num_transfers
    saved = differentiate(kept, *parts)
    counts = [between - before, transport_of(group).num_transfers - between]
    return counts, max(float((a - b).abs().max()) for a, b in zip(plain, saved, strict=True))


def test_a_checkpoint_repeats_no_exchange() -> None:
    for (plain, saved), error in run_ranks(run_checkpointed, 2, timeout_s=60):
        assert plain == saved > 0
        assert error == 0


def test_chunks_of_chunks() -> None:
    """Enough rows for three levels of the scan, and resets at every distance."""
    lengths = [1, 17, 300, 2, 40, 256, 16, 31]
    case = random_case(sum(lengths))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    wanted = differentiate(lambda s, x: token_loop(s, x, lengths), *case)
    found = differentiate(lambda s, x: running_softmax(s, x, cu_seqlens=starts), *case)
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() < TOLERANCE


def test_rows_that_are_left_out() -> None:
    scores, v, do, dlse = random_case(70)
    scores[:, :40] = -torch.inf
    scores[:, 60] = -torch.inf
    o, lse, dscores, dv = differentiate(running_softmax, scores, v, do, torch.zeros_like(dlse))
    assert (o[:, :40] == 0).all()
    assert lse[:, :40].isneginf().all()
    wanted = differentiate(running_softmax, scores[:, 40:], v[:, 40:], do[:, 40:], torch.zeros_like(dlse[:, 40:]))
    for a, b in zip((o, lse, dscores, dv), wanted, strict=True):
        torch.testing.assert_close(a[:, 40:], b)
    assert not dscores.isnan().any()
    assert (dv[:, :40] == 0).all()


def test_scores_of_any_size() -> None:
    """No exponent is above 0: scores that climb by thousands neither overflow nor lose their gradients."""
    scores, v, do, dlse = random_case(50)
    scores = scores * 3000
    wanted = differentiate(lambda s, x: token_loop(s, x, [50]), scores, v, do, dlse)
    for a, b in zip(differentiate(running_softmax, scores, v, do, dlse), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_half_precision_works_in_fp32() -> None:
    scores, v, *_ = random_case(300)
    o, lse = running_softmax(scores.float(), v.bfloat16())
    wanted, wanted_lse = token_loop(scores, v.bfloat16().double(), [300])
    assert (o.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(o.double(), wanted, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=1e-5)


def test_steps_continue_a_prefix() -> None:
    scores, v, *_ = random_case(9)
    wanted, _ = running_softmax(scores, v)
    o, lse = running_softmax(scores[:, :6], v[:, :6])
    state = (lse[:, -1], o[:, -1])
    first, _ = running_softmax_step(scores[:, :1], v[:, :1], None)
    torch.testing.assert_close(first, wanted[:, :1])
    for t in range(6, 9):
        o, state = running_softmax_step(scores[:, t : t + 1], v[:, t : t + 1], state)
        torch.testing.assert_close(o, wanted[:, t : t + 1])
    # A state is a row with its score and value.
    again, _ = running_softmax(state[0][:, None], state[1][:, None])
    torch.testing.assert_close(again[:, 0], wanted[:, -1])


# Dynamo looks at .grad of non-leaves where the graph breaks (torch 2.11 to 2.13).
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled() -> None:
    case = random_case(20)

    def layer(s: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        o, lse = running_softmax(s * 2, x)
        return o.sin(), lse

    wanted = differentiate(layer, *case)
    for a, b in zip(differentiate(torch.compile(layer, backend="aot_eager"), *case), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_refusals() -> None:
    scores, v, *_ = random_case(4)
    with pytest.raises(
        InputError, match=r"scores must be \[B, T, H\] and v \[B, T, H, V\].*got \[2, 4, 2\] and \[2, 4, 3, 5\]"
    ):
        running_softmax(scores[..., :2], v)
    with pytest.raises(InputError, match=r"scores and v must be floating and share a device; got torch\.int64 on cpu"):
        running_softmax(scores.long(), v)
    with pytest.raises(InputError, match="cu_seqlens ends at 5, but the layout has 4 rows"):
        running_softmax(scores, v, layout=Layout.contiguous(4, 1), cu_seqlens=[0, 5])
    with pytest.raises(PlanError, match="exchange='ring' is unknown"):
        running_softmax(scores, v, exchange="ring")
    with pytest.raises(PlanError, match=r'options belong to one exchange: name it instead of exchange="auto"'):
        running_softmax(scores, v, options=AllScanOptions())
    with pytest.raises(PlanError, match="options of serial must be SerialOptions, got AllScanOptions"):
        running_softmax(scores, v, exchange="serial", options=AllScanOptions())
    with pytest.raises(InputError, match=r"a step takes scores \[B, 1, H\] and v \[B, 1, H, V\]; got \[2, 4, 3\]"):
        running_softmax_step(scores, v, None)
    with pytest.raises(InputError, match=r"state must be \(lse \[2, 3\], o \[2, 3, 5\]\), got \[2, 2\] and \[2, 3, 5\]"):
        running_softmax_step(scores[:, :1], v[:, :1], (scores[:, 0, :2], v[:, 0]))
