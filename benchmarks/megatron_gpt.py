"""What does the plug-in cost? Tokens/s of a GPT in Megatron-core with distattn as core attention, beside our own trainer and
beside Megatron-core with torch's ring context parallel, on the same devices in the same run.

All train a Llama-3.2-1B shape with a vocabulary of 32K on one long sequence, bf16 with fp32 master weights sharded over the
context ranks, and recompute each layer in the backward pass. ``distattn`` keeps attention's output and LSE
(remat=keep_out_lse) as our trainer does; torch's ring cannot, so it repeats attention.

    python benchmarks/megatron_gpt.py --context 2 --tokens 131072 --json benchmarks/results/megatron-1b-h100x2.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import traceback
import warnings
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

# This file is not called megatron.py: the folder of a script stands first on the path, before Megatron's own package.
from train_strategies import train, write_one_document

from distattn.bench.record import Record, environment
from distattn.testing import run_ranks

ENGINES = ("trainer", "distattn", "torch")
VOCAB = 32768


def config_of(shape: SimpleNamespace, engine: str) -> Any:
    """The model as Megatron's config; every layer is recomputed, as in our trainer."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=2048,
        num_attention_heads=32,
        num_query_groups=8,
        kv_channels=64,
        ffn_hidden_size=8192,
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_activation_fusion=True,
        add_bias_linear=False,
        normalization="RMSNorm",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        context_parallel_size=shape.context,
        cp_comm_type=shape.schedule if engine == "distattn" else None,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
        calculate_per_token_loss=True,
        cross_entropy_loss_fusion=True,
        gradient_accumulation_fusion=False,
        finalize_model_grads_func=finalize_model_grads,
    )


def spec_of(engine: str, shape: SimpleNamespace) -> Any:
    from distattn.integrations import megatron

    spec = megatron.layer_spec(implementation="local")
    return spec if engine == "distattn" else megatron.patch_spec(spec, torch_ring_attention(shape))


def torch_ring_attention(shape: SimpleNamespace) -> type:
    """torch's ring over cuDNN as Megatron's core attention: its layout is the same zigzag."""
    from megatron.core.transformer.module import MegatronModule

    from distattn.bench.context_cases import Case
    from distattn.bench.context_peers import Ranks, torch_ring
    from distattn.mask import Mask

    device = torch.device("cuda", torch.cuda.current_device())
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), device, dist.group.WORLD)
    engine = torch_ring(Case("causal", shape.tokens, 32, 8, 64), Mask.causal(shape.tokens), ranks, rotate="allgather")

    class TorchRing(MegatronModule):
        def __init__(self, config: Any, **unused: Any) -> None:
            super().__init__(config=config)

        def forward(self, query: Any, key: Any, value: Any, attention_mask: Any, **unused: Any) -> Any:
            out = engine.call(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
            return out.permute(2, 0, 1, 3).flatten(2)

    return TorchRing


def build(shape: SimpleNamespace, engine: str) -> tuple[Any, Any, Any]:
    """(config, model under Megatron's data parallelism, its sharded optimizer)."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    config = config_of(shape, engine)
    model = GPTModel(
        config,
        spec_of(engine, shape),
        vocab_size=VOCAB,
        max_sequence_length=shape.tokens,
        position_embedding_type="rope",
        rotary_base=500000,
        share_embeddings_and_output_weights=True,
    )
    wrapped = Float16Module(config, model.cuda())
    settings = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=False)
    parallel = DistributedDataParallel(config, settings, wrapped)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=3e-4, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True),
        [parallel],
        use_gloo_process_groups=False,
    )
    return config, parallel, optimizer


def train_megatron(rank: int, world: int, engine: str, shape: SimpleNamespace) -> dict[str, Any]:
    """One rank: a few steps over random tokens, timed. The same tokens for every engine."""
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(context_parallel_size=world, create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)
    _, model, optimizer = build(shape, engine)
    half = shape.tokens // (2 * world)
    rows = torch.cat([torch.arange(c * half, (c + 1) * half) for c in (rank, 2 * world - 1 - rank)]).cuda()

    def forward_step(data: Any, stage: Any) -> tuple[Any, Any]:
        tokens = next(data)
        losses = stage(tokens[:, rows], rows[None], None, labels=tokens[:, rows + 1])

        def reduce_loss(losses: Any) -> Any:
            total = losses.float().sum()
            return total, torch.tensor(losses.numel(), dtype=torch.int, device="cuda"), {"loss": total.detach()}

        return losses, reduce_loss

    seconds, losses = [], []
    for number in range(shape.steps):
        draw = torch.Generator().manual_seed(number)
        tokens = torch.randint(VOCAB, (1, shape.tokens + 1), generator=draw).cuda()
        dist.barrier()
        torch.cuda.synchronize()
        began = time.perf_counter()
        model.zero_grad_buffer()
        optimizer.zero_grad()
        found = get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=iter([tokens]), model=[model], num_microbatches=1,
            seq_length=shape.tokens, micro_batch_size=1, forward_only=False,
        )  # fmt: skip
        optimizer.step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        total = found[0]["loss"].clone()
        dist.all_reduce(total)
        losses.append(float(total) / shape.tokens)
    return {"step_seconds": seconds, "losses": losses, "peak_memory_bytes": torch.cuda.max_memory_allocated()}


def run_trainer(shape: SimpleNamespace, config: str) -> dict[str, Any]:
    """Our own trainer at the same shape and vocabulary, on text as bytes."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "document.txt"
        write_one_document(source, shape.tokens * (shape.steps + 4))
        overrides = [f"model.vocab_size={VOCAB}", f"model.num_layers={shape.layers}"]
        arguments = argparse.Namespace(
            config=config, seq_len=shape.tokens, steps=shape.steps, context=shape.context, overrides=overrides
        )
        strategy = shape.schedule.removeprefix("distattn:").split(",")[0]
        return train(strategy, arguments, Path(folder), source)


def measure(engine: str, shape: SimpleNamespace, config: str, timeout_s: float) -> dict[str, Any]:
    try:
        if engine == "trainer":
            found = run_trainer(shape, config)
        else:
            ranks = run_ranks(train_megatron, shape.context, engine, shape, backend="nccl", timeout_s=timeout_s)
            found = ranks[0] | {"peak_memory_bytes": max(rank["peak_memory_bytes"] for rank in ranks)}
    except Exception:
        return {"error": traceback.format_exc()[-3000:]}
    if "error" not in found:
        timed = found["step_seconds"][shape.warm_up :]
        found["tokens_per_second"] = shape.tokens / statistics.median(timed)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--context", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--schedule", default="distattn:ring,remat=keep_out_lse")
    parser.add_argument("--config", default="configs/llama3.2-1b.yaml", help="of our trainer")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one engine")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--commit", default="", help="commit to record where there is no git checkout")
    arguments = parser.parse_args()
    names = ("context", "tokens", "layers", "steps", "warm_up", "schedule")
    shape = SimpleNamespace(**{name: getattr(arguments, name) for name in names})
    where = environment(arguments.commit) | {"megatron-core": version("megatron-core")}
    record = Record(arguments.json, where, {"shape": vars(shape)})
    for engine in arguments.engines.split(","):
        found = measure(engine, shape, arguments.config, arguments.timeout)
        record.add(engine, found)
        print(
            engine, json.dumps({key: found.get(key) for key in ("tokens_per_second", "peak_memory_bytes", "error")}), flush=True
        )


if __name__ == "__main__":
    main()
