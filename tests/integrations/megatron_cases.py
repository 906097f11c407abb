"""A tiny GPT of Megatron-core under every kind of parallelism, beside the same model on one rank; run by ranks of tests.

Importing this file imports no Megatron: the ranks do so.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

VOCAB, SEQ = 96, 64
DOCUMENTS = [3, 20, 1, 17, 6]
"""Real tokens; with 2P = 8 three of them are shorter than that."""


@dataclass(frozen=True)
class Case:
    """One model and how it is spread. layers: kinds for a hybrid, or None. changes: of the config."""

    name: str
    tp: int = 1
    pp: int = 1
    cp: int = 4
    packed: bool = False
    schedule: Any = "distattn:ring"
    layers: tuple[str, ...] | None = None
    rope: bool = True
    changes: dict[str, Any] = field(default_factory=dict)
    micro_batches: int = 1
    pingpong: bool = False


_FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
_PER_DOCUMENT = "distattn:ring,packed=document"

CASES = [
    Case("context 1", cp=1),
    Case("one KV head for two tensor ranks", tp=2, cp=2, changes={"num_query_groups": 1}),
    Case("two schedules by layer", schedule=["distattn:usp,head_ranks=2", "distattn:ring"]),
    Case("p2p", schedule="p2p"),
    Case("all_gather", schedule="all_gather", cp=2),
    Case("a2a", schedule="a2a"),
    Case("a2a+p2p", schedule="a2a+p2p", changes={"hierarchical_context_parallel_sizes": [2, 2]}),
    Case("double_ring", schedule="distattn:double_ring"),
    Case("disaggregated", schedule="distattn:disaggregated"),
    Case("auto", schedule="distattn:auto"),
    Case("packed", packed=True, schedule=_PER_DOCUMENT),
    Case("packed auto", packed=True, schedule="distattn:auto,packed=document"),
    Case("tensor 2 context 2 sinks", tp=2, cp=2, changes={"softmax_type": "learnable"}),
    Case(
        "tensor 2 context 2 packed sinks",
        tp=2,
        cp=2,
        packed=True,
        schedule=_PER_DOCUMENT,
        changes={"softmax_type": "learnable"},
    ),
    Case("pipeline 2 context 2 kept", pp=2, cp=2, micro_batches=3, changes={"recompute_granularity": "selective"}),
    Case("full checkpoint kept", packed=True, schedule=f"{_PER_DOCUMENT},remat=keep_out_lse", micro_batches=2, changes=_FULL),
    Case("full checkpoint repeated", changes=_FULL, cp=2),
    Case("windows and off-by-one", changes={"window_size": (9, 0), "window_attn_skip_freq": 2, "softmax_type": "off-by-one"}),
    Case("ping-pong", pingpong=True, schedule="distattn:disaggregated"),
    Case("ping-pong recomputed", pingpong=True, cp=2, changes=_FULL),
    Case("query-key layer scaling", changes={"apply_query_key_layer_scaling": True}),
    Case("gated_delta hybrid", layers=("gated_delta", "softmax"), rope=True),
    Case("gla and kda packed", tp=2, cp=2, packed=True, schedule=_PER_DOCUMENT, layers=("gla", "kda")),
    Case(
        "exchanges by layer",
        layers=("lightning", "simple_gla"),
        schedule=["distattn:linear,exchange=all_gather", "distattn:linear,exchange=all_scan"],
    ),
]


def cpu_shim() -> None:
    """What Megatron asks of CUDA, answered for the CPU."""
    import megatron.core.tensor_parallel.random as random

    real = torch.tensor
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *a, **k: self  # type: ignore[assignment]
    torch.cuda.synchronize = lambda *a, **k: None
    torch.tensor = lambda *a, pin_memory=None, **k: real(*a, **k)  # type: ignore[assignment]
    for name in ("zeros", "ones", "empty"):
        make = getattr(torch, name)
        setattr(
            torch, name, lambda *a, make=make, device=None, **k: make(*a, device="cpu" if device == "cuda" else device, **k)
        )
    random._get_cuda_rng_state = lambda *a, **k: torch.get_rng_state()
    random._set_cuda_rng_state = lambda *a, **k: None
    tracker: Any = random.get_cuda_rng_tracker()
    tracker.states_["model-parallel-rng"] = torch.get_rng_state()


def padded(lengths: list[int], multiple: int) -> list[int]:
    return [-(-n // multiple) * multiple for n in lengths]


def cumulative(lengths: list[int]) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int32), torch.as_tensor(lengths).cumsum(0).int()])


@dataclass
class Batch:
    """One global micro-batch: tokens, labels, weights [b, S] and, where packed, real and padded lengths."""

    tokens: Tensor
    labels: Tensor
    weights: Tensor
    positions: Tensor
    lengths: list[int] | None = None
    room: list[int] | None = None


def make_batch(case: Case, number: int) -> Batch:
    """The same tokens whatever the padding: packed documents are padded to what 4 context ranks need."""
    draw = torch.Generator().manual_seed(100 + number)
    if not case.packed:
        tokens = torch.randint(VOCAB, (2, SEQ), generator=draw)
        labels = torch.randint(VOCAB, (2, SEQ), generator=draw)
        return Batch(tokens, labels, torch.ones(2, SEQ), torch.arange(SEQ).expand(2, SEQ))
    room = padded(DOCUMENTS, 8)
    total = sum(room)
    tokens, labels = torch.randint(VOCAB, (1, total), generator=draw), torch.randint(VOCAB, (1, total), generator=draw)
    positions = torch.cat([torch.arange(n) for n in room])[None]
    real = torch.tensor(DOCUMENTS).repeat_interleave(torch.tensor(room))
    return Batch(tokens, labels, (positions < real).float(), positions, DOCUMENTS, room)


def build(case: Case, *, reference: bool) -> Any:
    """The stage of the model that this rank holds; the reference is whole, on this rank alone."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from distattn.integrations import megatron

    shape: dict[str, Any] = {
        "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 48,
        "add_bias_linear": False, "normalization": "RMSNorm", "attention_dropout": 0.0, "hidden_dropout": 0.0,
        "use_cpu_initialization": True, "pipeline_dtype": torch.float32, "calculate_per_token_loss": True,
        "bias_dropout_fusion": False, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "bias_activation_fusion": False,
    }  # fmt: skip
    changes = dict(case.changes)
    if reference:
        changes = {key: value for key, value in changes.items() if not key.startswith("recompute")}
    else:
        shape |= {"tensor_model_parallel_size": case.tp, "pipeline_model_parallel_size": case.pp}
        shape |= {"context_parallel_size": case.cp, "cp_comm_type": case.schedule, "batch_p2p_comm": False}
    config = TransformerConfig(**(shape | changes))
    schedule = "distattn:ring,packed=document" if reference else None
    if reference and case.layers is None and not case.packed:
        # Megatron's own attention; without Transformer Engine it knows no packed documents.
        spec: Any = get_gpt_layer_local_spec(normalization="RMSNorm")
    elif case.pingpong:
        spec = megatron.pingpong_layer_spec(implementation="local")
    elif case.layers is None:
        spec = megatron.layer_spec(schedule, implementation="local")
    else:
        spec = megatron.hybrid_spec(config, case.layers, schedule=schedule, implementation="local")
    torch.manual_seed(7)
    model = GPTModel(
        config,
        spec,
        vocab_size=VOCAB,
        max_sequence_length=256,
        position_embedding_type="rope" if case.rope else "none",
        pre_process=reference or parallel_state.is_pipeline_first_stage(),
        post_process=reference or parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
    )
    with torch.no_grad():
        for name, parameter in global_parameters(model):
            parameter.copy_(local_part(drawn(name, whole_shape(parameter)), parameter))
    return model


