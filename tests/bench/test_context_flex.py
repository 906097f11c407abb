"""The benchmark's driver of torch's FlexAttention context parallel, forward and backward: gloo on the CPU with 2 ranks."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import flex_attention

from distattn.attention import attention
from distattn.bench import context_peers
from distattn.bench.context_cases import Case
from distattn.bench.context_peers import Ranks
from distattn.bench.context_ranks import NAMES, make_data, relative
from distattn.planning import plan
from distattn.testing import run_ranks

MASKS = ("causal", "full", "window256", "documents:prolong512k", "share_question", "prefix_lm_document", "causal_blockwise")


def test_results_and_gradients_are_those_of_one_device() -> None:
    """Grouped heads, both ways of balancing: what a cell of torch_flex times is the case's attention."""
    for errors in run_ranks(errors_of_flex, 2, timeout_s=120):
        assert len(errors) == 2 * len(MASKS)
        assert {key: found for key, found in errors.items() if not max(found.values()) < 1e-5} == {}


def test_the_block_mask_is_the_one_that_torch_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found a block of rows at a time, for lengths of whole blocks, as torch's context parallel asks for it."""
    monkeypatch.setattr(context_peers, "PAIRS_AT_ONCE", 3 * 128 * 1024)
    for name in MASKS:
        mask_mod = context_peers.flex_predicate(Case(name, 1024, 4, 2, 16), "cpu")
        made = context_peers.block_mask_by_rows(mask_mod, 1, 1, 640, 1024, device="cpu", BLOCK_SIZE=(128, 128))
        wanted = flex_attention.create_block_mask(mask_mod, 1, 1, 640, 1024, device="cpu", BLOCK_SIZE=(128, 128))
        assert made.seq_lengths == wanted.seq_lengths, name
        for lists in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "full_q_indices"):
            assert torch.equal(getattr(made, lists), getattr(wanted, lists)), (name, lists)


def errors_of_flex(rank: int, world: int) -> dict[str, dict[str, float]]:
    # torch refuses FlexAttention's backward on CPU where it compiles; as plain operators it is there.
    flex_attention._validate_device = lambda *_: None
    context_peers._flex_module = lambda device: context_peers._FlexModule()
    torch.compiler.set_stance("force_eager")
    warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
    group = dist.group.WORLD
    assert group is not None
    ranks = Ranks(rank, world, torch.device("cpu"), group)
    return {f"{name} {balance}": one_case(name, balance, ranks) for name in MASKS for balance in ("head_tail", "ptrr")}


def one_case(name: str, balance: str, ranks: Ranks) -> dict[str, float]:
    case = Case(name, 1024, 4, 2, 16)
    data = make_data(case, ranks.device, torch.float32)
    engine = context_peers.torch_flex(case, data.mask, ranks, balance=balance)
    local = [x.index_select(1, engine.positions).transpose(1, 2).contiguous() for x in data.inputs]
    found = [x.transpose(1, 2) for x in gradients(engine.call, *local)]
    engine.close()
    alone = plan(data.mask, heads=4, kv_heads=2, head_dim=16, kernel="reference")
    wanted = gradients(lambda q, k, v: attention(q, k, v, alone), *data.inputs)
    return {label: relative(x, y.index_select(1, engine.positions)) for label, x, y in zip(NAMES, found, wanted, strict=True)}


def gradients(call: Any, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, do)]
