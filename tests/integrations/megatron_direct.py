"""Calls of ``CoreAttention`` itself, without a model: against dense attention, and everything that it refuses. For ranks."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.integrations.megatron_cases import cumulative

HEADS, GROUPS, DIM = 4, 2, 8


def config(**changes: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    shape: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": HEADS, "num_query_groups": GROUPS}
    shape |= {"attention_dropout": 0.0, "hidden_dropout": 0.0, "use_cpu_initialization": True}
    return TransformerConfig(**(shape | changes))


def core(schedule: str | None = "distattn:ring", *, mask: str = "causal", kind: str = "self", **changes: Any) -> Any:
    from megatron.core.transformer.enums import AttnMaskType

    from distattn.integrations.megatron import CoreAttention

    given = config(context_parallel_size=dist.get_world_size(), **changes)
    return CoreAttention(given, 1, AttnMaskType[mask], kind, cp_comm_type=schedule)


def whole(rows: int, width: int = DIM, batch: int = 1) -> list[Tensor]:
    """Global q, k, v [s, b, heads, d]."""
    draw = torch.Generator().manual_seed(3)
    sizes = ((HEADS, DIM), (GROUPS, DIM), (GROUPS, width))
    return [torch.randn(rows, batch, *size, generator=draw, dtype=torch.float64) for size in sizes]


def dense(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """[s, b, heads, width] in fp64; rows that see nothing give 0."""
    k, v = (x.repeat_interleave(HEADS // GROUPS, 2) for x in (k, v))
    scores = torch.einsum("ibhd,jbhd->bhij", q, k) * DIM**-0.5
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhij,jbhd->ibhd", weights, v)


def causal(rows: int) -> Tensor:
    return torch.ones(rows, rows, dtype=torch.bool).tril()


def zigzag(rows: int, size: int, rank: int) -> Tensor:
    chunks = torch.arange(rows).chunk(2 * size)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


def error(attention: Any, tensors: list[Tensor], mine: Tensor, allowed: Tensor, packed: Any = None) -> float:
    """Largest difference of output and gradients from dense attention over all rows; mine: this rank's rows."""
    thd = packed is not None and packed.qkv_format == "thd"
    local = [x[mine].clone().requires_grad_() for x in tensors]
    given = [x.squeeze(1) if thd else x for x in local]
    out = attention(*given, None, packed_seq_params=packed)
    reference = [x.clone().requires_grad_() for x in tensors]
    expected = dense(reference[0], reference[1], reference[2], allowed)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    (expected * weight).sum().backward()
    (out.reshape(expected[mine].shape) * weight[mine]).sum().backward()
    pairs = [(out.reshape(expected[mine].shape), expected[mine])]
    pairs += [
        (a.grad, b.grad[mine]) for a, b in zip(local, reference, strict=True) if a.grad is not None and b.grad is not None
    ]
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def documents(lengths: list[int], room: list[int]) -> Tensor:
    """Which rows of the padded stream see which: real tokens of their own document, up to themselves."""
    number = torch.arange(len(room)).repeat_interleave(torch.tensor(room))
    position = torch.cat([torch.arange(n) for n in room])
    real = position < torch.tensor(lengths)[number]
    return (number[:, None] == number[None]) & causal(sum(room)) & real[:, None] & real[None]


def params(**values: Any) -> Any:
    names = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded", "cp_group", "local_cp_size")
    return SimpleNamespace(**(dict.fromkeys(names) | {"qkv_format": "thd"} | values))


def thd(lengths: list[int], room: list[int] | None = None, **values: Any) -> Any:
    cu = cumulative(lengths)
    padded = None if room is None else cumulative(room)
    return params(
        cu_seqlens_q=cu, cu_seqlens_kv=cu, cu_seqlens_q_padded=padded, cu_seqlens_kv_padded=padded, **values
    )  # fmt: skip


