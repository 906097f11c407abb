"""Everything that ``attn_implementation="distattn"`` refuses, with its reason: nothing becomes plain causal silently."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from distattn.errors import InputError, UnsupportedError
from distattn.integrations import transformers as adapter
from distattn.integrations import transformers_masks
from distattn.integrations.transformers import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from distattn.integrations.transformers_attention import Registration
from distattn.integrations.transformers_masks import check_transformers, masking_utils
from tests.integrations.transformers_models import batch_of, tiny


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    adapter.register()
    yield
    ALL_ATTENTION_FUNCTIONS._local_mapping.clear()
    AttentionInterface._global_mapping.pop("distattn", None)


def model_of(kind: str = "llama", **settings: Any) -> Any:
    model = tiny(kind, **settings)
    model.set_attn_implementation("distattn")
    return model


def call(model: Any, batch: dict[str, Any] | None = None, **arguments: Any) -> Any:
    tokens = (batch or batch_of("plain"))["input_ids"]
    return model(**{"input_ids": tokens, "use_cache": False} | arguments)


def sharded(**arguments: Any) -> Any:
    """A Llama on a sharded batch of one rank, called with something else beside."""
    with adapter.shard(batch_of("packed")) as part:
        return model_of()(**part.inputs | arguments)


def dropping() -> Any:
    return call(model_of(attention_dropout=0.1).train())


def under_causal_mask(**arguments: Any) -> Any:
    """A layer that says something else of itself than its mask, which is causal."""
    q = torch.randn(1, 2, 5, 8)
    mask = Registration().mask_function(batch_size=1, q_length=5, kv_length=5, mask_function=masking_utils.causal_mask_function)
    return Registration().attend(torch.nn.Identity(), q, q, q, mask, scaling=1.0, **arguments)


def without_mask() -> Any:
    q = torch.randn(1, 2, 5, 8)
    return Registration().attend(torch.nn.Identity(), q, q, q, None)


def wrapped() -> Any:
    """What DeepSpeed's UlyssesSPAttentionHF does: it replaces the key of this registry."""
    model, ours = model_of(), ALL_ATTENTION_FUNCTIONS["distattn"]
    ALL_ATTENTION_FUNCTIONS["distattn"] = lambda *args, **kwargs: ours(*args, **kwargs)
    return call(model)


def registered_after_deepspeed() -> Any:
    def uattn_wrapper() -> None: ...

    uattn_wrapper.__module__ = "deepspeed.runtime.sequence_parallel.ulysses_sp"
    ALL_ATTENTION_FUNCTIONS["sdpa"] = uattn_wrapper
    adapter.register()


def name_taken() -> Any:
    AttentionInterface.register("distattn", print)
    adapter.register()


def shard_outside_of_its_block() -> Any:
    """A shard's inputs, whose zigzag positions begin anew, without ``with``."""
    positions = torch.tensor([[0, 1, 2, 9, 10, 11]])
    return call(model_of(), position_ids=positions, input_ids=torch.ones(1, 6, dtype=torch.int64))


def recurrent_layers() -> Any:
    model = model_of()
    model.config.layer_types = ["linear_attention", "full_attention"]
    adapter.check_model(model, 2)


def router_loss() -> Any:
    adapter.check_model(model_of("gpt_oss", output_router_logits=True), 2)


def other_implementation() -> Any:
    adapter.check_model(tiny("llama"), 2)


def made_mask(registration: Registration | None = None, **arguments: Any) -> Any:
    """A causal mask of 5 tokens, asked for as transformers does."""
    usual = {"batch_size": 1, "q_length": 5, "kv_length": 5, "mask_function": masking_utils.causal_mask_function}
    return (registration or Registration()).mask_function(**usual | arguments)


def any_pairs(batch: Any, head: Any, query: Any, key: Any) -> Any:
    """A mask function that is not transformers' own."""
    return query >= key


def sharded_mask(registration: Registration | None = None, **arguments: Any) -> Any:
    with adapter.shard(batch_of("plain")):
        return made_mask(registration, **arguments)


def other_tokens() -> Any:
    with adapter.shard(batch_of("packed")):
        return model_of()(input_ids=torch.ones(1, 5, dtype=torch.int64), use_cache=False)


def keys_of_another_sequence() -> Any:
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 6, 8)
    return Registration().attend(torch.nn.Identity(), q, k, k, made_mask(), scaling=1.0)


