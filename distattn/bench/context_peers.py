"""Other implementations of context-parallel attention that install without compiling, behind one interface.

Each is called as its users call it, on tensors that already lie where it wants them. What one does not do is ``Refused``,
with its reason: those cells stay empty in the table.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask

from distattn.bench.context_cases import Case
from distattn.bench.lengths import draw
from distattn.bench.masks import WINDOW
from distattn.bench.predicates import Documents, Predicate, predicate
from distattn.mask import Mask
from distattn.mask_flex import block_lists

MAX_DENSE_TOKENS = 32768
"""Longest sequence for which a dense S×S mask is given to a peer that takes no other: a gigabyte."""

PAIRS_AT_ONCE = 1 << 26


class Refused(Exception):
    """An implementation does not compute a case; the message says why, as half a sentence."""


@dataclass(frozen=True)
class Ranks:
    """This rank and its peers, which are all ranks or some. group: theirs."""

    rank: int
    num_ranks: int
    device: torch.device
    group: dist.ProcessGroup

    @cached_property
    def mesh(self) -> DeviceMesh:
        if self.num_ranks < dist.get_world_size():
            return DeviceMesh.from_group(self.group, self.device.type, mesh_dim_names=("cp",))
        return init_device_mesh(self.device.type, (self.num_ranks,), mesh_dim_names=("cp",))

    def shard(self, order: Tensor) -> Tensor:
        """This rank's equal share of global rows in the given order."""
        return order.reshape(self.num_ranks, -1)[self.rank].cpu()

    def contiguous(self, tokens: int) -> Tensor:
        return self.shard(torch.arange(tokens))

    def head_tail(self, tokens: int) -> Tensor:
        """Rank r of P holds chunks r and 2P − 1 − r of 2P."""
        chunks = torch.arange(tokens).reshape(2 * self.num_ranks, -1)
        return torch.cat([chunks[self.rank], chunks[2 * self.num_ranks - 1 - self.rank]])


@dataclass(frozen=True, eq=False)
class Engine:
    """An implementation, ready to compute one case.

    positions: int64 [S_local], global rows of this rank. heads_first: tensors are [B, H, S, D], else [B, S, H, D].
    call(q, k, v) → out, differentiable. details: what it chose, for the report. close: gives back what it holds.
    """

    positions: Tensor
    heads_first: bool
    call: Callable[[Tensor, Tensor, Tensor], Tensor]
    details: dict[str, Any] = field(default_factory=dict)
    close: Callable[[], None] = lambda: None


Peer = Callable[[Case, Mask, Ranks], Engine]


def _needs_even_shards(case: Case, ranks: Ranks, multiple: int) -> None:
    if case.tokens % multiple:
        raise Refused(f"needs a length that is a multiple of {multiple} on {ranks.num_ranks} ranks")


def _is_causal(case: Case, name: str) -> bool:
    """For those that know only causal and full."""
    if case.mask not in ("causal", "full"):
        raise Refused(f"{name} knows causal and full attention only")
    return case.mask == "causal"


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Refused(f"is not installed here ({error})") from error


def torch_ring(case: Case, mask: Mask, ranks: Ranks, *, rotate: str) -> Engine:
    """torch.distributed.tensor.experimental.context_parallel: a ring over the fused SDPA kernels."""
    causal = _is_causal(case, "torch's ring")
    if ranks.device.type != "cuda":
        raise Refused("torch's ring runs on CUDA only")
    _needs_even_shards(case, ranks, 2 * ranks.num_ranks)
    cp = _module("torch.distributed.tensor.experimental._attention")
    cp.set_rotate_method(rotate)
    balanced, cp._cp_options.enable_load_balance = cp._cp_options.enable_load_balance, causal
    stack = contextlib.ExitStack()
    # The context shards its buffers, so it is given one that does not matter and stays open while calls are made.
    scratch = torch.zeros(1, 1, 2 * ranks.num_ranks, 1, device=ranks.device)
    stack.callback(setattr, cp._cp_options, "enable_load_balance", balanced)
    stack.enter_context(cp.context_parallel(ranks.mesh, buffers=[scratch], buffer_seq_dims=[2]))
    kernels = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    stack.enter_context(sdpa_kernel(kernels, set_priority=True))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=case.heads != case.kv_heads)

    positions = ranks.head_tail(case.tokens) if causal else ranks.contiguous(case.tokens)
    return Engine(positions, True, call, {"layout": "head_tail" if causal else "contiguous"}, stack.close)


