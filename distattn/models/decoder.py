"""The decoder: pre-norm blocks of grouped-query or linear attention and SwiGLU over this rank's tokens of a packed stream.

x = embedding[tokens]
x = x + O attention(rope(Q n(x)), rope(K n(x)), V n(x));  x = x + W_down (silu(W_gate n(x)) · W_up n(x))   for each block
hidden = n(x);  logits = hidden W_outputᵀ, only ever in chunks (``distattn.models.loss``)

n is RMSNorm. Only attention sees other ranks' tokens, so everything else is ordinary code over ``[B, T_local, ...]``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from distattn.errors import InputError
from distattn.models.aaren import Aaren
from distattn.models.attention import Attention
from distattn.models.config import AAREN, SOFTMAX, TITANS, TITANS_MAC, ModelConfig
from distattn.models.layers import RMSNorm, StreamInfo, bare_linear
from distattn.models.linear_mixer import LinearMixer
from distattn.models.loss import chunked_cross_entropy, per_token_loss
from distattn.models.rope import make_rotation
from distattn.models.titans import Titans, plan_segments
from distattn.pingpong import NanoBatches, PingPong
from distattn.planning import Plan

BlockRunner = Callable[..., Tensor]
"""``run(function, *args) -> function(*args)``, perhaps under activation checkpointing."""


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): W_down (silu(W_gate x) · W_up x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = bare_linear(config.dim, config.ffn_dim)
        self.up = bare_linear(config.dim, config.ffn_dim)
        self.down = bare_linear(config.ffn_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One layer: hidden [B, T_local, dim] to the same."""

    def __init__(self, config: ModelConfig, index: int, kind: str) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = _mixer(config, index, kind)
        self.feed_forward_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)
        self.run: BlockRunner = _run_plainly

    def forward(self, x: Tensor, stream: StreamInfo) -> Tensor:
        return self.run(self._compute, x, stream)

    def _compute(self, x: Tensor, stream: StreamInfo) -> Tensor:
        return self.feed_onward(x + self.attention(self.attention_norm(x), stream))

    def feed_onward(self, x: Tensor) -> Tensor:
        """What follows attention."""
        return x + self.feed_forward(self.feed_forward_norm(x))


def _mixer(config: ModelConfig, index: int, kind: str) -> Attention | Titans | Aaren | LinearMixer:
    if kind == SOFTMAX:
        return Attention(config)
    if kind in TITANS:
        return Titans(config, kind)
    return Aaren(config) if kind == AAREN else LinearMixer(config, index, kind)


class _BeforeAttention(nn.Module):
    """The part of a block up to q, k, v, for ``PingPong``; its weights are the block's own."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        mixer = block.attention
        assert isinstance(mixer, Attention)
        parts = (block.attention_norm, mixer.q, mixer.k, mixer.v, mixer.q_norm, mixer.k_norm, mixer.gate)
        self.parts = nn.ModuleList(part for part in parts if part is not None)
        # In tuples, so as not to be children, whose weights would all count as ours.
        self._norm, self._mixer = (block.attention_norm,), (mixer,)

    def forward(self, x: Tensor, stream: StreamInfo) -> tuple[Tensor, ...]:
        q, k, v, *gate = self._mixer[0].project(self._norm[0](x), stream)
        return q, k, v, x, *gate


class _AfterAttention(nn.Module):
    """The rest of a block."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        mixer = block.attention
        assert isinstance(mixer, Attention)
        self.parts = nn.ModuleList([mixer.o, block.feed_forward_norm, block.feed_forward])
        self._block, self._mixer = (block,), (mixer,)

    def forward(self, out: Tensor, x: Tensor, *rest: Any) -> Tensor:
        *gate, _ = rest
        return self._block[0].feed_onward(x + self._mixer[0].combine(out, *gate))


