"""gloo on CPU, 1 to 4 ranks: the memory with momentum over sharded documents against a loop over tokens in fp64, to 1e-10."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import distattn
from distattn.errors import AgreementError, InputError, PlanError
from distattn.linear_planning import transport_of
from distattn.momentum_memory import momentum_memory, momentum_memory_step, write_memory
from distattn.parallel.exchanges import EXCHANGES
from distattn.parallel.exchanges.all_scan import AllScanOptions
from distattn.parallel.exchanges.serial import SerialOptions
from distattn.parallel.exchanges.two_level import TwoLevelOptions
from distattn.parallel.layout import Layout
from distattn.testing import run_ranks

TOLERANCE = 1e-10
OPTIONS: dict[str, Any] = {"all_scan": AllScanOptions(blocks=2), "two_level": TwoLevelOptions(ranks_per_node=2)}
BATCH, HEADS, KEYS, VALUES = 2, 2, 3, 4


class Rows(NamedTuple):
    """Inputs and output gradients by row; o is read at each row, before at the start of its chunk."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    momentum: Tensor
    rate: Tensor
    do: Tensor
    dbefore: Tensor

    def take(self, rows: Tensor | slice) -> Rows:
        return Rows(*(x[:, rows] for x in self))

    def having(self, leaves: Sequence[Tensor]) -> Rows:
        """These inputs, in order, and the rest as it is."""
        return self._replace(**dict(zip(self._fields, leaves, strict=False)))


class Case(NamedTuple):
    """chunk: C. seen: rows behind each initial state, None: no initial states and no final ones."""

    layout: Layout | None
    lengths: list[int]
    chunk: int
    seen: list[int] | None = None


