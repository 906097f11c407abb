"""A GPT of Megatron-core with distattn, packed documents over two context ranks, on this machine's CPU.

    python examples/megatron_gpt.py [steps]

Each rank holds its zigzag share of every document. On GPUs start one process a device (torchrun), take NCCL, and leave out
``use_cpu_initialization``.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from distattn.testing import run_ranks

RANKS = 2


def packed_lines(rows: int, multiple: int) -> tuple[list[int], list[int], torch.Tensor]:
    """This file's lines as documents: real lengths, lengths padded to a multiple, and bytes [1, T]."""
    lengths, room, tokens = [], [], []
    for line in Path(__file__).read_bytes().splitlines():
        padded = -(-len(line) // multiple) * multiple
        if line and sum(room) + padded <= rows:
            lengths.append(len(line))
            room.append(padded)
            tokens += [*line, *[0] * (padded - len(line))]
    return lengths, room, torch.tensor([tokens])


def train(rank: int, world: int, steps: int) -> list[float]:
    """The loss of each step, alike on every rank."""
    warnings.simplefilter("ignore")  # Megatron warns that Apex and Transformer Engine are not installed
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from distattn.integrations.megatron import layer_spec, packed_params, slice_thd_batch

    parallel_state.initialize_model_parallel(context_parallel_size=world, create_gloo_process_groups=False)
    context = parallel_state.get_context_parallel_group()
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        context_parallel_size=world,
        cp_comm_type="distattn:ring,packed=document",
        calculate_per_token_loss=True,
        use_cpu_initialization=True,
    )
    torch.manual_seed(0)
    model = GPTModel(config, layer_spec(), 256, 512, position_embedding_type="learned_absolute")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    lengths, room, tokens = packed_lines(1024, 2 * world)
    cu, cu_padded = (torch.tensor([0, *x]).cumsum(0).int() for x in (lengths, room))
    positions = torch.cat([torch.arange(n) for n in room])[None]
    last = torch.tensor(lengths).repeat_interleave(torch.tensor(room)) - 1
    batch = {
        "tokens": tokens,
        "labels": tokens.roll(-1, 1),  # of each document's last byte, and of padding, none counts
        "loss_mask": (positions < last).float(),
        "position_ids": positions,
    }
    mine = slice_thd_batch(batch, cu_padded)
    count = batch["loss_mask"].sum()
    losses = []
    for _ in range(steps):
        token_losses = model(
            mine["tokens"], mine["position_ids"], None, labels=mine["labels"], packed_seq_params=packed_params(cu, cu_padded)
        )
        # The loss contract: sums over the ranks' own tokens, divided by the tokens of all; gradients are summed alike.
        loss = (token_losses * mine["loss_mask"]).sum() / count
        loss.backward()
        total = loss.detach().clone()
        for value in (total, *(parameter.grad for parameter in model.parameters())):
            dist.all_reduce(value, group=context)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total))
    return losses


if __name__ == "__main__":
    losses = run_ranks(train, RANKS, int(sys.argv[1]) if len(sys.argv) > 1 else 20, timeout_s=120)[0]
    print(f"loss over {len(losses)} steps on {RANKS} context ranks: {losses[0]:.3f} to {losses[-1]:.3f} nats a byte")