EVALUATED = Registration(unknown_masks="evaluate")
PACKED = batch_of("packed")
ONES = torch.ones(2, 21, dtype=torch.int64)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "4-D mask": (lambda: call(model_of(), attention_mask=torch.zeros(2, 1, 21, 21)), "a mask over pairs of tokens, a Tensor"),
    "no mask": (without_mask, "a layer without a mask"),
    "dropout": (dropping, r"dropout of 0\.1.*attention_dropout = 0"),
    "mask function": (lambda: call(model_of("gemma3", use_bidirectional_attention=True)), "a mask function that is not"),
    "mask function, sharded": (
        lambda: _sharded_with(model_of("gemma3", use_bidirectional_attention=True)), "a mask function that is not.*own"
    ),
    "mask function, evaluated on a shard": (
        lambda: sharded_mask(EVALUATED, mask_function=any_pairs), "a mask function that is not.*tensors that hold a shard"
    ),
    "mask function, too many pairs": (
        lambda: made_mask(EVALUATED, mask_function=any_pairs, q_length=100_000, kv_length=100_000), "100000x100000 pairs"
    ),
    "unknown call of mask functions": (lambda: made_mask(q_length=None), "this version of transformers.*5.17 or newer"),
    "padding over pairs": (lambda: made_mask(attention_mask=torch.ones(1, 1, 5, 5)), r"a Tensor of shape \[1, 1, 5, 5\]"),
    "a cache under a shard": (lambda: sharded_mask(q_offset=3), "a KV cache on a sharded batch"),
    "other tokens than the shard's": (other_tokens, r"called with \[1, 5\] tokens inside `with batch:`"),
    "keys of another sequence": (keys_of_another_sequence, "its mask is for 1 rows of 5 queries and 5 keys"),
    "no tokens": (lambda: adapter.shard({"labels": ONES}), "input_ids must be a tensor"),
    "attention weights": (lambda: call(model_of(), output_attentions=True), "output_attentions"),
    "bias": (lambda: call(model_of(), attention_bias=torch.zeros(1)), "the argument attention_bias.*ignored"),
    "score_mod": (lambda: call(model_of(), score_mod=max), "the argument score_mod"),
    "unknown keyword": (lambda: call(model_of(), num_splits=2), "the argument num_splits.*ignored without a word"),
    "flash attention's lengths": (
        lambda: call(model_of(), cu_seq_lens_q=torch.tensor([0, 21])), "cu_seq_lens_q.*return_flash_attn_kwargs=False"
    ),
    "is_causal": (lambda: under_causal_mask(is_causal=False), "is_causal=False for a mask that is causal"),
    "window": (lambda: under_causal_mask(sliding_window=3), "a window of 3 tokens whose mask was made without one"),
    "packed beside a mask": (
        lambda: call(model_of(), PACKED, position_ids=PACKED["position_ids"], attention_mask=ONES),
        "documents the model does not tell",
    ),
    "packed with a cache": (
        lambda: call(model_of(), PACKED, position_ids=PACKED["position_ids"], use_cache=True),
        "documents the model does not tell",
    ),
    "packed, and the model never looks": (
        lambda: call(model_of("gpt_oss"), PACKED, position_ids=PACKED["position_ids"]), "some models never do"
    ),
    "a shard alone": (shard_outside_of_its_block, "a document that begins at position 9"),
    "padding beside a shard": (lambda: sharded(attention_mask=torch.ones(1, 42)), "an attention_mask beside a sharded batch"),
    "other positions": (lambda: sharded(position_ids=torch.arange(42)[None]), "position_ids of its own"),
    "cache on a shard": (lambda: sharded(use_cache=True), "use_cache=True on a sharded batch"),
    "recurrent layers": (recurrent_layers, "linear_attention layers, whose state would begin anew"),
    "router loss": (router_loss, "a loss that balances experts"),
    "another implementation": (other_implementation, 'attn_implementation="eager"'),
    "wrapped by DeepSpeed": (wrapped, "a wrapper around it"),
    "DeepSpeed before us": (registered_after_deepspeed, "replaced by DeepSpeed's sequence parallelism"),
    "name taken": (name_taken, "taken by builtins"),
    "kernel": (lambda: adapter.register(kernel="fast"), "kernel='fast' is unknown"),
    "option": (lambda: adapter.register(unknown_masks="guess"), "unknown_masks='guess'"),
    "too short": (lambda: adapter.shard({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}), "padding alone"),
    "other inputs": (lambda: adapter.shard(batch_of("plain") | {"token_type_ids": ONES}), "a batch that holds token_type_ids"),
    "pairs": (lambda: adapter.shard(batch_of("plain") | {"attention_mask": torch.ones(2, 1, 21, 21)}), "a mask over pairs"),
    "document numbers": (lambda: adapter.shard(batch_of("plain") | {"attention_mask": 2 * ONES}), "ones and zeros only"),
    "holes": (
        lambda: adapter.shard(batch_of("plain") | {"attention_mask": torch.arange(21).ne(4).long().expand(2, -1)}),
        "padding between the tokens of row 0",
    ),
    "shape": (lambda: adapter.shard(batch_of("plain") | {"labels": ONES[:, 1:]}), r"labels must be a tensor \[2, 21\]"),
}  # fmt: skip