def torch_flex(case: Case, mask: Mask, ranks: Ranks, *, balance: str) -> Engine:
    """torch's FlexAttention context parallel: keys and values are gathered, a BlockMask says what is seen."""
    cp: Any = _module("torch.distributed.tensor.experimental._context_parallel._attention")
    balancers = _module("torch.distributed.tensor.experimental._context_parallel._load_balancer")
    create_mask = getattr(cp, "_create_cp_block_mask", None)
    if create_mask is None:
        raise Refused(f"torch {torch.__version__} has no _create_cp_block_mask")
    _needs_even_shards(case, ranks, 128 * ranks.num_ranks)
    module = _flex_module(ranks.device)
    torch._dynamo.reset()
    cp._compiled_create_block_mask = block_mask_by_rows
    if balance == "ptrr":
        balancer = balancers._PTRRLoadBalancer(mask.to_flex(device=ranks.device), ranks.num_ranks)
    else:
        balancer = balancers._HeadTailLoadBalancer(case.tokens, ranks.num_ranks, ranks.device)
    order = balancer._generate_indices(restore=False)
    local = create_mask(flex_predicate(case, ranks.device.type), 1, 1, case.tokens, case.tokens, ranks.mesh, balancer)
    module = cp._ContextParallel(seq_dim=2, attention_type=cp._ContextParallel.AttentionType.FLEX)._apply(module, ranks.mesh)
    call = partial(module, block_mask=local, enable_gqa=case.heads != case.kv_heads)
    return Engine(ranks.shard(order[0]), True, call, {"layout": balance}, torch._dynamo.reset)


