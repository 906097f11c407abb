"""Loss on held-out sequences, in all and by position in the context: what long context is for.

The byte bigram's loss on the same windows stands beside it. It is what one previous token tells; a model that does not beat it
has made no use of its context.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distattn.config import Config
from distattn.data import PackedSequence, PackedStream, TokenCache
from distattn.models import Decoder
from distattn.training.atomic_file import replace_text
from distattn.training.batches import make_batch
from distattn.training.mesh import Mesh
from distattn.training.patience import patiently


@dataclass(frozen=True)
class Evaluation:
    """loss in nats per token over ``tokens`` labels. Position bin b holds tokens with position_edges[b] ≤ position <
    position_edges[b + 1], counted from the start of their document; position_loss is None for a bin without tokens."""

    step: int
    loss: float
    tokens: int
    position_edges: list[int]
    position_loss: list[float | None]
    position_tokens: list[int]
    bigram_loss: float | None = None

    def describe(self) -> str:
        """One line: the loss, and the bigram's where there is one."""
        text = f"held-out loss {self.loss:.4f} nats a token"
        if self.bigram_loss is None:
            return text
        verdict = "below" if self.loss < self.bigram_loss else "not below"
        return f"{text}, {verdict} the bigram's {self.bigram_loss:.4f} on the same windows ({self.tokens:,} tokens)"


class EvaluationLog:
    """``evaluations.json`` of a run: all evaluations, oldest first. Those after ``resume_step`` are dropped at the start."""

    def __init__(self, folder: Path, resume_step: int, *, patience_s: float = 0.0) -> None:
        self._path, self._patience_s = folder / "evaluations.json", patience_s
        written = json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else []
        self.records: list[dict[str, Any]] = [record for record in written if record["step"] <= resume_step]

    def append(self, evaluation: Evaluation) -> None:
        """Add one, in place of an earlier one of the same step."""
        self.records = [record for record in self.records if record["step"] != evaluation.step] + [asdict(evaluation)]
        text = json.dumps(self.records, indent=1) + "\n"
        patiently(lambda: replace_text(self._path, text), str(self._path), patience_s=self._patience_s)


def held_out_sequences(config: Config, cache: TokenCache) -> list[PackedSequence]:
    """The sequences of an evaluation: the first ``data.eval_sequences`` of the held-out text, 0 for all."""
    stream = PackedStream(cache, "held_out", config.data.seq_len)
    assert stream.num_sequences is not None
    wanted = config.data.eval_sequences or stream.num_sequences
    return [stream.sequence(i) for i in range(min(wanted, stream.num_sequences))]


def position_edges(seq_len: int, bins: int) -> np.ndarray:
    """Log-spaced edges, int64: 0, 1, …, seq_len. Bins that would hold no position are dropped."""
    edges = np.round(np.geomspace(1, seq_len, bins)).astype(np.int64)
    edges[-1] = seq_len
    return np.unique(np.concatenate([[0], edges]))


def evaluate(
    model: Decoder,
    config: Config,
    mesh: Mesh,
    sequences: list[PackedSequence],
    step: int,
    *,
    beat: Callable[[str], None] = lambda doing: None,
) -> Evaluation:
    """The model's loss on these sequences, dealt to the data ranks; the same on every rank. Collective.

    bigram_loss is left for the caller, who computes it once a run. beat: told of every sequence before it is computed.
    """
    edges = position_edges(max(s.seq_len for s in sequences), config.eval.position_bins)
    inner = torch.from_numpy(edges[1:-1])
    sums = torch.zeros(2, len(edges) - 1, dtype=torch.float64)
    for first in range(0, len(sequences), mesh.data):
        beat(f"step {step}, evaluation of held-out sequence {first + 1} of {len(sequences)}")
        # Every rank joins in every forward, whose weights are gathered from all; what is over counts for nothing.
        mine = first + mesh.data_rank
        batch = make_batch(config, mesh, sequences[min(mine, len(sequences) - 1)])
        losses = model.token_losses(
            batch.tokens, batch.positions, batch.labels, batch.plan, chunk_tokens=config.train.loss_chunk_tokens
        )
        if mine < len(sequences):
            bins = torch.bucketize(batch.positions.cpu(), inner, right=True)
            sums[0].index_add_(0, bins, losses[0].double().cpu())
            sums[1].index_add_(0, bins, (batch.labels[0] >= 0).double().cpu())
    sums = mesh.sum(sums).cpu()
    by_position = [(loss / n if n else None) for loss, n in sums.t().tolist()]
    total, tokens = sums.sum(dim=1).tolist()
    counts = [int(n) for n in sums[1].tolist()]
    return Evaluation(step, total / max(tokens, 1), int(tokens), edges.tolist(), by_position, counts)
