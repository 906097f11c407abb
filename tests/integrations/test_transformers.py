"""One and several ranks (gloo): Hugging Face models with ``attn_implementation="distattn"`` compute what ``eager`` does."""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from distattn.errors import AgreementError, TransportError, UnsupportedError
from distattn.integrations import transformers as adapter
from distattn.integrations.transformers_masks import masking_utils
from distattn.testing import run_ranks
from tests.integrations.transformers_models import IGNORED, batch_of, gradients, reference, tiny, worst

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("llama", "qwen3", "gemma3", "gpt_oss")
CASES = ("plain", "packed", "left", "right")
TOLERANCE = 2e-5
"""fp32: sums in another order."""


@pytest.fixture(autouse=True)
def _registered() -> None:
    adapter.register()


PLAIN_CALLS = [(kind, case) for kind in (*KINDS, "gemma2") for case in CASES]
PLAIN_CALLS.remove(("gpt_oss", "packed"))  # transformers never tells its documents apart: see test_refusals


@pytest.mark.parametrize(("kind", "case"), PLAIN_CALLS)
def test_one_rank(kind: str, case: str) -> None:
    """The model is called as any other; soft-cap (Gemma 2), sinks (gpt-oss) and windows included."""
    model, batch = tiny(kind), batch_of(case)
    logits, loss, expected = reference(model, batch)
    labels = batch["labels"].clone()
    first = batch["position_ids"] == 0 if "position_ids" in batch else torch.zeros_like(labels, dtype=torch.bool)
    if case == "left":  # transformers has the last padded token predict the first real one
        first = batch["attention_mask"].diff(dim=1, prepend=torch.zeros(2, 1, dtype=torch.int64)) == 1
    labels[first] = IGNORED
    model.set_attn_implementation("distattn")
    model.zero_grad()
    out = model(**batch | {"labels": labels}, use_cache=False)
    out.loss.backward()
    real = batch.get("attention_mask", torch.ones_like(labels)).bool()
    torch.testing.assert_close(out.logits[real], logits[real], rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(out.loss, loss, rtol=TOLERANCE, atol=TOLERANCE)
    assert worst(gradients(model), expected) < 50 * TOLERANCE


def _sharded(kind: str, case: str, group: dist.ProcessGroup | None, **options: Any) -> None:
    """Logits, loss and summed gradients of a sharded batch are those of the documents one by one."""
    model, batch = tiny(kind), batch_of(case)
    logits, loss, expected = reference(model, batch)
    model.set_attn_implementation("distattn")
    if options.pop("checkpointing", False):
        model.train()
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.zero_grad()
    with adapter.shard(batch, group=group, **options) as part:
        out = model(**part.inputs)
    out.loss.backward()  # outside of the block: recomputation needs the layers' own masks
    torch.testing.assert_close(part.sum(out.loss), loss, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(part.gather(out.logits), logits, rtol=10 * TOLERANCE, atol=10 * TOLERANCE)
    found = gradients(model)
    for name, gradient in found.items():
        found[name] = part.sum(gradient)
    assert worst(found, expected) < 50 * TOLERANCE


def _sharded_cases(rank: int, world: int, folder: str) -> None:
    adapter.register()
    pair, three, apart = dist.new_group([0, 1]), dist.new_group([0, 1, 2]), dist.new_group([0, 1, 2])
    if rank < 3:
        assert isinstance(three, dist.ProcessGroup)
        for kind in KINDS:
            for case in CASES:
                _sharded(kind, case, three)
        assert isinstance(apart, dist.ProcessGroup)
        _different_batches(rank, apart)
    if rank < 2:
        assert isinstance(pair, dist.ProcessGroup)
        for kind in KINDS:
            _sharded(kind, "packed", pair, checkpointing=kind == "llama")
            _sharded(kind, "left", pair, strategy="ulysses")
    _fsdp()
    _trainer(rank, folder)


def _fsdp() -> None:
    """FSDP2 over the context ranks themselves; it averages gradients. A layer's mask passes through its hooks as it is."""
    model, batch = tiny("gemma3"), batch_of("packed")
    _, loss, expected = reference(model, batch)
    model.set_attn_implementation("distattn")
    model.zero_grad()
    for unit in (*model.model.layers, model):
        fully_shard(unit, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    with adapter.shard(batch, group=dist.group.WORLD) as part:
        share = model(**part.inputs).loss
    (share * dist.get_world_size()).backward()
    torch.testing.assert_close(part.sum(share), loss, rtol=TOLERANCE, atol=TOLERANCE)
    assert worst({name: p.grad.full_tensor() for name, p in model.named_parameters()}, expected) < 50 * TOLERANCE


def _different_batches(rank: int, group: dist.ProcessGroup | None) -> None:
    """Ranks of a context group that read different samples hear of it."""
    batch, model = batch_of("plain"), tiny("llama")
    model.set_attn_implementation("distattn")
    batch["input_ids"][0, 0] = 3 + min(rank, 1)
    try:
        with adapter.shard(batch, group=group) as part:
            model(**part.inputs)
    except (AgreementError, TransportError) as error:
        assert "planned different things" in str(error)  # noqa: PT017
    else:
        raise AssertionError("different batches were accepted")


def _trainer(rank: int, folder: str) -> None:
    """Two data ranks × two context ranks: one step of SGD over four packed samples, and the evaluation of them."""
    import transformers

    from distattn.integrations.transformers_trainer import ContextParallelTrainer

    # As torchrun sets them; the group exists already.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    model, batch = tiny("qwen3"), batch_of("packed", rows=4)
    _, loss, expected = reference(model, batch)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.set_attn_implementation("distattn")
    samples = [{key: value[i] for key, value in batch.items()} for i in range(4)]
    arguments = transformers.TrainingArguments(
        output_dir=folder, max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=2, learning_rate=0.1,
        lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0, use_cpu=True, report_to=[], save_strategy="no",
        logging_steps=1, per_device_eval_batch_size=2, prediction_loss_only=True, disable_tqdm=True, ddp_backend="gloo",
        dataloader_pin_memory=False,
    )  # fmt: skip

    def trainer_of(model: Any) -> ContextParallelTrainer:
        return ContextParallelTrainer(
            model=model, args=arguments, train_dataset=samples, eval_dataset=samples, data_collator=_stack, context_ranks=2
        )

    trainer = trainer_of(model)
    trainer.train()
    logged = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert logged == [pytest.approx(float(loss), rel=1e-4)]
    moved = {name: (before[name] - parameter.detach()) / 0.1 for name, parameter in model.named_parameters()}
    assert worst(moved, expected) < 1e-3
    again = tiny("qwen3")
    again.set_attn_implementation("distattn")
    trainer = trainer_of(again)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(loss), rel=1e-4)
    with pytest.raises(UnsupportedError, match="gradients are not summed"):
        trainer.train()


def _stack(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def test_ranks(tmp_path: Path) -> None:
    """2 and 3 ranks: every model, packed and padded, under ring and Ulysses, with recomputation; Trainer on 2 × 2."""
    run_ranks(_sharded_cases, 4, str(tmp_path), timeout_s=240)


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_batch_on_one_rank(kind: str) -> None:
    """Without torch.distributed; packed gpt-oss is right here."""
    assert not dist.is_initialized()
    _sharded(kind, "packed", None)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_generate(kind: str) -> None:
    """Prefill and steps over a KV cache, with padding on the left, sliding caches too: the tokens that eager gives."""
    model, batch = tiny(kind), batch_of("left")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    found = []
    for implementation in ("eager", "distattn"):
        model.set_attn_implementation(implementation)
        found.append(model.generate(**inputs, max_new_tokens=6, do_sample=False))
    assert torch.equal(*found)


def test_chunks() -> None:
    """Chunked attention (Llama 4's), packed and padded, as transformers itself evaluates it."""
    config = tiny("llama").config
    config.attention_chunk_size = 4
    for case in CASES:
        batch = batch_of(case, length=19)
        config._attn_implementation = "distattn"
        arguments = {
            "config": config, "inputs_embeds": torch.zeros(2, 19, 1), "attention_mask": batch.get("attention_mask"),
            "cache": None, "position_ids": batch.get("position_ids"),
        }  # fmt: skip
        found: Any = masking_utils.create_chunked_causal_mask(**arguments)
        config._attn_implementation = "eager"
        dense = masking_utils.create_chunked_causal_mask(**arguments)
        assert dense is not None
        allowed = (dense == 0).expand(2, 1, 19, 19)[:, 0].numpy()
        ours = found.mask.dense()
        if found.flattened:
            ours = np.stack([ours[:19, :19], ours[19:, 19:]])
        assert np.array_equal(np.broadcast_to(ours, allowed.shape), allowed), case


def test_unknown_mask_is_evaluated_on_demand() -> None:
    """Gemma 3's bidirectional mode joins functions of its own: refused, or evaluated for every pair."""
    model, batch = tiny("gemma3", use_bidirectional_attention=True), batch_of("right")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    expected = model(**inputs, use_cache=False).logits
    model.set_attn_implementation("distattn")
    with pytest.raises(UnsupportedError, match=r'not transformers. own.*unknown_masks="evaluate"'):
        model(**inputs, use_cache=False)
    adapter.register(unknown_masks="evaluate")
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs, use_cache=False).logits[real], expected[real], rtol=TOLERANCE, atol=TOLERANCE)


def test_bidirectional_call() -> None:
    """``is_causal=False`` reaches the mask through transformers, and is honoured."""
    model, batch = tiny("llama"), batch_of("right")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    expected = model(**inputs, use_cache=False, is_causal=False).logits
    assert not torch.allclose(expected, model(**inputs, use_cache=False).logits)
    model.set_attn_implementation("distattn")
    real = batch["attention_mask"].bool()
    found = model(**inputs, use_cache=False, is_causal=False).logits
    torch.testing.assert_close(found[real], expected[real], rtol=TOLERANCE, atol=TOLERANCE)


def test_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """examples/transformers_llama.py learns, on one rank."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    example = runpy.run_path(str(ROOT / "examples" / "transformers_llama.py"))
    losses = example["main"]()
    assert losses[-1] < losses[0] - 0.3
    assert "192 tokens on 1 ranks" in capsys.readouterr().out
