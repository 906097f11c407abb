"""Tiny random models of transformers, and what they compute document by document with ``eager``: the reference."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import transformers
from torch import Tensor

IGNORED = -100
WINDOW = 5


def tiny(kind: str, **settings: Any) -> Any:
    """A model in fp32 with random weights: two layers, one of them with a window where the family has windows."""
    shape: dict[str, Any] = {
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,
    }
    mixed: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
    scale: dict[str, Any] = {"query_pre_attn_scalar": 8}
    config: Any
    if kind == "llama":
        config = transformers.LlamaConfig(**shape | settings)
    elif kind == "qwen3":
        config = transformers.Qwen3Config(**shape | settings)
    elif kind == "gemma3":
        config = transformers.Gemma3TextConfig(**shape | mixed | scale | settings)
    elif kind == "gemma2":
        config = transformers.Gemma2Config(**shape | mixed | scale | settings)
    else:
        rope = {"rope_type": "default", "rope_theta": 10_000.0}
        experts: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": rope}
        config = transformers.GptOssConfig(**shape | mixed | experts | settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(std=0.5)
                parameter.add_(1.0 if "norm" in name else 0.0)
    return model.eval()


def batch_of(case: str, *, rows: int = 2, length: int = 21) -> dict[str, Tensor]:
    """input_ids, labels and, by case, attention_mask or position_ids: plain, packed, left or right."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, 48, (rows, length), generator=generator)
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    if case == "packed":
        cuts = [(r + 1) * length // (rows + 2) for r in range(rows)]
        batch["position_ids"] = torch.stack([torch.cat([torch.arange(c), torch.arange(length - c)]) for c in cuts])
    if case in ("left", "right"):
        keep = torch.arange(length).expand(rows, -1) >= torch.arange(rows)[:, None] * 6
        keep = keep if case == "left" else keep.flip(1)
        batch["attention_mask"] = keep.long()
        batch["labels"] = tokens.masked_fill(~keep, IGNORED)
    return batch


def documents(batch: dict[str, Tensor]) -> list[tuple[int, Tensor]]:
    """(row, columns) of every document of a batch."""
    found = []
    tokens = batch["input_ids"]
    for row in range(len(tokens)):
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        if "attention_mask" in batch:
            columns = columns[batch["attention_mask"][row].bool()]
        if "position_ids" in batch:
            starts = (batch["position_ids"][row] == 0).nonzero().flatten().tolist()
            edges = [*starts, len(columns)]
            found += [(row, columns[a:b]) for a, b in itertools.pairwise(edges)]
        else:
            found.append((row, columns))
    return found


def reference(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(logits [B, S, V], 0 at padding; mean loss; gradients) of ``eager``, each document on its own."""
    model.set_attn_implementation("eager")
    model.zero_grad()
    tokens = batch["input_ids"]
    positions = batch.get("position_ids", torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens))
    logits = torch.zeros(*tokens.shape, model.config.vocab_size, device=tokens.device)
    total, count = torch.zeros((), device=tokens.device), 0
    for row, columns in documents(batch):
        out = model(input_ids=tokens[row, columns][None], position_ids=positions[row, columns][None], use_cache=False).logits[0]
        labels = batch["labels"][row, columns][1:]
        total = total + torch.nn.functional.cross_entropy(out[:-1], labels, ignore_index=IGNORED, reduction="sum")
        count += int((labels != IGNORED).sum())
        logits[row, columns] = out.detach().float()
    loss = total / count
    loss.backward()
    return logits, loss.detach(), gradients(model)


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of two sets of gradients, against the largest value of each."""
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max() / b[n].abs().max().clamp(min=1e-6)) for n in a)