def _sharded_with(model: Any) -> Any:
    with adapter.shard(batch_of("plain")) as part:
        return model(**part.inputs)


@pytest.mark.parametrize(("refused", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(refused: Callable[[], Any], message: str) -> None:
    with pytest.raises((UnsupportedError, InputError), match=message):
        refused()


def test_torch_context_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside torch's context_parallel(...), which replaces this function."""

    def inner_fn() -> None: ...

    inner_fn.__module__ = "torch.distributed.tensor.experimental._context_parallel._attention"
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", inner_fn)
    with pytest.raises(UnsupportedError, match="context_parallel"):
        call(model_of())


def test_mask_functions_that_mean_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transformers whose windows hold another number of keys is noticed when distattn registers."""
    transformers_masks._codes.cache_clear()
    monkeypatch.setattr(masking_utils, "sliding_window_overlay", lambda window: lambda b, h, q, k: k >= q - window)
    with pytest.raises(UnsupportedError, match="window mask function allows other pairs"):
        check_transformers()
    transformers_masks._codes.cache_clear()


def test_older_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """5.17 does not remap the positions of packed rows: its masks are taken apart all the same, chunks by index."""
    transformers_masks._codes.cache_clear()
    monkeypatch.delattr(masking_utils, "remap_positions_for_packed_sequence")
    check_transformers()
    packed = masking_utils.packed_sequence_mask_function(torch.tensor([[0, 0, 0, 1, 1, 1, 1]]))
    function = masking_utils.and_masks(masking_utils.chunked_causal_mask_function(2, torch.zeros(1, dtype=torch.int64)), packed)
    found = Registration().mask_function(batch_size=1, q_length=7, kv_length=7, mask_function=function)
    i = torch.arange(7)
    assert np.array_equal(found.mask.dense(), function(0, 0, i[:, None], i[None, :]).numpy())
    transformers_masks._codes.cache_clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accelerator": SimpleNamespace(parallelism_config=SimpleNamespace(cp_size=2))}, "sharded twice"),
        ({"accelerator": SimpleNamespace(parallelism_config=SimpleNamespace(sp_size=2))}, "sharded twice"),
        ({"args": SimpleNamespace(n_gpu=2, world_size=1)}, "one process a GPU, by torchrun"),
        ({"args": SimpleNamespace(n_gpu=1, world_size=2)}, "of which Accelerate knows 1 and TrainingArguments 2"),
        ({"is_deepspeed_enabled": True}, "DDP or FSDP"),
        ({"args": SimpleNamespace(n_gpu=1, world_size=1, label_smoothing_factor=0.1)}, "set it to 0"),
        ({"compute_loss_func": print}, "a shard's labels"),
        ({"model": SimpleNamespace(loss_type="ForMaskedLM")}, "use a causal model"),
        ({}, None),
    ],
)
def test_trainer(change: dict[str, Any], message: str | None) -> None:
    from distattn.integrations.transformers_trainer import _why_not

    usual: dict[str, Any] = {
        "args": SimpleNamespace(n_gpu=1, world_size=1, label_smoothing_factor=0.0),
        "accelerator": SimpleNamespace(parallelism_config=None, num_processes=1),
        "model": SimpleNamespace(loss_type="ForCausalLM"),
        "is_deepspeed_enabled": False,
        "compute_loss_func": None,
    }
    found: Any = _why_not(SimpleNamespace(**usual | change))  # pyright: ignore[reportArgumentType]
    assert found is None if message is None else message in " ".join(found)
