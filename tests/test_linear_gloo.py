"""gloo on CPU, 1 to 4 ranks: every operator × every exchange × awkward streams against the token loop in fp64, to 1e-10."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import distattn
from distattn.errors import AgreementError, InputError, TransportError
from distattn.kernels.linear import Operands
from distattn.linear_planning import transport_of
from distattn.parallel.exchanges import EXCHANGES
from distattn.parallel.exchanges.all_scan import AllScanOptions
from distattn.parallel.exchanges.two_level import TwoLevelOptions
from distattn.parallel.layout import Layout
from distattn.testing import run_ranks
from tests.kernels.linear_cases import CASES, NAMES, make_operands, oracle, random_states

TOLERANCE = 1e-10
BATCH = 2
OPTIONS: dict[str, Any] = {
    "serial": None,
    "all_gather": None,
    "all_scan": AllScanOptions(blocks=2),
    "two_level": TwoLevelOptions(ranks_per_node=2),
}


def uneven(rows: int, world: int) -> Layout:
    """Unequal shares in the order of ranks; with three ranks or more the second has nothing, else the first."""
    cuts = [0, *np.sort(np.random.default_rng(world).integers(1, rows, world - 1)).tolist(), rows]
    if world > 1:
        empty = 1 if world > 2 else 0
        cuts[empty + 1] = cuts[empty]
    return Layout.given([[(cuts[r], cuts[r + 1])] for r in range(world)])


def streams(world: int) -> dict[str, tuple[Layout | None, int, list[int] | None]]:
    """name → (layout, rows, document lengths)."""
    return {
        "one document": (None, 4 * world, None),
        "packed": (None, 29, [1, 9, 4, 13, 2]),
        "uneven, an empty shard": (uneven(27, world), 27, [3, 0, 20, 4]),
        "zigzag": (Layout.zigzag(23, world), 23, [5, 17, 1]),
        "striped": (Layout.striped(17, world, block=3), 17, None),
        "fewer rows than ranks": (Layout.contiguous(1, world), 1, [0, 1]),
    }


class Case:
    """One stream of one operator with its oracle, and this rank's part of both."""

    def __init__(
        self,
        kind: str,
        gate: str,
        stream: tuple[Layout | None, int, list[int] | None],
        rank: int,
        world: int,
        device: str = "cpu",
    ) -> None:
        self.kind, (given, rows, lengths) = kind, stream
        self.layout = given
        self.rows = torch.from_numpy((given or Layout.contiguous(rows, world)).rows(rank))
        self.cu_seqlens = None if lengths is None else np.concatenate([[0], np.cumsum(lengths)])
        self.x = make_operands(kind, gate, BATCH, rows, heads=1 if gate == "scalar" else 2, value_heads=2, strength=0.2)
        documents = 1 if lengths is None else len(lengths)
        self.initial, self.dfinal = (random_states(BATCH, documents, self.x, seed) for seed in (1, 2))
        self.do = torch.randn(self.x.v.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        wanted = oracle(self.x, lengths or [rows], self.initial, self.do, self.dfinal)
        self.wanted = {name: want.to(device) for name, want in wanted.items()}
        self.x = Operands(*(t if t is None else t.to(device) for t in self.x[:5]), self.x.scale)  # pyright: ignore
        self.rows, self.initial, self.dfinal, self.do = (t.to(device) for t in (self.rows, self.initial, self.dfinal, self.do))

    def local(self, x: Tensor) -> Tensor:
        return x if x.ndim == 1 else x[:, self.rows]

    def run(self, exchange: str, world: int, rank: int, options: Any = None) -> float:
        """Worst error of the output, the final state and every gradient."""
        leaves = {n: self.local(t).clone().requires_grad_() for n, t in zip(NAMES, self.x[:5]) if t is not None}
        start = self.initial.flatten(0, 1).clone().requires_grad_()
        o, final = distattn.linear_attention(
            leaves["q"], leaves["k"], leaves["v"], kind=self.kind, decay=leaves.get("g"), beta=leaves.get("beta"),
            group=dist.group.WORLD, exchange=exchange, cu_seqlens=self.cu_seqlens, layout=self.layout, initial_state=start,
            output_final_state=True, options=options, kernel="torch",
        )  # fmt: skip
        assert final is not None
        share = self.dfinal.flatten(0, 1) * (rank + 1) * 2 / (world * (world + 1))  # sums to dfinal over the ranks
        torch.autograd.backward([o, final], [self.local(self.do), share])
        errors = [
            self._error(o.detach(), self.local(self.wanted["o"])),
            self._error(final.detach(), self.wanted["final"].flatten(0, 1)),
        ]
        for name, leaf in leaves.items():
            grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone()
            if leaf.ndim == 1:
                dist.all_reduce(grad)
            errors.append(self._error(grad, self.local(self.wanted[f"d{name}"])))
        assert start.grad is not None
        dinitial = start.grad.clone()
        dist.all_reduce(dinitial)
        errors.append(self._error(dinitial, self.wanted["dinitial"].flatten(0, 1)))
        return max(errors)

    @staticmethod
    def _error(found: Tensor, wanted: Tensor) -> float:
        assert found.shape == wanted.shape, (found.shape, wanted.shape)
        assert not found.isnan().any()
        return float((found - wanted).abs().max()) if found.numel() else 0.0


def grid(world: int) -> list[tuple[str, str, str]]:
    """(kind, gate, stream): every operator on the hard streams, one of each kind of border on all."""
    hard = ("one document", "uneven, an empty shard", "zigzag")
    everywhere = (("linear", "none"), ("gla", "vector"), ("gated_delta", "scalar"))
    return [(kind, gate, name) for kind, gate in CASES for name in streams(world) if name in hard or (kind, gate) in everywhere]


def run_grid(rank: int, world: int) -> list[tuple[str, float]]:
    errors = []
    for kind, gate, name in grid(world):
        case = Case(kind, gate, streams(world)[name], rank, world)
        for exchange in EXCHANGES:
            error = case.run(exchange, world, rank, OPTIONS[exchange])
            errors.append((f"{kind} {gate}, {name}, {exchange}", error))
    return errors


@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_matches_the_recurrence(world: int) -> None:
    for errors in run_ranks(run_grid, world, timeout_s=580):
        assert len(errors) == len(grid(world)) * len(EXCHANGES)
        wrong = [entry for entry in errors if not entry[1] < TOLERANCE]
        assert wrong == []


# What else a call promises.


def run_promises(rank: int, world: int) -> None:
    """Final states of owners only, no states at all, strided inputs, a choice that says why."""
    case = Case("gated_delta", "scalar", (uneven(27, world), 27, [3, 0, 20, 4]), rank, world)
    assert case.layout is not None
    assert case.cu_seqlens is not None
    q, k, v = (case.local(t) for t in case.x[:3])
    assert case.x.g is not None
    assert case.x.beta is not None
    g, beta = case.local(case.x.g), case.local(case.x.beta)
    shared: dict[str, Any] = {
        "kind": "gated_delta", "decay": g, "beta": beta, "group": dist.group.WORLD, "layout": case.layout,
        "cu_seqlens": torch.from_numpy(case.cu_seqlens),
    }  # fmt: skip
    given = {"initial_state": case.initial.flatten(0, 1), "output_final_state": True}
    o, states = call(q, k, v, **shared, **given)
    same, owned = call(q, k, v, **shared, **given, state_owner_only=True)
    assert torch.equal(o, same)
    ends = np.array([2, 0, 22, 26])  # last row of each document; the second has none, and rank 0 passes it through
    last = np.concatenate([np.flatnonzero(case.layout.rows(rank) == end) for end in ends])
    documents = [d for d, end in enumerate(ends) if (d == 1 and rank == 0) or (d != 1 and end in case.layout.rows(rank))]
    assert len(last) <= len(ends)
    torch.testing.assert_close(owned.unflatten(0, (BATCH, -1)), states.unflatten(0, (BATCH, 4))[:, documents])

    plain, nothing = distattn.linear_attention(q, k, v, **shared)
    assert nothing is None
    assert torch.equal(plain, call(q, k, v, **shared, initial_state=torch.zeros_like(states), output_final_state=True)[0])
    with torch.no_grad():
        assert torch.equal(plain, distattn.linear_attention(q, k, v, **shared)[0])
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert torch.equal(plain, distattn.linear_attention(*strided, **shared)[0])


def call(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    o, states = distattn.linear_attention(*args, **kwargs)
    assert states is not None
    return o, states


def run_checkpointed(rank: int, world: int) -> None:
    """Under the selective policy the backward repeats no exchange; under the plain one it does."""
    x = make_operands("gla", "vector", 1, 6, seed=rank)
    transport = transport_of(world_group())
    transfers, grads = {}, {}
    for name in ("none", "selective", "plain"):
        inputs = [t.clone().requires_grad_() for t in (x.q, x.k, x.v)]

        def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            o, _ = distattn.linear_attention(q * 2, k, v, kind="gla", decay=x.g, group=dist.group.WORLD, exchange="serial")
            return o.sin()

        before = transport.num_transfers
        if name == "none":
            out = layer(*inputs)
        elif name == "selective":
            out = checkpoint(layer, *inputs, use_reentrant=False, context_fn=distattn.checkpoint_contexts)
        else:
            out = checkpoint(layer, *inputs, use_reentrant=False)
        assert isinstance(out, Tensor)
        out.sum().backward()
        transfers[name] = transport.num_transfers - before
        grads[name] = [t.grad for t in inputs]
    hops = world - 1
    assert transfers == {"none": 2 * hops, "selective": 2 * hops, "plain": 3 * hops}
    for name in ("selective", "plain"):
        for found, want in zip(grads[name], grads["none"], strict=True):
            assert torch.equal(found, want)


def world_group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def run_bytes(rank: int, world: int) -> None:
    """all_scan moves K · V numbers a head and rank, whatever the transition, forward and backward."""
    transport = transport_of(world_group())
    one_state = 8 * 2 * 4 * 6
    for kind, gate in CASES:
        x = make_operands(kind, gate, 1, 5, key_dim=4, value_dim=6)
        before = transport.bytes_sent
        o, _ = distattn.linear_attention(
            x.q.requires_grad_(), x.k, x.v, kind=kind, decay=x.g, beta=x.beta, group=dist.group.WORLD, exchange="all_scan",
            options=AllScanOptions(blocks=4),
        )  # fmt: skip
        sent = transport.bytes_sent
        o.sum().backward()
        assert sent - before == (one_state if rank < world - 1 else 0), kind
        assert transport.bytes_sent - sent == (one_state if rank > 0 else 0), kind


def run_all_promises(rank: int, world: int) -> None:
    run_promises(rank, world)
    run_checkpointed(rank, world)
    run_bytes(rank, world)


def test_promises() -> None:
    run_ranks(run_all_promises, 3, timeout_s=250)


def run_disagreement(rank: int, world: int) -> str:
    """Rank 0 gathers and rank 1 hands on: one of them learns of it in its first call, the other at the latest in its next."""
    x = make_operands("gla", "vector", 1, 6)
    exchange = "serial" if rank else "all_gather"
    try:
        for _ in range(2):
            distattn.linear_attention(x.q, x.k, x.v, kind="gla", decay=x.g, group=dist.group.WORLD, exchange=exchange)
            exchange = "two_level"
    except (AgreementError, TransportError) as error:
        return str(error)
    return "nothing"


def test_ranks_that_disagree_hear_of_it() -> None:
    texts = run_ranks(run_disagreement, 2, timeout_s=200)
    assert all("planned different things" in text for text in texts), texts


def run_refusal(rank: int, world: int) -> str:
    x = make_operands("gla", "vector", 1, 6)
    v = x.v if rank == 0 else x.v[:, :5]
    try:
        distattn.linear_attention(x.q, x.k, v, kind="gla", decay=x.g, group=dist.group.WORLD, exchange="serial")
    except (InputError, TransportError) as error:
        return str(error)
    return "nothing"


def test_a_refused_input_reaches_the_other_ranks() -> None:
    texts = run_ranks(run_refusal, 2, timeout_s=200)
    assert texts[1].startswith("q and k must have shape [B, T, H, K] and v [B, T, HV, V]; got ")
    assert "rank 1 refused its input: q and k must have shape" in texts[0]
