"""A Hugging Face Llama whose packed sequences are shared by all ranks; random weights, nothing is downloaded.

python examples/transformers_llama.py                               one rank
torchrun --nproc-per-node 2 examples/transformers_llama.py          the same losses on two
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import transformers
from torch.nn.parallel import DistributedDataParallel

from distattn.integrations import transformers as adapter

STEPS, TOKENS, VOCABULARY = 6, 192, 64


def packed_batch(step: int) -> dict[str, torch.Tensor]:
    """Three documents in one row, as a collator packs them; every document counts up from a random token."""
    generator = torch.Generator().manual_seed(step)
    lengths = [TOKENS // 2, TOKENS // 3, TOKENS - TOKENS // 2 - TOKENS // 3]
    positions = torch.cat([torch.arange(n) for n in lengths])
    starts = torch.randint(0, VOCABULARY, (len(lengths),), generator=generator)
    tokens = (torch.repeat_interleave(starts, torch.tensor(lengths)) + positions) % VOCABULARY
    return {"input_ids": tokens[None], "position_ids": positions[None], "labels": tokens[None].clone()}


def main() -> list[float]:
    """Train for a few steps; the loss of each."""
    group, world = None, int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:  # started by torchrun
        dist.init_process_group("gloo")
        group = dist.group.WORLD
    adapter.register()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=TOKENS,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="distattn")
    adapter.check_model(model, world)
    wrapped = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(STEPS):
        with adapter.shard(packed_batch(step), group=group) as part:  # every rank passes the whole batch
            loss = wrapped(**part.inputs).loss  # this rank's tokens, over the labels of all
        (loss * world).backward()  # DDP averages gradients, and the shares of the loss are to be summed
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(part.sum(loss)))
        if part.rank == 0:
            print(f"step {step + 1}  loss {losses[-1]:.4f}  {part.num_tokens} tokens on {part.num_ranks} ranks", flush=True)
    if world > 1:
        dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