def exact(rank: int, world: int) -> dict[str, float]:
    """Errors against dense attention, by what is special about the call."""
    from distattn.integrations.megatron import thd_indices

    pairs = [dist.new_group([2 * i, 2 * i + 1]) for i in range(world // 2)]
    mine = zigzag(48, world, rank)
    wide, full = whole(48, width=6, batch=2), torch.ones(48, 48, dtype=torch.bool)
    found = {
        "other value width, batch 2": error(core(), wide, mine, causal(48)),
        "no mask": error(core(mask="no_mask"), wide, mine, full),
        "window open on the left": error(core(window_size=(-1, 0)), wide, mine, causal(48)),
    }
    window = causal(48) & ~causal(48).tril(-6)
    found["window"] = error(core(window_size=(5, 0)), wide, mine, window)
    group = pairs[rank // 2]
    dynamic = params(qkv_format="sbhd", cp_group=group, local_cp_size=2)
    attention = core()
    found["a group of two ranks"] = error(attention, whole(24), zigzag(24, 2, rank % 2), causal(24), dynamic)
    alone = params(qkv_format="sbhd", local_cp_size=1)
    found["alone for one call"] = error(attention, whole(5), torch.arange(5), causal(5), alone)
    found["all ranks again"] = error(attention, whole(48), mine, causal(48))
    lengths, room = [3, 9, 0, 16], [8, 16, 8, 16]
    rows = thd_indices(cumulative(room), world, rank)
    per_token = core("distattn:ring,packed=document", calculate_per_token_loss=True)
    found["padded documents"] = error(per_token, whole(48), rows, documents(lengths, room), thd(lengths, room))
    uneven = [5, 1, 30, 12]
    by_sequence = core("distattn:all_gather,packed=sequence")
    found["documents in one zigzag"] = error(by_sequence, whole(48), mine, documents(uneven, uneven), thd(uneven))
    return found


def refused(rank: int, world: int) -> tuple[dict[str, str], set[tuple[str, int]]]:
    """The message of each refusal on this rank (what was not refused says so), and the (file, line) that each came from."""
    from distattn.errors import DistattnError

    messages, places = {}, set()
    for name, make in _refusals(rank, world).items():
        try:
            make()
            messages[name] = "was not refused"
        except DistattnError as error:
            messages[name] = f"{type(error).__name__}: {error}"
            last = traceback.extract_tb(error.__traceback__)[-1]
            assert last.lineno is not None
            places.add((Path(last.filename).name, last.lineno))
    return messages, places


def _call(attention: Any, rows: int = 8, keys: int | None = None, **arguments: Any) -> Callable[[], Any]:
    q, k, v = whole(rows)
    keys = rows if keys is None else keys
    if arguments.get("packed_seq_params") is not None and arguments["packed_seq_params"].qkv_format == "thd":
        q, k, v = (x.squeeze(1) for x in (q, k, v))
    mask = arguments.pop("attention_mask", None)
    return lambda: attention(q, k[:keys], v[:keys], mask, **arguments)


def _refusals(rank: int, world: int) -> dict[str, Callable[[], Any]]:
    return _at_construction() | _in_calls(rank, world) | _elsewhere(world)


def _at_construction() -> dict[str, Callable[[], Any]]:
    return {
        "dropout": lambda: core(attention_dropout=0.1),
        "cross attention": lambda: core(kind="cross"),
        "arbitrary mask": lambda: core(mask="arbitrary"),
        "unknown strategy": lambda: core("distattn:spiral"),
        "unknown word": lambda: core("ring"),
        "unknown option": lambda: core("distattn:usp,heads=2"),
        "unknown setting": lambda: core("distattn:ring,remat=maybe"),
        "a2a+p2p without sizes": lambda: core("a2a+p2p"),
        "linear schedule of a softmax layer": lambda: core("distattn:linear"),
        "qk_clip": lambda: core(qk_clip=True),
        "largest logit": lambda: core(log_max_attention_logit=True),
        "fp8 scores": lambda: core(fp8_dot_product_attention=True),
        "fp8 attention": lambda: _with(fp8_multi_head_attention=True),
        "batch invariant": lambda: _with(batch_invariant_mode=True),
        "setting of a linear layer": lambda: core("distattn:linear,head_ranks=2"),
        "kept under fp8": lambda: _with(fp8="hybrid", schedule="distattn:ring,remat=keep_out_lse"),
        "cuda graph": lambda: _with(cuda_graph_impl="local"),
        "dynamic groups, mean by rank": lambda: _with(hybrid_context_parallel=True),
        "dynamic groups, pipeline": lambda: _with(hybrid_context_parallel=True, pipeline_model_parallel_size=2),
        "dynamic groups, mla": lambda: _with(hybrid_context_parallel=True, multi_latent_attention=True),
    }


def _in_calls(rank: int, world: int) -> dict[str, Callable[[], Any]]:
    from megatron.core.transformer.enums import AttnMaskType

    own = dist.new_group([rank], use_local_synchronization=True)
    attention = core("distattn:ring,packed=document")
    twice = thd([8 * world])
    return {
        "arbitrary mask of a call": _call(attention, attn_mask_type=AttnMaskType.arbitrary),
        "inside torch's context_parallel": _within(_call(attention), context_parallel_of_torch),
        "packed rows of a release that cuts in two ways": _within(
            _call(core("distattn:ring"), packed_seq_params=twice), release_19
        ),
        "documents that do not begin": _call(attention, packed_seq_params=_params([4, 8 * world])),
        "documents that go back": _call(attention, packed_seq_params=_params([0, 8, 4, 8 * world])),
        "dense mask": _call(attention, attention_mask=torch.ones(1, 1, 8, 8, dtype=torch.bool)),
        "bias": _call(attention, attention_bias=torch.zeros(1)),
        "unknown argument": _call(attention, num_splits=4),
        "kv cache": _call(attention, keys=6),
        "padding mask": _call(attention, attn_mask_type=AttnMaskType.padding),
        "size without group": _call(attention, packed_seq_params=params(qkv_format="sbhd", local_cp_size=2)),
        "size and group differ": _call(attention, packed_seq_params=params(qkv_format="sbhd", local_cp_size=2, cp_group=own)),
        "packed with its own group": _call(attention, packed_seq_params=thd([8], cp_group=own)),
        "sequence not cut evenly": _call(attention, rows=7),
        "document not cut evenly": _call(attention, packed_seq_params=thd([9, 8 * world - 9])),
        "rows outside documents": _call(attention, packed_seq_params=thd([2 * world])),
        "keys of other documents": _call(
            attention,
            packed_seq_params=params(cu_seqlens_q=cumulative([8 * world]), cu_seqlens_kv=cumulative([2 * world, 6 * world])),
        ),
        "padding, mean by rank": _call(attention, packed_seq_params=thd([5], [8 * world])),
    }


def _elsewhere(world: int) -> dict[str, Callable[[], Any]]:
    """Specs, linear layers, ping-pong, checkpoints."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.spec_utils import ModuleSpec, build_module

    from distattn.integrations import megatron

    def pingpong(schedule: str = "distattn:ring", spec: Any = None, **values: Any) -> Any:
        given = config(context_parallel_size=world)
        for name, value in values.items():
            setattr(given, name, value)
        return build_module(spec or megatron.pingpong_layer_spec(schedule, implementation="local"), config=given)

    turns = pingpong()
    stock: Any
    crossed: Any
    stock, crossed = (megatron.pingpong_layer_spec(implementation="local") for _ in range(2))
    stock.submodules.self_attention.submodules.core_attention = DotProductAttention
    crossed.submodules.cross_attention = torch.nn.Identity
    linear = megatron.LinearAttention(config(context_parallel_size=world), kind="gla", num_heads=2, num_value_heads=2)
    hidden = torch.zeros(8, 1, 32)

    def remembered() -> None:
        # The documents of a recomputation differ from those of its forward pass.
        kept = core("distattn:ring,packed=document,remat=keep_out_lse")
        q = torch.zeros(1, 8, HEADS, DIM)
        kept._kept.push(q, "one plan", q, q[..., 0])
        kept._kept.pop(q, "another")

    def kept_twice() -> None:
        q = torch.zeros(1, 8, HEADS, DIM)
        core("distattn:ring,packed=document,remat=keep_out_lse")._kept.pop(q, "one plan")

    def other_tokens() -> None:
        kept = core("distattn:ring,packed=document,remat=keep_out_lse")
        q = torch.ones(1, 8, HEADS, DIM)
        kept._kept.push(q, "one plan", q, q[..., 0])
        kept._kept.pop(2 * q, "one plan")

    return {
        "recomputed twice": kept_twice,
        "recomputed for other tokens": other_tokens,
        "unknown implementation": lambda: megatron.layer_spec(implementation="apex"),
        "unknown kind of a layer": lambda: megatron.LinearAttention(config(), kind="mamba7"),
        "rows that are not the documents'": lambda: megatron.slice_thd_batch(
            {"tokens": torch.zeros(1, 9)}, torch.tensor([0, 8]), num_ranks=2, rank=0
        ),
        "ping-pong of another class": lambda: pingpong(spec=stock, context_parallel_size=1),
        "ping-pong of cross attention": lambda: pingpong(spec=crossed),
        "ping-pong with an output gate": lambda: pingpong(attention_output_gate=True),
        "ping-pong with mla": lambda: pingpong(multi_latent_attention=True),
        "ping-pong with one fused rope": lambda: pingpong(fused_single_qkv_rope=True),
        "ping-pong with offloading": lambda: pingpong(fine_grained_activation_offloading=True),
        "ping-pong with fp32 residuals": lambda: pingpong(fp32_residual_connection=True),
        "ping-pong recomputing attention": lambda: pingpong(recompute_granularity="selective", recompute_modules=["core_attn"]),
        "ping-pong with a bias": lambda: turns(torch.zeros(8, 2, 32), attention_bias=torch.zeros(1)),
        "another plan at recomputation": remembered,
        "spec without attention": lambda: megatron.patch_spec(ModuleSpec(module=torch.nn.Identity)),
        "layers that do not fit": lambda: megatron.hybrid_spec(config(), ["softmax"]),
        "unknown linear kind": lambda: megatron.linear_mixer_spec("mamba7"),
        "linear heads": lambda: megatron.LinearAttention(config(), num_heads=2, num_value_heads=3),
        "linear with a dense mask": lambda: linear(hidden, hidden),
        "ping-pong of an odd batch": lambda: turns(torch.zeros(8, 3, 32)),
        "ping-pong of packed rows": lambda: turns(torch.zeros(8, 2, 32), packed_seq_params=thd([8 * world])),
        "ping-pong with kept results": lambda: pingpong("distattn:ring,remat=keep_out_lse"),
        "linear inference": lambda: linear(hidden, inference_context=object()),
    }


@contextmanager
def context_parallel_of_torch() -> Iterator[None]:
    """What torch's context_parallel(...) does while it is entered."""
    own = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _as_of_torch
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


def _as_of_torch() -> None: ...


_as_of_torch.__module__ = "torch.distributed.tensor.experimental"


@contextmanager
def release_19() -> Iterator[None]:
    """Megatron-core 0.19, without arguments that say how it cuts packed sequences."""
    from distattn.integrations import megatron_attention

    own = megatron_attention.megatron_version
    megatron_attention.megatron_version = "0.19.2"
    try:
        yield
    finally:
        megatron_attention.megatron_version = own


def _within(call: Callable[[], Any], context: Callable[[], AbstractContextManager[None]]) -> Callable[[], Any]:
    def run() -> None:
        with context():
            call()

    return run


def _params(cu: list[int]) -> Any:
    return params(cu_seqlens_q=torch.tensor(cu, dtype=torch.int32), cu_seqlens_kv=torch.tensor(cu, dtype=torch.int32))


def _with(schedule: str = "distattn:ring", **values: Any) -> Any:
    """Construction with attributes that Megatron's own checks would want more of."""
    from megatron.core.transformer.enums import AttnMaskType

    from distattn.integrations.megatron import CoreAttention

    given = config(context_parallel_size=dist.get_world_size())
    for name, value in values.items():
        setattr(given, name, value)
    return CoreAttention(given, 1, AttnMaskType.causal, "self", cp_comm_type=schedule)


def transfers_of_recomputation(rank: int, world: int) -> dict[str, int]:
    """Messages that one checkpointed forward and backward sends, by what the checkpoint does."""
    from megatron.core import tensor_parallel

    found = {}
    for remat in ("keep_out_lse", "recompute"):
        attention = core(f"distattn:ring,remat={remat}")
        plans: list[Any] = []
        found[remat] = _transfers(attention, plans, lambda run, *x: tensor_parallel.checkpoint(run, False, *x))
        assert not len(attention._kept)
    found["no checkpoint"] = _transfers(core(), [], lambda run, *x: run(*x))
    return found


def _transfers(attention: Any, plans: list[Any], through: Callable[..., Tensor]) -> int:
    find = attention._plan
    attention._plan = lambda *a: plans.append(find(*a)) or plans[-1]
    q, k, v = (x[:12].requires_grad_() for x in whole(12))
    attention(q, k, v, None)  # makes the plan
    before = plans[-1].transport.num_transfers
    out = through(lambda q, k, v: attention(q, k, v, None), q, k, v)
    out.sum().backward()
    return plans[-1].transport.num_transfers - before


def specs() -> dict[str, Any]:
    """What the exported specs hold, by name of class; and a linear mixer in Megatron's MambaLayer."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from distattn.integrations import megatron

    def core_of(spec: Any) -> Any:
        return spec.submodules.self_attention.submodules.core_attention

    stock = get_gpt_layer_local_spec()
    megatron.patch_spec(stock)
    block: Any = megatron.slime_spec(SimpleNamespace(transformer_impl="local"), config())
    hybrid: Any = megatron.hybrid_spec(config(), ["kda", "softmax"], implementation="local")
    return {
        "gpt_spec": core_of(megatron.gpt_spec).__name__,
        "named schedule": core_of(megatron.layer_spec("distattn:ulysses", implementation="local")).params,
        "original untouched": core_of(stock).__name__,
        "slime": [core_of(layer).__name__ for layer in block.layer_specs],
        "hybrid": [layer.submodules.self_attention.module.__name__ for layer in hybrid.layer_specs],
        "mamba layer error": mamba_layer_error(),
        "saved": saved(),
    }


def saved() -> dict[str, list[int]]:
    """Global shapes of what Megatron's distributed checkpoints hold of a softmax layer with sinks and of a linear layer."""
    from megatron.core import parallel_state

    from distattn.integrations import megatron

    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    linear = megatron.LinearAttention(config(), kind="kda", num_heads=2, num_value_heads=4, head_dim=8, value_head_dim=8)
    found = core(softmax_type="learnable").sharded_state_dict("core.", metadata=metadata)
    found |= linear.sharded_state_dict("linear.", metadata=metadata)
    assert {name.removeprefix("linear.") for name in found if name.startswith("linear.")} >= {
        name for name, _ in linear.named_parameters()
    }
    return {name: list(part.global_shape) for name, part in found.items() if hasattr(part, "global_shape")}


def mamba_layer_error() -> float:
    """Largest difference of a MambaLayer with our mixer, over all context ranks, from the same layer on one."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from distattn.integrations import megatron

    rank, world = dist.get_rank(), dist.get_world_size()
    alone = dist.new_group([rank], use_local_synchronization=True)
    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
    mixer = megatron.linear_mixer_spec("simple_gla", num_heads=2, num_value_heads=2, head_dim=8, value_head_dim=8)
    bda: Any = get_bias_dropout_add
    parts = MambaLayerSubmodules(norm=WrappedTorchNorm, mixer=mixer, mamba_bda=bda)
    given = config(params_dtype=torch.float64, bias_dropout_fusion=False)
    layers = []
    for group in (groups.cp, alone):
        torch.manual_seed(5)
        layers.append(MambaLayer(given, parts, 1, pg_collection=ProcessGroupCollection(tp=groups.tp, cp=group)).double())
    hidden = torch.randn(32, 1, 32, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    mine = zigzag(32, world, rank)
    return float((layers[0](hidden[mine]) - layers[1](hidden)[mine]).detach().abs().max())


def installed_slicing(rank: int, world: int) -> dict[str, Any]:
    """Rows that Megatron's batch function returns once ours is installed, and those of the layout."""
    from megatron.core import parallel_state
    from megatron.core import utils as megatron_utils

    from distattn.integrations import megatron

    lengths, room = [3, 9, 16], [8, 16, 16]
    names = megatron.install_thd_slicing()
    cu, padded = cumulative(lengths), cumulative(room)
    batch: dict[str, Any] = {name: torch.arange(40)[None] for name in ("tokens", "labels", "loss_mask", "position_ids")}
    if hasattr(megatron_utils, "get_thd_batch_on_this_cp_rank"):
        batch, _ = megatron_utils.get_thd_batch_on_this_cp_rank(batch, cu, padded, torch.tensor([16]))
    else:
        batch |= {"cu_seqlens": cu[None], "cu_seqlens_padded": padded[None], "attention_mask": None}
        group = parallel_state.get_context_parallel_group()
        sliced: Any = megatron_utils.get_batch_on_this_cp_rank
        batch = sliced(batch, False, cp_group=group)
    expected = torch.cat([start + zigzag(n, world, rank) for start, n in zip(padded.tolist(), room)])
    return {"names": names, "rows": batch["labels"][0].tolist(), "expected": expected.tolist()}
