"""The loss of a bigram model: what a network must beat to have used its context.

    P(b | a) = (count(a, b) + α) / (count(a) + α · vocab_size)

Counts are of the training split. α is the one, out of a small grid, under which the training text is likeliest when
each pair is predicted from all the others (leave one out: its own count less one), so that nothing held out is looked
at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from distattn.data.cache import TokenCache
from distattn.data.packing import PackedSequence, PackedStream

MAX_VOCAB_SIZE = 4096

_SMOOTHINGS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_CHUNK_TOKENS = 1 << 20


def bigram_unsupported(vocab_size: int) -> str | None:
    """Why there is no bigram loss for this vocabulary, or None where there is one."""
    if vocab_size > MAX_VOCAB_SIZE:
        return f"a bigram table for {vocab_size} tokens is too large and too sparse (at most {MAX_VOCAB_SIZE})"
    return None


def bigram_loss(
    cache: TokenCache,
    sequences: Iterable[PackedSequence],
    *,
    max_train_tokens: int = 100_000_000,
    log: Callable[[str], None] | None = None,
) -> float | None:
    """Nats per predicted token of a bigram model on exactly these sequences and their labels.

    It is fitted on the first `max_train_tokens` of the training split (in the order of seed 0). None, with the reason
    in the log, for a vocabulary that is too large or sequences without a label.
    """
    reason = bigram_unsupported(cache.vocab_size)
    if reason is None:
        counts = _count(cache, max_train_tokens)
        smoothing = _best_smoothing(counts)
        totals = counts.sum(axis=1)
        loss, predicted = 0.0, 0
        for sequence in sequences:
            a, b = _pairs(sequence, sequence.seq_len)
            likelihood = (counts[a, b] + smoothing) / (totals[a] + smoothing * cache.vocab_size)
            loss -= float(np.log(likelihood).sum())
            predicted += len(a)
        if predicted:
            return loss / predicted
        reason = "the sequences have no token to predict"
    if log is not None:
        log(f"no bigram loss: {reason}")
    return None


def _pairs(sequence: PackedSequence, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and their labels in the first rows of a sequence, where there is a label."""
    tokens, labels, _ = sequence.read(np.arange(num_rows))
    predicted = labels >= 0
    return tokens[predicted], labels[predicted]


def _count(cache: TokenCache, max_tokens: int) -> np.ndarray:
    """Training pairs, int64 [vocab_size, vocab_size]: row a, column b counts b after a."""
    vocab_size = cache.vocab_size
    # A chunk is worth a whole table, since each one is counted into a table of its own.
    chunk = max(_CHUNK_TOKENS, vocab_size * vocab_size)
    stream = PackedStream(cache, "train", chunk)
    num_tokens = min(stream.num_tokens, max_tokens)
    counts = np.zeros(vocab_size * vocab_size, np.int64)
    for index in range(-(-num_tokens // chunk)):
        a, b = _pairs(stream.sequence(index), min(chunk, num_tokens - index * chunk))
        counts += np.bincount(a * vocab_size + b, minlength=len(counts))
    return counts.reshape(vocab_size, vocab_size)


def _best_smoothing(counts: np.ndarray) -> float:
    """The α of the grid with the highest leave-one-out likelihood of the counted pairs."""
    a, b = np.nonzero(counts)
    count = counts[a, b].astype(np.float64)
    others = counts.sum(axis=1)[a] - 1.0
    scores = [float((count * np.log((count - 1 + alpha) / (others + alpha * counts.shape[1]))).sum()) for alpha in _SMOOTHINGS]
    return _SMOOTHINGS[int(np.argmax(scores))]