def random_rows(rows: int, seed: int = 0) -> Rows:
    """Rates of every size, decay and momentum among them that forget all."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, do, dbefore = (
        torch.randn(BATCH, rows, HEADS, n, generator=generator, dtype=torch.float64)
        for n in (KEYS, KEYS, VALUES, VALUES, VALUES)
    )
    draws = torch.rand(3, BATCH, rows, HEADS, generator=generator, dtype=torch.float64)
    decay, momentum = (draws[0] * 0.95 + 0.05).log() / 8, (draws[1] * 0.9 + 0.05).log()
    forgets = torch.rand(BATCH, rows, HEADS, generator=generator) < 0.05
    return Rows(q, k / k.norm(dim=-1, keepdim=True), v, decay - 9 * forgets, momentum, draws[2] / 4, do, dbefore)


def token_loop(x: Rows, lengths: list[int], chunk: int, initial: Tensor, seen: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """One row after the other: (o, before, final states [B, D, H, 3, K, V])."""
    outs, befores, finals = [], [], []
    at = 0
    for document, length in enumerate(lengths):
        memory, speed, start = initial[:, document].unbind(2)
        for t in range(length):
            if (seen[document] + t) % chunk == 0:
                start = memory
            k, v = x.k[:, at + t], x.v[:, at + t]
            error = torch.einsum("bhk,bhkv->bhv", k, start) - v
            gradient = 2 * torch.einsum("bhk,bhv->bhkv", k, error)
            decay, momentum, rate = (part[:, at + t, :, None, None] for part in (x.decay, x.momentum, x.rate))
            speed = momentum.exp() * speed - rate * gradient
            memory = decay.exp() * memory + speed
            outs.append(torch.einsum("bhk,bhkv->bhv", x.q[:, at + t], memory))
            befores.append(torch.einsum("bhk,bhkv->bhv", x.q[:, at + t], start))
        at += length
        if (seen[document] + length) % chunk == 0:
            start = memory
        finals.append(torch.stack([memory, speed, start], 2))
    return torch.stack(outs, 1), torch.stack(befores, 1), torch.stack(finals, 1)


def random_states(documents: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, documents, HEADS, 3, KEYS, VALUES, generator=generator, dtype=torch.float64)


def of_loop(x: Rows, case: Case) -> dict[str, Tensor]:
    """What the call of ``of_call`` must give, over all rows."""
    leaves = [part.clone().requires_grad_() for part in x[:6]]
    initial = torch.zeros(BATCH, len(case.lengths), HEADS, 3, KEYS, VALUES, dtype=torch.float64)
    seen = [0] * len(case.lengths)
    if case.seen is not None:
        initial, seen = random_states(len(case.lengths), 1), case.seen
    initial.requires_grad_()
    o, before, final = token_loop(x.having(leaves), case.lengths, case.chunk, initial, seen)
    dfinal = random_states(len(case.lengths), 2) if case.seen is not None else torch.zeros_like(final)
    torch.autograd.backward([o, before, final], [x.do, x.dbefore, dfinal])
    found = {"o": o, "before": before} | {name: leaf.grad for name, leaf in zip(Rows._fields, leaves, strict=False)}
    if case.seen is not None:
        found |= {"final": final, "initial": initial.grad}
    return {name: value.detach() for name, value in found.items() if value is not None}


def of_call(x: Rows, case: Case, **options: Any) -> dict[str, Tensor]:
    """The same of this rank's rows; gradients of final states are shared out among ranks."""
    leaves = [part.clone().requires_grad_() for part in x[:6]]
    states: dict[str, Any] = {}
    initial = random_states(len(case.lengths), 1).to(x.q.device).requires_grad_()
    if case.seen is not None:
        states = {"initial_state": initial.flatten(0, 1), "seen": case.seen, "output_final_state": True}
    q, k, v, decay, momentum, rate = leaves
    memory = write_memory(
        k, v, decay=decay, momentum=momentum, rate=rate, chunk=case.chunk, layout=case.layout,
        cu_seqlens=np.concatenate([[0], np.cumsum(case.lengths)]), **states, **options,
    )  # fmt: skip
    results, gradients = [memory.read(q), memory.read_before(q)], [x.do, x.dbefore]
    if memory.final_state is not None:
        ranks = dist.get_world_size() if options else 1
        results.append(memory.final_state)
        gradients.append(random_states(len(case.lengths), 2).to(x.q.device).flatten(0, 1) / ranks)
    torch.autograd.backward(results, gradients)
    found = {"o": results[0], "before": results[1]} | {
        name: leaf.grad for name, leaf in zip(Rows._fields, leaves, strict=False)
    }
    if memory.final_state is not None:
        gradient = initial.grad
        assert gradient is not None
        if options:
            dist.all_reduce(gradient)
        found |= {"final": memory.final_state.unflatten(0, (BATCH, -1)), "initial": gradient}
    return {name: value.detach().cpu() for name, value in found.items() if value is not None}


def uneven(rows: int, world: int) -> Layout:
    """Unequal shares in the order of ranks; one of several ranks has nothing."""
    cuts = [0, *np.sort(np.random.default_rng(world).integers(1, rows, world - 1)).tolist(), rows]
    if world > 1:
        empty = 1 if world > 2 else 0
        cuts[empty + 1] = cuts[empty]
    return Layout.given([[(cuts[r], cuts[r + 1])] for r in range(world)])


def cases(world: int) -> dict[str, Case]:
    return {
        "whole chunks": Case(None, [16 * world], 4),
        "borders inside chunks": Case(Layout.contiguous(37, world), [1, 9, 16, 11], 8),
        "uneven, an empty shard": Case(uneven(29, world), [3, 0, 22, 4], 5),
        "zigzag": Case(Layout.zigzag(41, world), [5, 35, 1], 4),
        "striped": Case(Layout.striped(23, world, block=3), [23], 5),
        "states": Case(Layout.contiguous(26, world), [0, 14, 1, 11], 4, [3, 5, 0, 8]),
        "states, uneven": Case(uneven(27, world), [19, 8, 0], 6, [0, 1, 2]),
        "fewer rows than ranks": Case(Layout.contiguous(1, world), [0, 1], 4, [2, 3]),
        "one row a chunk": Case(Layout.contiguous(9, world), [9], 1),
    }


