"""A batch cut over the ranks of a context group, for a Hugging Face model that knows of no cutting.

    batch = shard({"input_ids": …, "labels": …}, group=group)      every rank passes the whole batch, alike
    with batch:                                                    the mask of every layer is that of the whole batch
        loss = model(**batch.inputs).loss                          this rank's share: sums over the ranks to the mean loss

The rows of a batch become one stream of documents without padding. Documents and positions are taken from the whole batch,
before it is cut: a shard cannot tell where its documents begin.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distattn.errors import InputError, UnsupportedError
from distattn.integrations.transformers_masks import Rule, Span, document_mask, runs
from distattn.mask import Mask
from distattn.parallel.agreement import board_of
from distattn.parallel.layout import Layout
from distattn.parallel.schedulers.auto import choose_layout
from distattn.planning import Plan, plan

IGNORED_LABEL = -100
_KNOWN = ("input_ids", "attention_mask", "position_ids", "labels", "shift_labels")

_active: ContextVar[ShardedBatch | None] = ContextVar("distattn_sharded_batch", default=None)


def active_batch() -> ShardedBatch | None:
    """The batch whose ``with`` block this is."""
    return _active.get()


@dataclass(frozen=True)
class Planning:
    """What ``distattn.plan`` is given for every layer, besides masks and shapes."""

    strategy: str = "auto"
    kernel: str = "auto"
    deterministic: bool = False
    options: Any = None
    timeout_s: float | None = None


@dataclass(frozen=True, eq=False)
class ShardedBatch:
    """This rank's rows of a batch; made by ``shard``, entered with ``with`` around the model's forward.

    inputs: what the model is called with; tensors [1, T_local] of input_ids, position_ids, labels. shape: of the whole
    batch, (B, S). num_labels: of the whole batch, over all ranks of the group. layout: over the stream's tokens.
    """

    inputs: dict[str, Any]
    shape: tuple[int, int]
    num_labels: int
    group: dist.ProcessGroup | None
    layout: Layout
    rank: int
    spans: Sequence[Span]
    stream_index: Tensor
    planning: Planning
    _tokens: list[Token[ShardedBatch | None]] = field(default_factory=list, repr=False)
    _masks: dict[Rule, Mask] = field(default_factory=dict, repr=False)

    @property
    def num_ranks(self) -> int:
        return self.layout.num_ranks

    @property
    def num_tokens(self) -> int:
        """Of the whole stream, padding left out."""
        return self.layout.num_rows

    @property
    def position_ids(self) -> Tensor:
        """int64 [1, T_local]."""
        return self.inputs["position_ids"]

    def __enter__(self) -> ShardedBatch:
        self._tokens.append(_active.set(self))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _active.reset(self._tokens.pop())

    def mask(self, rule: Rule) -> Mask:
        """What a layer with this rule allows, over the whole stream."""
        if rule not in self._masks:
            self._masks[rule] = document_mask(rule, self.spans, self.spans, self.num_tokens, self.num_tokens)
        return self._masks[rule]

    def plan(self, mask: Mask, **shape: Any) -> Plan:
        """The schedule of a layer's attention. Collective over the group."""
        p = self.planning
        return plan(
            mask, group=self.group, layout=self.layout, strategy=p.strategy, kernel=p.kernel, deterministic=p.deterministic,
            options=p.options, timeout_s=p.timeout_s, **shape,
        )  # fmt: skip

    def gather(self, x: Tensor) -> Tensor:
        """The whole batch's [B, S, …], on every rank, from this rank's [1, T_local, …], 0 where there is padding. Collective.

        For logits and hidden states in tests and evaluation: a million tokens of logits fit nowhere. Differentiable, with the
        gradients of all ranks' uses summed.
        """
        made = plan(self.mask(Rule(hi=0)), heads=1, head_dim=1, group=self.group, layout=self.layout, strategy="ring")
        stream = made.gather(x, dim=1)[0]
        flat = stream.new_zeros((self.shape[0] * self.shape[1], *stream.shape[1:]))
        index = self.stream_index.to(stream.device)
        return flat.index_copy(0, index, stream).unflatten(0, self.shape)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks of the group, detached: of ``loss``, the mean loss of the batch's labels. Collective."""
        total = x.detach().clone()
        if self.group is not None:
            dist.all_reduce(total, group=self.group)
        return total