def global_parameters(model: Any) -> list[tuple[str, Tensor]]:
    """(name with the layer's global number, parameter)."""
    found = []
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(model.decoder.layers[int(parts[2])].layer_number - 1)
        found.append((".".join(parts), parameter))
    return found


def _tensor_ranks(parameter: Tensor) -> tuple[int, int]:
    from megatron.core import parallel_state

    if not getattr(parameter, "tensor_model_parallel", False):
        return 1, 0
    return parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()


def whole_shape(parameter: Tensor) -> list[int]:
    shape = list(parameter.shape)
    ranks, _ = _tensor_ranks(parameter)
    if ranks > 1:
        shape[parameter.partition_dim] *= ranks  # type: ignore[attr-defined]
    return shape


def local_part(whole: Tensor, parameter: Tensor) -> Tensor:
    ranks, rank = _tensor_ranks(parameter)
    return whole.chunk(ranks, parameter.partition_dim)[rank] if ranks > 1 else whole  # type: ignore[attr-defined]


def drawn(name: str, shape: list[int]) -> Tensor:
    """Values that depend on the name alone; norms near 1."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    return 1 + 0.1 * noise if len(shape) == 1 else noise * 0.15


def local_batch(batch: Batch, size: int, rank: int) -> tuple[dict[str, Tensor], Any]:
    """This context rank's rows, sliced by Megatron's rule, and its PackedSeqParams."""
    from distattn.integrations import megatron

    rows = {"tokens": batch.tokens, "labels": batch.labels, "weights": batch.weights, "position_ids": batch.positions}
    if batch.room is None:
        half = batch.tokens.shape[1] // (2 * size)
        chunks = [rank, 2 * size - 1 - rank]
        return {name: torch.cat([x[:, c * half : (c + 1) * half] for c in chunks], 1) for name, x in rows.items()}, None
    assert batch.lengths is not None
    cu, cu_padded = cumulative(batch.lengths), cumulative(batch.room)
    return megatron.slice_thd_batch(rows, cu_padded, num_ranks=size, rank=rank), megatron.packed_params(cu, cu_padded)


def step(case: Case, model: Any, number: int, *, reference: bool) -> float:
    """Forward and backward of one step's micro-batches; returns its loss: weighted token losses over their number."""
    from megatron.core import parallel_state

    batches = [make_batch(case, 10 * number + i) for i in range(case.micro_batches)]
    count = sum(float(batch.weights.sum()) for batch in batches)
    size, rank = (1, 0) if reference else (case.cp, parallel_state.get_context_parallel_rank())
    total = torch.zeros(())
    given = iter([local_batch(batch, size, rank) for batch in batches])

    def forward_step(data: Any, stage: Any) -> tuple[Tensor, Any]:
        rows, packed = next(data)
        losses = stage(rows["tokens"], rows["position_ids"], None, labels=rows["labels"], packed_seq_params=packed)

        def weigh(losses: Tensor) -> Any:
            loss = (losses * rows["weights"]).sum() / count
            total.add_(loss.detach())
            return loss, torch.ones((), dtype=torch.int), {}

        return losses, weigh

    if reference or case.pp == 1:
        for _ in batches:
            losses, weigh = forward_step(given, model)
            weigh(losses)[0].backward()
    else:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        sequence = batches[0].tokens.shape[1]
        get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=given, model=[model], num_microbatches=case.micro_batches,
            seq_length=sequence, micro_batch_size=batches[0].tokens.shape[0], forward_only=False,
        )  # fmt: skip
    if not reference:
        dist.all_reduce(total, group=parallel_state.get_context_parallel_group())
        dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
    return float(total)