def block_mask_by_rows(
    mask_mod: Predicate, batch: int, heads: int, num_queries: int, num_keys: int, *, device: str, BLOCK_SIZE: tuple[int, int]
) -> BlockMask:
    """What torch's ``create_block_mask`` makes for one batch entry and head, found without compiling it and without S×S.

    Which blocks are seen is found once and not timed; compiled, that took most of a minute for each mask.
    """
    rows, columns = BLOCK_SIZE
    zero = torch.zeros((), dtype=torch.int64, device=device)
    keys = torch.arange(num_keys, device=device)[None]
    seen = []
    for block in torch.arange(num_queries, device=device).split(rows * max(1, PAIRS_AT_ONCE // (rows * num_keys))):
        allowed = mask_mod(zero, zero, block[:, None], keys).expand(len(block), num_keys)
        seen.append(allowed.reshape(len(block) // rows, rows, -1, columns).sum((1, 3)))
    counts = torch.cat(seen)
    full = counts == rows * columns
    return BlockMask.from_kv_blocks(
        *block_lists((counts > 0) & ~full), *block_lists(full), BLOCK_SIZE=BLOCK_SIZE, mask_mod=mask_mod,
        seq_lengths=(num_queries, num_keys),
    )  # fmt: skip


def flex_predicate(case: Case, device: str) -> Predicate:
    """The mask as a user of FlexAttention writes it: ``mask_mod(b, h, q_idx, kv_idx)``."""
    if case.window is not None:
        window = case.window
        return lambda b, h, i, j: (i >= j) & (i - j <= window)
    if case.lengths is not None:
        owner = Documents.make(draw(case.lengths, case.tokens, case.seed), device).of
        return lambda b, h, i, j: (owner[i] == owner[j]) & (i >= j)
    return predicate(case.mask, case.tokens, case.seed, device) or (lambda b, h, i, j: i >= 0)


def _flex_module(device: torch.device) -> torch.nn.Module:
    if device.type != "cuda":
        raise Refused("compiled FlexAttention has no backward on CPU")
    return _FlexModule()


class _FlexModule(torch.nn.Module):
    """FlexAttention as a module, since torch's context parallel hooks onto modules."""

    def __init__(self) -> None:
        super().__init__()
        from torch.nn.attention.flex_attention import flex_attention

        self.compiled = torch.compile(flex_attention, dynamic=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *more: Any, **options: Any) -> Any:
        # Some versions' hook hands score_mod and block_mask on by their places.
        return self.compiled(query, key, value, *more, **options)


def deepspeed_ulysses(case: Case, mask: Mask, ranks: Ranks) -> Engine:
    """DeepSpeed's DistributedAttention around torch's SDPA."""
    if ranks.device.type != "cuda":
        raise Refused("DeepSpeed compiles an operator before it communicates on CPU")
    layer = _module("deepspeed.sequence.layer")
    _needs_divisible_heads(case, ranks)
    _needs_even_shards(case, ranks, ranks.num_ranks)
    comm = _module("deepspeed.comm")
    if not comm.is_initialized():
        comm.init_distributed("nccl", auto_mpi_discovery=False, verbose=False)
    details: dict[str, Any] = {"layout": "contiguous"}
    inner = _sdpa(case, mask, ranks, details)

    def local(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        return inner(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).contiguous()

    distributed = layer.DistributedAttention(local, ranks.group, scatter_idx=2, gather_idx=1)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return distributed(q, k, v, 0)

    return Engine(ranks.contiguous(case.tokens), False, call, details)


def ringmaster_ulysses(case: Case, mask: Mask, ranks: Ranks) -> Engine:
    """axolotl-ringmaster's Ulysses around transformers' SDPA attention."""
    ringmaster = _module("ringmaster")
    _module("transformers")
    _needs_divisible_heads(case, ranks)
    _needs_even_shards(case, ranks, ranks.num_ranks)
    options: dict[str, Any] = {"is_causal": case.mask != "full"}
    packed = None
    if case.mask in ("causal_document", "full_document") or case.lengths is not None:
        _needs_dense_mask_that_fits(case, "packed documents")
        cuts = mask.segments()
        options["is_causal"] = case.mask != "full_document"
        packed = (torch.from_numpy(cuts).int().to(ranks.device), int((cuts[1:] - cuts[:-1]).max()))
    elif case.window is not None or case.mask == "sliding_window_causal":
        _needs_dense_mask_that_fits(case, "a window")
        options["sliding_window"] = (WINDOW if case.window is None else case.window) + 1
    else:
        _is_causal(case, "besides documents and causal windows, ringmaster")
    config = ringmaster.RingmasterConfig(size=ranks.num_ranks, backend=ringmaster.Backend.ULYSSES)
    runtime = ringmaster.setup(
        config, num_kv_heads=case.kv_heads, device_mesh=ranks.mesh, device_type=ranks.device.type, inner_attn="sdpa"
    )
    runtime.varlen = packed
    ulysses = _by_fastest(importlib.import_module("ringmaster.strategies.ulysses").make_ulysses_attention("sdpa"))
    module = torch.nn.Module()
    module.num_key_value_groups = case.heads // case.kv_heads  # type: ignore[assignment]
    module.is_causal = options["is_causal"]  # type: ignore[assignment]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ulysses(module, q, k, v, None, **options)[0].transpose(1, 2)

    return Engine(ranks.contiguous(case.tokens), True, call, {"layout": "contiguous"}, ringmaster.teardown)


def ringmaster_ring(case: Case, mask: Mask, ranks: Ranks) -> Engine:
    """axolotl-ringmaster's ring: its blocks are FlashAttention kernels that transformers fetches when it runs."""
    _module("ringmaster")
    raise Refused("its blocks need flash kernels fetched at run time; torch's own are forward only there")


def _needs_divisible_heads(case: Case, ranks: Ranks) -> None:
    if case.kv_heads % ranks.num_ranks:
        raise Refused(f"needs KV heads that divide by {ranks.num_ranks} ranks, not {case.kv_heads}")


def _needs_dense_mask_that_fits(case: Case, what: str) -> None:
    if case.tokens > MAX_DENSE_TOKENS:
        raise Refused(f"gives SDPA {what} as a dense mask, which at {case.tokens} tokens is {case.tokens**2 / 1e9:.0f} GB")


def _sdpa(case: Case, mask: Mask, ranks: Ranks, details: dict[str, Any]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """torch's SDPA over whole sequences [B, H, S, D]; masks that it has no flag for become dense.

    details: gets the kernel that SDPA took.
    """
    if case.mask in ("causal", "full"):
        options = {"is_causal": case.mask == "causal", "enable_gqa": case.heads != case.kv_heads}
        return _by_fastest(partial(F.scaled_dot_product_attention, **options), details=details, options=options)
    _needs_dense_mask_that_fits(case, "this mask")
    masked = partial(F.scaled_dot_product_attention, attn_mask=dense_mask(mask, ranks.device))
    group = case.heads // case.kv_heads
    # No fused kernel takes both a mask and grouped heads, and the one that is not fused needs S×S scores of every head.
    return _by_fastest(lambda q, k, v: masked(q, *(x.repeat_interleave(group, 1) for x in (k, v))), masked=True)


_FUSED = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]


def _by_fastest(
    attend: Callable[..., Any], *, masked: bool = False, details: dict[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:  # fmt: skip
    """SDPA with its kernels in the order of their speed on Hopper, whatever was preferred before. Without a dense mask only the
    fused ones are allowed: a cell where SDPA would fall to another is an error, and says nothing of the peer.

    details, options: where the kernel is noted that SDPA takes with these keywords.
    """
    order = [*_FUSED, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH] if masked else _FUSED

    def call(*args: Any, **keywords: Any) -> Any:
        with sdpa_kernel(order, set_priority=True):
            if details is not None and "sdpa" not in details and args[0].is_cuda:
                details["sdpa"] = SDPBackend(torch._fused_sdp_choice(*args, **(options or {}))).name
            return attend(*args, **keywords)

    return call


def dense_mask(mask: Mask, device: torch.device) -> Tensor:
    """Bool [S, S] on the device, True where a query sees a key."""
    allowed = torch.zeros(mask.num_queries, mask.num_keys, dtype=torch.bool, device=device)
    for q0, q1, k0, k1, lo, hi in mask.bands.tolist():
        distance = torch.arange(k0, k1, device=device)[None, :] - torch.arange(q0, q1, device=device)[:, None]
        allowed[q0:q1, k0:k1] |= (distance >= lo) & (distance <= hi)
    return allowed


PEERS: Mapping[str, Peer] = {
    "torch_ring": partial(torch_ring, rotate="allgather"),
    "torch_ring_alltoall": partial(torch_ring, rotate="alltoall"),
    "torch_flex": partial(torch_flex, balance="head_tail"),
    "torch_flex_ptrr": partial(torch_flex, balance="ptrr"),
    "deepspeed_ulysses": deepspeed_ulysses,
    "ringmaster_ulysses": ringmaster_ulysses,
    "ringmaster_ring": ringmaster_ring,
}
"""Name → what makes it ready for a case, or raises Refused."""