class Decoder(nn.Module):
    """The model up to its hidden states, and its losses; logits are never materialised for a whole shard.

    ``blocks`` holds the units to shard: ``fully_shard`` each of them and then the decoder, and register ``loss``, ``nano_loss``
    and ``token_losses`` with ``register_fsdp_forward_method``, so that the output projection is gathered for them too. With
    mixed precision set ``cast_forward_inputs=False``: there is nothing to cast, and FSDP2 would rebuild the plan.

    config is validated (ConfigError). Weights depend on config and seed alone, not on the number of ranks; built under
    ``torch.device("meta")`` the module has none until ``to_empty`` and ``init_weights``.
    """

    def __init__(self, config: ModelConfig, *, seed: int = 0) -> None:
        super().__init__()
        config.validate()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim, _weight=torch.empty(config.vocab_size, config.dim))
        self.blocks = nn.ModuleList(Block(config, i, kind) for i, kind in enumerate(config.layer_kinds))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = None if config.tie_embeddings else bare_linear(config.dim, config.vocab_size)
        self.ping_pong: PingPong | None = None
        if not self.embedding.weight.is_meta:
            self.init_weights(seed)

    @property
    def output_weight(self) -> Tensor:
        """``[vocab_size, dim]``: the embedding's own weight if tied."""
        return self.embedding.weight if self.output is None else self.output.weight

    def forward(self, tokens: Tensor, positions: Tensor, plan: Plan) -> Tensor:
        """Hidden states ``[B, T_local, dim]`` after the final norm, of this rank's rows.

        tokens [B, T_local] int64; positions [T_local] or [B, T_local] int64, counted from the start of each token's
        document. Collective over the plan's group: ranks with no rows call it too. Raises InputError.
        """
        if tokens.dim() != 2 or positions.shape not in (tokens.shape, tokens.shape[1:]):
            raise InputError(
                f"tokens are {tuple(tokens.shape)} and positions {tuple(positions.shape)}, but they must be "
                "[B, T_local], and [B, T_local] or [T_local]."
            )
        x = self.embedding(tokens)
        stream = self._stream(plan, positions, x.dtype)
        if self.ping_pong is not None:
            (x,) = self.ping_pong([x], [stream], NanoBatches.of(plan))
            return self.norm(x)
        for block in self.blocks:
            x = block(x, stream)
        return self.norm(x)

    def _stream(self, plan: Plan, positions: Tensor, dtype: torch.dtype) -> StreamInfo:
        rotation = make_rotation(self.config.rope, self.config.head_dim, positions, dtype)
        documents, segments = self._documents(plan), None
        if documents is not None and TITANS_MAC in self.config.layer_kinds:
            segments = plan_segments(plan, documents, self.config.memory.chunk)
        return StreamInfo(plan, rotation, documents, segments)

    def _documents(self, plan: Plan) -> np.ndarray | None:
        """Where documents begin, for linear layers; from the mask, which keeps them apart."""
        return plan.mask.segments() if self.config.num_softmax_layers < self.config.num_layers else None

    def loss(
        self, tokens: Tensor, positions: Tensor, labels: Tensor, plan: Plan, *, chunk_tokens: int = 1024
    ) -> tuple[Tensor, Tensor]:
        """(summed loss in nats, number of labels) of this rank's rows: ``chunked_cross_entropy`` of the hidden states.

        labels [B, T_local] int64, −100 where there is nothing to predict; the rest as for ``forward``.
        """
        hidden = self.forward(tokens, positions, plan)
        return chunked_cross_entropy(hidden, self.output_weight, labels, chunk_tokens=chunk_tokens)

    def nano_loss(
        self,
        tokens: Sequence[Tensor],
        positions: Sequence[Tensor],
        labels: Sequence[Tensor],
        nano: NanoBatches,
        *,
        chunk_tokens: int = 1024,
    ) -> tuple[Tensor, Tensor]:
        """``loss`` of two nano-batches that take turns, summed; needs ``use_ping_pong`` first.

        tokens, positions, labels: of each nano-batch, as for ``loss``. Collective.
        """
        assert self.ping_pong is not None, "use_ping_pong comes first"
        xs = [self.embedding(part) for part in tokens]
        infos = [self._stream(plan, part, xs[0].dtype) for plan, part in zip(nano.plans, positions, strict=True)]
        losses, counts = [], []
        for x, part in zip(self.ping_pong(xs, infos, nano), labels, strict=True):
            loss, count = chunked_cross_entropy(self.norm(x), self.output_weight, part, chunk_tokens=chunk_tokens)
            losses.append(loss)
            counts.append(count)
        return torch.stack(losses).sum(), torch.stack(counts).sum()

    @torch.no_grad()
    def token_losses(
        self, tokens: Tensor, positions: Tensor, labels: Tensor, plan: Plan, *, chunk_tokens: int = 1024
    ) -> Tensor:
        """Loss of each of this rank's tokens in nats, ``[B, T_local]`` fp32, 0 where the label is −100."""
        hidden = self.forward(tokens, positions, plan)
        return per_token_loss(hidden, self.output_weight, labels, chunk_tokens=chunk_tokens)

    def use_ping_pong(self) -> PingPong:
        """Go through the blocks phase by phase from now on, so that ``nano_loss`` is possible; the results stay the same.

        Call it before ``fully_shard``, and shard the phases instead of ``blocks``. Parameter names stay. Raises InputError for
        linear layers: they carry a state from the first nano-batch to the second.
        """
        if self.config.num_softmax_layers < self.config.num_layers:
            raise InputError(
                f"model.layers={self.config.layers} has linear layers, which carry a state from one half of a sequence to the "
                "other: ping-pong takes softmax layers only"
            )
        blocks = [block for block in self.blocks if isinstance(block, Block)]
        self.ping_pong = PingPong([(_BeforeAttention(block), _AfterAttention(block)) for block in blocks])
        return self.ping_pong

    def set_block_runner(self, run: BlockRunner) -> None:
        """Run every block's computation by ``run(function, *args)``, for example
        ``functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)``. Parameter names stay, and FSDP2
        stays outside the checkpoint, in either order of calls."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.run = run
        if self.ping_pong is not None:
            self.ping_pong.set_runner(run)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw all weights anew: norms 1, matrices normal with init_std, those into the residual stream narrower by
        sqrt(2 · num_layers). Untied embeddings are unit normal and their output projection 0: tokens are told apart from
        the first step on, and the first loss is ln(vocab_size).

        Each parameter has a generator of its own, keyed by seed and name, and is drawn whole before it is sharded: the
        values do not depend on the number of ranks or on which parameters a rank holds, only on the device type.
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(key[:7], "little"))
            whole = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
            assign_weight(parameter, whole.normal_(generator=generator).mul_(self._initial_std(name)))

    def _initial_std(self, name: str) -> float:
        if name == "output.weight":
            return 0.0
        if name == "embedding.weight" and self.output is not None:
            return 1.0
        if name.endswith("persistent"):
            return 1.0  # as large as what the layer normalises before it
        if name.endswith("convolution.weight"):
            return self.config.linear.conv_width**-0.5
        if name.endswith(("attention.o.weight", "near.o.weight", "recalled.weight", "feed_forward.down.weight")):
            return self.config.init_std / math.sqrt(2 * self.config.num_layers)
        return self.config.init_std


def assign_weight(parameter: nn.Parameter, whole: Tensor) -> None:
    """Copy a tensor that every rank holds alike into a parameter or into this rank's shard of it."""
    if isinstance(parameter, DTensor):
        # No source rank: each rank cuts its shard out of its own copy, without communication.
        shard = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(shard.to_local())
    else:
        parameter.copy_(whole)


def _run_plainly(function: Callable[..., Tensor], *args: Any) -> Tensor:
    return function(*args)