def shard(
    batch: Mapping[str, Any],
    *,
    group: dist.ProcessGroup | None = None,
    num_items: int | Tensor | None = None,
    layout: Layout | None = None,
    strategy: str = "auto",
    kernel: str = "auto",
    deterministic: bool = False,
    options: Any = None,
    timeout_s: float | None = None,
) -> ShardedBatch:
    """Cut a batch over the ranks of ``group``, each of which passes the whole batch, alike. Collective, but waits for no rank.

    batch: input_ids int64 [B, S] and, as a collator makes them, attention_mask (ones and zeros; zeros are padding, on either
    side), position_ids [B, S] (packed documents: each begins at 0), labels (shifted here, never across documents) or
    shift_labels (taken as they are). num_items: what ``loss`` is divided by, if more than this batch's labels share a step
    (other data ranks, accumulated batches); default: the labels of the batch. layout: over the stream of unpadded tokens,
    default: as the plan would choose it. The rest is as for ``distattn.plan``; group=None is one rank.

    Raises InputError naming the key, UnsupportedError for a batch that cannot be cut, and AgreementError where the ranks of
    the group passed different tokens.
    """
    tokens, tensors = _checked(batch)
    shape = (int(tokens.shape[0]), int(tokens.shape[1]))
    index, spans, positions = _stream(tensors, shape)
    num_ranks = 1 if group is None else dist.get_world_size(group)
    if len(index) < num_ranks:
        raise UnsupportedError(
            f"a batch of {len(index)} tokens over {num_ranks} ranks", "shard", "models need a token on every rank",
            "use longer batches, or fewer ranks",
        )  # fmt: skip
    if group is not None:
        board_of(group).agree(f"transformers batch {_digest(tensors)}")
    labels = _shifted_labels(tensors, shape)
    num_labels = 0 if labels is None else int((labels.reshape(-1)[index] != IGNORED_LABEL).sum())
    causal = document_mask(Rule(hi=0), spans, spans, len(index), len(index))
    if layout is None:
        layout = choose_layout(causal, num_ranks, "ring" if strategy == "auto" else strategy).layout
    rank = 0 if group is None else dist.get_rank(group)
    own = torch.from_numpy(layout.rows(rank))
    if not len(own):
        raise UnsupportedError(
            f"a layout that leaves rank {rank} without tokens",
            "shard",
            "models need a token on every rank",
            "use another layout",
        )
    inputs: dict[str, Any] = {
        "input_ids": tokens.reshape(-1)[index[own].to(tokens.device)][None],
        "position_ids": positions[own].to(tokens.device)[None],
        "use_cache": False,
    }
    if labels is not None:
        local = labels.reshape(-1)[index[own]].to(tokens.device)[None]
        inputs |= {"labels": local, "shift_labels": local}
        inputs["num_items_in_batch"] = max(num_labels, 1) if num_items is None else num_items
    planning = Planning(strategy, kernel, deterministic, options, timeout_s)
    return ShardedBatch(inputs, shape, num_labels, group, layout, rank, spans, index, planning)


def labels_of(batch: Mapping[str, Any]) -> int:
    """Labels that ``shard`` will count in a batch: none at padding, none across documents."""
    tokens, tensors = _checked(batch)
    labels = _shifted_labels(tensors, (int(tokens.shape[0]), int(tokens.shape[1])))
    if labels is None:
        return 0
    real = torch.from_numpy(_real_tokens(tensors, (int(tokens.shape[0]), int(tokens.shape[1]))))
    return int(((labels != IGNORED_LABEL) & real).sum())


