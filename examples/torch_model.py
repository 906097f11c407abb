"""A plain torch model, whose scaled_dot_product_attention runs over ranks without a change to the model.

python examples/torch_model.py                                  one rank
torchrun --nproc-per-node 2 examples/torch_model.py             two, with the same losses
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import distattn
from distattn.integrations.torch_parallel import parallelize

VOCABULARY, WIDTH, HEADS = 64, 48, 6
LENGTHS = [200, 30, 27]  # packed documents of one sequence


class Attention(nn.Module):
    """As anyone writes it: nothing of distattn in here."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.o = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), Attention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(sum(LENGTHS), WIDTH)
        self.layers = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.head(self.layers(self.tokens(tokens) + self.places(positions)))


def main() -> None:
    group, rank = None, 0
    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group("gloo")
        group, rank = dist.group.WORLD, dist.get_rank()
    torch.manual_seed(0)  # the same weights on every rank
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    parallel = parallelize(model, r"layers\.\d+\.attention", group, heads=HEADS, head_dim=WIDTH // HEADS)
    mask = distattn.Mask.documents(LENGTHS)  # causal in each document, which the calls alone could not say
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    for step in range(1, 6):
        tokens = torch.randint(VOCABULARY, (1, sum(LENGTHS) + 1), generator=torch.Generator().manual_seed(1))
        whole = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "positions": positions}
        batch = parallel.shard_batch(whole, mask)
        with batch:
            logits = model(batch["tokens"], batch["positions"])
            loss_sum = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
            (loss_sum / sum(LENGTHS)).backward()  # by the tokens of all ranks
        parallel.sum_gradients()
        optimizer.step()
        optimizer.zero_grad()
        total = loss_sum.detach().clone()
        if group is not None:
            dist.all_reduce(total)
        if rank == 0:
            print(f"step {step}: loss {total.item() / sum(LENGTHS):.6f}", flush=True)
    if group is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