def run_grid(rank: int, world: int, device: str = "cpu") -> dict[str, float]:
    worst = {}
    for name, case in cases(world).items():
        rows = sum(case.lengths)
        x = random_rows(rows)
        wanted = of_loop(x, case)
        mine = torch.from_numpy((case.layout or Layout.contiguous(rows, world)).rows(rank))
        here = Rows(*(part.to(device) for part in x.take(mine)))
        for exchange in EXCHANGES:
            found = of_call(here, case, group=dist.group.WORLD, exchange=exchange, options=OPTIONS.get(exchange))
            assert found.keys() == wanted.keys()
            errors = []
            for key, whole in wanted.items():
                expected = whole if key in ("final", "initial") else whole[:, mine]
                errors += [(found[key] - expected).abs().max()] if expected.numel() else []
            worst[f"{name}, {exchange}"] = float(torch.stack(errors).max()) if errors else 0.0
    return worst


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_equals_the_token_loop(world: int) -> None:
    for worst in run_ranks(run_grid, world, timeout_s=250):
        assert len(worst) == len(cases(world)) * len(EXCHANGES)
        assert {name: error for name, error in worst.items() if not error < TOLERANCE} == {}


def run_rest(rank: int, world: int) -> dict[str, Any]:
    """Bytes on the wire, a checkpoint's transfers, one state for all documents, and what differing ranks are told."""
    group = dist.group.WORLD
    assert group is not None
    found: dict[str, Any] = {}
    transport = transport_of(group)
    for name, rows, chunk in (("whole chunks", 16, 4), ("inside a chunk", 18, 4)):
        x = random_rows(rows).take(slice(rank * rows // 2, (rank + 1) * rows // 2))
        before = transport.bytes_sent
        write(x, chunk=chunk, group=group, exchange="all_scan", options=AllScanOptions(blocks=1))
        found[name] = transport.bytes_sent - before

    x = random_rows(16).take(slice(8 * rank, 8 * rank + 8))

    def call(*leaves: Tensor) -> Tensor:
        return write(x.having(leaves), chunk=4, group=group).read(leaves[0])

    def kept(*leaves: Tensor) -> Any:
        return checkpoint(call, *leaves, use_reentrant=False, context_fn=distattn.checkpoint_contexts)

    counts, gradients = [], []
    for run in (call, kept):
        leaves = [part.clone().requires_grad_() for part in x[:6]]
        before = transport.num_transfers
        run(*leaves).backward(x.do)
        counts.append(transport.num_transfers - before)
        gradients.append([leaf.grad for leaf in leaves])
    found["transfers"] = counts
    found["kept"] = max(float((a - b).abs().max()) for a, b in zip(*gradients, strict=True) if a is not None and b is not None)

    lengths = [5, 0, 8, 3]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    shared = random_states(1, 5)[:1, 0].requires_grad_()
    each = shared.detach().expand(BATCH * len(lengths), -1, -1, -1, -1).clone().requires_grad_()
    results = []
    for state in (shared, each):
        memory = write(x, chunk=4, group=group, initial_state=state, cu_seqlens=starts, output_final_state=True)
        assert memory.final_state is not None
        (memory.read(x.q).square().sum() + memory.final_state.sin().sum()).backward()
        results += [memory.read(x.q).detach(), memory.final_state.detach()]
    assert shared.grad is not None
    assert each.grad is not None
    pairs = [(results[0], results[2]), (results[1], results[3]), (shared.grad, each.grad.sum(0, keepdim=True))]
    found["shared"] = max(float((a - b).abs().max()) for a, b in pairs)

    try:
        write(x, chunk=4 + rank, group=group, output_final_state=True)
    except AgreementError as error:
        found["said"] = str(error)
    return found


def write(x: Rows, **options: Any) -> Any:
    return write_memory(x.k, x.v, decay=x.decay, momentum=x.momentum, rate=x.rate, **options)


def test_bytes_checkpoints_shared_states_and_agreement() -> None:
    """all_scan sends two K × V states a head, a third where a border cuts a chunk; a checkpoint repeats no exchange."""
    state = BATCH * HEADS * KEYS * VALUES * 8
    for rank, found in enumerate(run_ranks(run_rest, 2, timeout_s=100)):
        assert found["whole chunks"] == (0 if rank else 2 * state)
        assert found["inside a chunk"] == (0 if rank else 3 * state)
        assert found["transfers"][0] == found["transfers"][1] > 0
        assert found["kept"] == 0
        assert found["shared"] < TOLERANCE
        assert "chunk=4" in found["said"]
        assert "chunk=5" in found["said"]


def test_steps_continue_a_prefix() -> None:
    x = random_rows(11)
    wanted = write(x, chunk=4).read(x.q)
    prefix = x.take(slice(0, 6))
    memory = write(prefix, chunk=4, output_final_state=True)
    state = memory.final_state
    for t in range(6, 11):
        row = x.take(slice(t, t + 1))
        o, state = momentum_memory_step(
            row.q, row.k, row.v, state, decay=row.decay, momentum=row.momentum, rate=row.rate, seen=t, chunk=4
        )
        torch.testing.assert_close(o, wanted[:, t : t + 1], rtol=TOLERANCE, atol=TOLERANCE)
    first = x.take(slice(0, 1))
    o, _ = momentum_memory_step(
        first.q, first.k, first.v, None, decay=first.decay, momentum=first.momentum, rate=first.rate, seen=0, chunk=4
    )
    torch.testing.assert_close(o, wanted[:, :1], rtol=TOLERANCE, atol=TOLERANCE)
    rest = x.take(slice(6, 11))
    o, _ = momentum_memory(
        rest.q, rest.k, rest.v, decay=rest.decay, momentum=rest.momentum, rate=rest.rate, chunk=4,
        initial_state=memory.final_state, seen=[6],
    )  # fmt: skip
    torch.testing.assert_close(o, wanted[:, 6:], rtol=TOLERANCE, atol=TOLERANCE)


def test_rates_that_forget_all() -> None:
    """A logarithm of −∞ is a factor of 0, and no gradient is NaN."""
    x = random_rows(9)
    decay, momentum = x.decay.clone(), x.momentum.clone()
    decay[:, 4] = -torch.inf
    momentum[:, 6] = -torch.inf
    leaves = [part.clone().requires_grad_() for part in (x.q, x.k, x.v, decay, momentum, x.rate)]
    case = Case(None, [9], 4)
    o, before, _ = token_loop(x.having(leaves), [9], 4, random_states(1, 0) * 0, [0])
    torch.autograd.backward([o, before], [x.do, x.dbefore])
    found = of_call(Rows(x.q, x.k, x.v, decay, momentum, x.rate, x.do, x.dbefore), case)
    for name, wanted in zip(("o", "before", *Rows._fields[:6]), (o, before, *(leaf.grad for leaf in leaves)), strict=True):
        assert wanted is not None
        torch.testing.assert_close(found[name], wanted, rtol=TOLERANCE, atol=TOLERANCE)


def test_half_precision_works_in_fp32() -> None:
    x = random_rows(70)
    x = x._replace(decay=x.decay / 8, q=x.q.bfloat16(), k=x.k.bfloat16(), v=x.v.bfloat16())
    memory = write(x, chunk=16, output_final_state=True)
    exact = x._replace(q=x.q.double(), k=x.k.double(), v=x.v.double())
    wanted, before, final = token_loop(exact, [70], 16, random_states(1, 0) * 0, [0])
    assert memory.final_state is not None
    assert (memory.read(x.q).dtype, memory.final_state.dtype) == (torch.bfloat16, torch.float32)
    for a, b in ((memory.read(x.q), wanted), (memory.read_before(x.q), before)):
        assert float((a.double() - b).norm() / b.norm()) < 4e-3
    assert float((memory.final_state.double() - final.flatten(0, 1)).norm() / final.norm()) < 1e-5


# Dynamo looks at .grad of non-leaves where the graph breaks (torch 2.11 to 2.13).
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled() -> None:
    x = random_rows(18)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o, _ = momentum_memory(q, k * 0.5, v, decay=x.decay, momentum=x.momentum, rate=x.rate, chunk=4, cu_seqlens=[0, 7, 18])
        return o.sin()

    gradients = []
    for run in (layer, torch.compile(layer, backend="aot_eager")):
        leaves = [part.clone().requires_grad_() for part in x[:3]]
        run(*leaves).backward(x.do)
        gradients.append([leaf.grad for leaf in leaves])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_refusals() -> None:
    x = random_rows(4)
    with pytest.raises(
        InputError, match=r"k must be \[B, T, H, K\] and v \[B, T, H, V\].*got \[2, 4, 2, 3\] and \[2, 4, 1, 4\]"
    ):
        write(x._replace(v=x.v[:, :, :1]), chunk=4)
    with pytest.raises(InputError, match=r"rate must be \[B, T, H\] = \[2, 4, 2\], got \[2, 4, 1\]"):
        write(x._replace(rate=x.rate[..., :1]), chunk=4)
    with pytest.raises(InputError, match=r"momentum must be floating and on cpu, got torch\.int64"):
        write(x._replace(momentum=x.momentum.long()), chunk=4)
    with pytest.raises(InputError, match="chunk must be at least 1 row, got 0"):
        write(x, chunk=0)
    with pytest.raises(InputError, match=r"q must be floating, on cpu, of shape \[2, 4, 2, 3\] as k is; got .*\[2, 3, 2, 3\]"):
        write(x, chunk=4).read(x.q[:, :3])
    with pytest.raises(
        InputError, match=r"initial_state must be floating, on cpu, of shape \[4, 2, 3, 3, 4\].*got .*\[2, 2, 3, 3, 4\]"
    ):
        write(x, chunk=4, cu_seqlens=[0, 1, 4], initial_state=random_states(1, 0).flatten(0, 1))
    with pytest.raises(InputError, match=r"one initial_state for all documents begins each of them, but seen is \[3, 0\]"):
        write(x, chunk=4, cu_seqlens=[0, 1, 4], seen=[3, 0], initial_state=random_states(1, 0)[0])
    with pytest.raises(InputError, match=r"seen must have a count of at least 0 for each of 1 documents, got \[1, 2\]"):
        write(x, chunk=4, seen=[1, 2])
    with pytest.raises(InputError, match="cu_seqlens ends at 5, but the layout has 4 rows"):
        write(x, chunk=4, layout=Layout.contiguous(4, 1), cu_seqlens=[0, 5])
    with pytest.raises(PlanError, match="exchange='ring' is unknown"):
        write(x, chunk=4, exchange="ring")
    with pytest.raises(PlanError, match="options of all_gather must be AllGatherOptions, got SerialOptions"):
        write(x, chunk=4, exchange="all_gather", options=SerialOptions())
    rates: dict[str, Any] = {"decay": x.decay[:, :1], "momentum": x.momentum[:, :1], "rate": x.rate[:, :1]}
    with pytest.raises(
        InputError, match=r"a step takes one row, q and k \[B, 1, H, K\]; got \[2, 4, 2, 3\] and \[2, 1, 2, 3\]"
    ):
        momentum_memory_step(x.q, x.k[:, :1], x.v[:, :1], None, **rates, seen=0)
    with pytest.raises(InputError, match="seen=2 is not possible: it counts the rows behind state"):
        momentum_memory_step(x.q[:, :1], x.k[:, :1], x.v[:, :1], None, **rates, seen=2)
    with pytest.raises(InputError, match=r"state must be \[B, H, 3, K, V\] = \[2, 2, 3, 3, 4\], got \[2, 2, 2, 3, 4\]"):
        momentum_memory_step(x.q[:, :1], x.k[:, :1], x.v[:, :1], random_states(1, 0)[:, 0, :, :2], **rates, seen=2)