def _checked(batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """input_ids as they are, and CPU copies of everything, each [B, S]."""
    unknown = [key for key, value in batch.items() if key not in _KNOWN and value is not None]
    if unknown:
        raise UnsupportedError(
            f"a batch that holds {', '.join(unknown)}", "shard", f"it knows how to cut {', '.join(_KNOWN)} only",
            "leave the others out, or run the model outside of it, on one rank",
        )  # fmt: skip
    given: dict[str, Any] = {key: value for key, value in batch.items() if value is not None}
    tokens = given.get("input_ids")
    if not isinstance(tokens, Tensor) or tokens.dim() != 2:
        raise InputError(f"input_ids must be a tensor [B, S], got {_shape_of(tokens)}")
    for key, value in given.items():
        if not isinstance(value, Tensor) or value.shape != tokens.shape:
            if key == "attention_mask":
                raise UnsupportedError(
                    f"an attention_mask that is {_shape_of(value)}", "shard", "a mask over pairs cannot be cut over ranks",
                    f"pass ones and zeros {list(tokens.shape)}; packed documents are given by position_ids",
                )  # fmt: skip
            raise InputError(f"{key} must be a tensor {list(tokens.shape)} as input_ids is, got {_shape_of(value)}")
    return tokens, {key: value.detach().cpu() for key, value in given.items()}


def _shape_of(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _digest(tensors: Mapping[str, Tensor]) -> str:
    h = hashlib.blake2b(digest_size=16)
    for key in sorted(tensors):
        h.update(f"{key}{tuple(tensors[key].shape)}".encode())
        h.update(tensors[key].to(torch.int64).contiguous().numpy().tobytes())
    return h.hexdigest()


def _real_tokens(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> np.ndarray:
    """Bool [B, S]: not padding."""
    mask = tensors.get("attention_mask")
    if mask is None:
        return np.ones(shape, bool)
    values = mask.to(torch.int64)
    if not bool(((values == 0) | (values == 1)).all()):
        raise InputError(
            "attention_mask must hold ones and zeros only: give packed documents by position_ids that begin anew at 0"
        )
    return values.numpy().astype(bool)


def _stream(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, list[Span], Tensor]:
    """(place of each token of the stream in the flattened batch, documents of the stream, position of each token)."""
    real = _real_tokens(tensors, shape)
    given = tensors.get("position_ids")
    positions = np.broadcast_to(np.arange(shape[1]), shape) if given is None else given.numpy()
    spans: list[Span] = []
    end = 0
    for row in range(shape[0]):
        kept = positions[row][real[row]]
        if not len(kept):
            continue
        if given is None and kept[-1] - kept[0] != len(kept) - 1:
            raise UnsupportedError(
                f"padding between the tokens of row {row}", "shard", "it is unknown whether they are one document",
                "give position_ids, which begin anew at 0 with every document",
            )  # fmt: skip
        padded = not bool(real[row].all())
        for a, b in runs(np.diff(kept) == 1).tolist():
            # transformers counts chunks from the first real token in padded rows, from position_ids in packed ones.
            spans.append(Span(end + a, end + b, 0 if padded else int(kept[a])))
        end += len(kept)
    index = np.flatnonzero(real.reshape(-1))
    if not len(index):
        raise InputError("the batch holds padding alone: attention_mask must be 1 for at least one token")
    return torch.from_numpy(index), spans, torch.from_numpy(positions.reshape(-1)[index].astype(np.int64))


def _shifted_labels(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor | None:
    """What each token has to predict, int64 [B, S]; −100 at the end of every document."""
    if "shift_labels" in tensors:
        return tensors["shift_labels"].to(torch.int64)
    if "labels" not in tensors:
        return None
    shifted = torch.full(shape, IGNORED_LABEL, dtype=torch.int64)
    shifted[:, :-1] = tensors["labels"][:, 1:]
    real = torch.from_numpy(_real_tokens(tensors, shape))
    same = real[:, :-1] & real[:, 1:]
    if "position_ids" in tensors:
        same &= tensors["position_ids"].diff(dim=1) == 1
    shifted[:, :-1][~same] = IGNORED_LABEL
    return shifted