Trained = tuple[list[float], dict[str, Tensor], dict[str, Tensor]]


def train(case: Case, model: Any, *, reference: bool) -> Trained:
    """(losses of three steps, gradients of the first, parameters after the last), by global name."""
    from megatron.core import parallel_state

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, first = [], {}
    for number in range(3):
        losses.append(step(case, model, number, reference=reference))
        for name, parameter in global_parameters(model):
            assert parameter.grad is not None, name
            if not reference:
                dist.all_reduce(parameter.grad, group=parallel_state.get_context_parallel_group())
            if number == 0:
                first[name] = parameter.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
    return losses, first, {name: parameter.detach().clone() for name, parameter in global_parameters(model)}


def compare_all(cases: list[Case]) -> dict[str, dict[str, float]]:
    """Largest differences of each case from one rank, by its name: of losses, gradients (relative) and parameters."""
    initialise(1, 1, 1)
    expected = {case.name: train(case, build(case, reference=True), reference=True) for case in cases}
    found = {}
    for sizes in dict.fromkeys((case.tp, case.pp, case.cp) for case in cases):
        initialise(*sizes)
        for case in cases:
            if (case.tp, case.pp, case.cp) == sizes:
                found[case.name] = _differences(case, expected[case.name])
    return found


def initialise(tp: int, pp: int, cp: int) -> None:
    """Megatron's groups for these sizes. Those before are given back: each of gloo's keeps threads."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        create_gloo_process_groups=False,
    )


def _differences(case: Case, expected: Trained) -> dict[str, float]:
    model = build(case, reference=False)
    losses, gradients, parameters = train(case, model, reference=False)
    errors = {"loss": max(abs(a - b) for a, b in zip(losses, expected[0], strict=True)), "gradient": 0.0, "parameter": 0.0}
    for name, parameter in global_parameters(model):
        whole = expected[1][name]
        gradient = (gradients[name] - local_part(whole, parameter)).abs().max() / whole.abs().max()
        difference = (parameters[name] - local_part(expected[2][name], parameter)).abs().max()
        errors["gradient"] = max(errors["gradient"], float(gradient))
        errors["parameter"] = max(errors["parameter"], float(difference))
    return errors
