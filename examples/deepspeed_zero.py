"""A model of your own under DeepSpeed's ZeRO, its sequences cut over ranks.

    torchrun --nproc-per-node 2 examples/deepspeed_zero.py

On a machine with GPUs, set DS_ACCELERATOR=cpu to run it on the CPU.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import distattn

VOCABULARY, WIDTH, HEADS, KV_HEADS = 64, 48, 6, 1
LENGTHS = [200, 30, 26]  # packed documents of one sequence


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * 8)
        self.o = nn.Linear(HEADS * 8, WIDTH)

    def forward(self, x: Tensor, plan: distattn.Plan) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (-1, 8)).split([HEADS, KV_HEADS, KV_HEADS], dim=2)
        return x + self.o(distattn.attention(q, k, v, plan).flatten(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(sum(LENGTHS), WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor, positions: Tensor, labels: Tensor, plan: distattn.Plan) -> Tensor:
        """Summed loss of this rank's tokens."""
        x = self.tokens(tokens) + self.places(positions)
        for layer in self.layers:
            x = layer(x, plan)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten(), reduction="sum")


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu")
    os.environ["DS_ACCELERATOR"] = device.type  # DeepSpeed chooses its device when it is imported
    from distattn.integrations import deepspeed

    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(0)
    model = Model().to(device)
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}
    engine = deepspeed.initialize(
        model, settings, context=dist.get_world_size(), optimizer=torch.optim.AdamW(model.parameters(), 1e-2)
    )
    plan = distattn.plan(
        distattn.Mask.documents(LENGTHS), heads=HEADS, kv_heads=KV_HEADS, head_dim=8, group=deepspeed.context_group(engine)
    )
    positions = torch.cat([torch.arange(n) for n in LENGTHS])  # from the start of each document
    for step in range(1, 6):
        tokens = torch.randint(VOCABULARY, (1, sum(LENGTHS) + 1), generator=torch.Generator().manual_seed(1))
        # Labels are looked up before sharding: the next token may be another rank's.
        whole = tokens[:, :-1], positions, tokens[:, 1:]
        local = [plan.shard(x, dim=-1).to(device) for x in whole]
        loss_sum = engine(*local, plan)
        # The loss is divided by the tokens of all ranks; DeepSpeed will divide gradients once more, by this number.
        engine.backward(loss_sum / sum(LENGTHS) * deepspeed.gradient_divisor(engine))
        engine.step()
        dist.all_reduce(total := loss_sum.detach().clone())
        if dist.get_rank() == 0:
            print(f"step {step}: loss {total.item() / sum(LENGTHS):.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
