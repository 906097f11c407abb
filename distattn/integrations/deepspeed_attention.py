"""``DistributedAttention`` in place of ``deepspeed.sequence.layer.DistributedAttention``, on our schedules.

    DeepSpeed   q, k, v ─ all-to-all over heads ─▶ a local attention module, which sees all rows ─ all-to-all back ─▶
    here        q, k, v ─ any schedule, any number of heads ─▶ what ``LocalAttention`` describes

Rank r holds rows r · s to (r + 1) · s of the sequence, as there; its load is then uneven under a causal mask, which schedules
that move queries or heads (``ulysses``, ``usp``, ``disaggregated``) even out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distattn.attention import attention
from distattn.errors import InputError, UnsupportedError
from distattn.integrations.refusals import refuse_dropout, refuse_tensor_mask, refuse_unknown_arguments
from distattn.mask import Mask
from distattn.parallel.layout import Layout
from distattn.planning import Plan, plan

_NAME = "distattn's DistributedAttention"
_HEADS = 2
_MOST_PLANS = 16


@dataclass(frozen=True)
class LocalAttention:
    """What attention computes, in place of a module: a module's mask cannot be known, so it has to be said.

    causal: over the whole sequence. window: ``(left, right)``, key j is seen from i where −left ≤ j − i ≤ right; −1 is
    without limit. scale: default head_dim^−½. softcap: positive, or None. dropout: must be 0. strategy, options, kernel,
    deterministic: as for ``distattn.plan``.
    """

    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    scale: float | None = None
    softcap: float | None = None
    dropout: float = 0.0
    strategy: str = "auto"
    options: Any = None
    kernel: str = "auto"
    deterministic: bool = False

    def mask(self, num_rows: int) -> Mask:
        """Of a sequence of ``num_rows``."""
        mask = Mask.causal(num_rows) if self.causal else Mask.full(num_rows, num_rows)
        left, right = (num_rows if edge < 0 else edge for edge in self.window)
        return mask if left >= num_rows and right >= num_rows else mask & Mask.sliding_window(num_rows, left, right)


class DistributedAttention(nn.Module):
    """Attention over a sequence that is cut over ``sequence_process_group`` in equal pieces, in rank order.

    Called as DeepSpeed's: ``layer(query, key, value, batch_dim_idx)``. Heads need not divide by the ranks, and KV heads may be
    fewer than ranks.
    """

    def __init__(
        self,
        local_attention: LocalAttention,
        sequence_process_group: dist.ProcessGroup | None,
        scatter_idx: int = _HEADS,
        gather_idx: int | None = None,
        sp_stream: Any = None,
        num_kv_heads: int | None = None,
    ) -> None:
        """sequence_process_group: None is one rank. scatter_idx: 2, the heads. gather_idx: where the sequence is; None: what
        ``batch_dim_idx`` leaves. sp_stream: None, our executor overlaps by itself. num_kv_heads: checked against the keys.

        Raises InputError naming the argument, UnsupportedError for dropout.
        """
        super().__init__()
        if not isinstance(local_attention, LocalAttention):
            raise InputError(
                f"local_attention must be a distattn.integrations.deepspeed.LocalAttention, got "
                f"{type(local_attention).__name__}: what a module masks cannot be known, so say causal, window and scale"
            )
        refuse_dropout(local_attention.dropout, _NAME)
        if scatter_idx != _HEADS:
            raise InputError(f"scatter_idx is {scatter_idx}; it must be 2, the heads of [s, b, h, d] or [b, s, h, d]")
        if gather_idx not in (None, 0, 1):
            raise InputError(f"gather_idx is {gather_idx}; it must be 0 for [s, b, h, d], 1 for [b, s, h, d], or None")
        if sp_stream is not None:
            raise InputError("sp_stream must be None: transfers overlap with computation without one")
        self.local_attention, self.group = local_attention, sequence_process_group
        self.gather_idx, self.num_kv_heads = gather_idx, num_kv_heads
        self._plans: dict[tuple[Any, ...], Plan] = {}

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch_dim_idx: int,
        rotary_pos_emb: tuple[Tensor, Tensor] | None = None,
        *args: Any,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """This rank's rows of the result, laid out as the query. Collective over the group.

        query [s, b, h, d] with batch_dim_idx 1, or [b, s, h, d] with 0; key, value the same with their own heads; s alike on
        every rank. rotary_pos_emb: (cos, sin) of the whole sequence, [1, S, 1, r] for batch_dim_idx 1 and [S, 1, 1, r] for 0 as
        DeepSpeed takes them, on the first r features. cu_seqlens: int [documents + 1], where documents begin in the whole
        sequence, for packed ones; on the CPU, or every call waits for the device.

        Raises InputError, and UnsupportedError for a mask as a tensor or any other argument that is not None.
        """
        for extra in args:
            refuse_tensor_mask(extra, _NAME, "say causal and window in LocalAttention, and documents with cu_seqlens")
        refuse_tensor_mask(
            kwargs.pop("attention_mask", None), _NAME, "say causal and window in LocalAttention, and documents with cu_seqlens"
        )
        refuse_unknown_arguments(kwargs, _NAME)
        self._check(query, key, value, batch_dim_idx)
        q, k, v = (x if batch_dim_idx == 0 else x.transpose(0, 1) for x in (query, key, value))
        if rotary_pos_emb is not None:
            cos, sin = (self._own_angles(x, batch_dim_idx, q.shape[1]) for x in rotary_pos_emb)
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        rule = self.local_attention
        out = attention(q, k, v, self._plan(q, k, v, cu_seqlens), scale=rule.scale, softcap=rule.softcap)
        assert isinstance(out, Tensor)
        return out if batch_dim_idx == 0 else out.transpose(0, 1)

    def _check(self, query: Tensor, key: Tensor, value: Tensor, batch_dim_idx: int) -> None:
        if batch_dim_idx not in (0, 1):
            raise InputError(f"batch_dim_idx is {batch_dim_idx}; it must be 0 for [b, s, h, d] or 1 for [s, b, h, d]")
        if self.gather_idx == batch_dim_idx:
            raise InputError(
                f"gather_idx and batch_dim_idx are both {batch_dim_idx}: the sequence cannot lie where the batch does; set "
                f"gather_idx={1 - batch_dim_idx} or None"
            )
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x.ndim != 4 or x.shape[:2] != query.shape[:2]:
                raise InputError(
                    f"{name} is {list(x.shape)}; query, key and value must be [s, b, h, d] or [b, s, h, d] with one s and b"
                )
        if self.num_kv_heads not in (None, key.shape[2]):
            raise InputError(f"num_kv_heads is {self.num_kv_heads}, but key has {key.shape[2]} heads; give that number or None")

    def _plan(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Plan:
        """Of [b, s, h, d]; made once a shape, compared over ranks when it is made."""
        rule, ranks = self.local_attention, 1 if self.group is None else dist.get_world_size(self.group)
        documents = None if cu_seqlens is None else tuple(int(x) for x in cu_seqlens.tolist())
        given = (q.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3], q.dtype, documents)
        if given in self._plans:
            return self._plans[given]
        num_rows = ranks * q.shape[1]
        mask = rule.mask(num_rows)
        if documents is not None:
            if not documents or documents[0] != 0 or documents[-1] != num_rows:
                raise InputError(f"cu_seqlens must rise from 0 to the {num_rows} rows of all ranks, got {list(documents)[:8]}")
            mask = mask & Mask.from_cu_seqlens(documents, documents, causal=False)
        made = plan(
            mask,
            heads=q.shape[2],
            kv_heads=k.shape[2],
            head_dim=q.shape[3],
            value_dim=v.shape[3],
            group=self.group,
            strategy=rule.strategy,
            options=rule.options,
            layout=Layout.contiguous(num_rows, ranks),
            kernel=rule.kernel,
            deterministic=rule.deterministic,
            dtype=q.dtype,
        )
        if len(self._plans) >= _MOST_PLANS:
            self._plans.pop(next(iter(self._plans)))
        self._plans[given] = made
        return made

    def _own_angles(self, angles: Tensor, batch_dim_idx: int, num_local: int) -> Tensor:
        """[1, s, 1, r] of this rank, from the whole sequence's."""
        ranks, rank = (1, 0) if self.group is None else (dist.get_world_size(self.group), dist.get_rank(self.group))
        # As DeepSpeed: the first two dimensions change places, and the sequence is where the query's is.
        rows = angles.permute(1, 0, 2, 3)
        rows = rows if batch_dim_idx == 0 else rows.transpose(0, 1)
        if rows.shape[:3] != (1, ranks * num_local, 1):
            raise InputError(
                f"rotary_pos_emb holds tensors of shape {list(angles.shape)}; they must be of all {ranks * num_local} rows: "
                f"{[ranks * num_local, 1, 1, 'r'] if batch_dim_idx == 0 else [1, ranks * num_local, 1, 'r']}"
            )
        return rows[:, rank * num_local : (rank + 1) * num_local]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first r features, their halves being the two coordinates (arXiv 2104.09864)."""
    width = cos.shape[-1]
    if width % 2 or width > x.shape[-1]:
        raise UnsupportedError(
            f"rotary_pos_emb over {width} features", _NAME, f"heads have {x.shape[-1]}, and it turns pairs", "take an even part"
        )
    turned, kept = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, kept), dim=-1)
