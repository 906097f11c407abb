"""The bigram loss against a count of pairs in plain Python."""

import json
import math
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from distattn.data import DataConfig, PackedStream, TokenCache, bigram_loss, bigram_unsupported, open_cache
from distattn.data.bigram import _SMOOTHINGS, _best_smoothing, _count


@pytest.fixture
def cache(tmp_path: Path) -> TokenCache:
    rng = np.random.default_rng(0)
    text = ["".join(rng.choice(list("aaabbc d"), size)) for size in rng.integers(1, 400, 60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in text))
    return open_cache(DataConfig(source=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache"), held_out_fraction=0.1))


def training_pairs(cache: TokenCache) -> Counter[tuple[int, int]]:
    pairs: Counter[tuple[int, int]] = Counter()
    for a, b in cache.documents("train"):
        document = cache.tokens[a:b].tolist()
        pairs.update(pairwise(document))
    return pairs


def loss_of(pairs: Counter, held_out: list[tuple[int, int]], smoothing: float) -> float:
    totals: Counter[int] = Counter()
    for (a, _), count in pairs.items():
        totals[a] += count
    return -sum(math.log((pairs[a, b] + smoothing) / (totals[a] + 256 * smoothing)) for a, b in held_out) / len(held_out)


@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_equals_a_count_in_plain_python(cache: TokenCache, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distattn.data.bigram._CHUNK_TOKENS", chunk)
    stream = PackedStream(cache, "held_out", 100)
    sequences = [stream.sequence(index) for index in range(stream.num_sequences or 0)]
    held_out = []
    for sequence in sequences:
        tokens, labels, _ = sequence.read(np.arange(sequence.seq_len))
        held_out += [(a, b) for a, b in zip(tokens.tolist(), labels.tolist(), strict=True) if b >= 0]
    pairs = training_pairs(cache)
    counts = _count(cache, 10**9)
    assert {(a, b): counts[a, b] for a, b in zip(*map(np.ndarray.tolist, np.nonzero(counts)))} == dict(pairs)
    loss = bigram_loss(cache, sequences)
    assert loss == pytest.approx(loss_of(pairs, held_out, _best_smoothing(counts)), rel=1e-12)
    assert loss is not None
    assert 0 < loss < math.log(6), "better than a uniform guess among the letters that occur"


def test_smoothing_is_the_grid_point_with_the_best_leave_one_out_likelihood() -> None:
    counts = np.array([[5, 1, 0], [0, 2, 0], [0, 0, 0]])

    def score(alpha: float) -> float:
        total = 0.0
        for a, b in [(0, 0)] * 5 + [(0, 1)] + [(1, 1)] * 2:
            left = counts.copy()
            left[a, b] -= 1
            total += math.log((left[a, b] + alpha) / (left[a].sum() + alpha * 3))
        return total

    assert _best_smoothing(counts) == max(_SMOOTHINGS, key=score)
    assert _best_smoothing(counts * 1000) < _best_smoothing(np.array([[1, 1, 1]] * 3))


def test_limit_on_the_training_tokens(cache: TokenCache) -> None:
    assert 90 <= _count(cache, 100).sum() <= 100


def test_no_loss_says_why(cache: TokenCache) -> None:
    assert bigram_unsupported(4096) is None
    assert bigram_unsupported(4097) == "a bigram table for 4097 tokens is too large and too sparse (at most 4096)"
    lines: list[str] = []
    assert bigram_loss(cache, [], log=lines.append) is None
    assert lines == ["no bigram loss: the sequences have no token to predict"]
    large = TokenCache(
        "d", "t", 5000, cache.num_documents, cache.num_tokens, 0.1, cache.tokens.astype(np.uint16), cache.offsets
    )
    stream = PackedStream(large, "held_out", 64)
    assert bigram_loss(large, [stream.sequence(0)], log=lines.append) is None
    assert "5000 tokens is too large" in lines[-1]


def test_stdlib_takes_seconds(tmp_path: Path) -> None:
    cache = open_cache(DataConfig(cache_dir=str(tmp_path)))
    stream = PackedStream(cache, "held_out", 8192)
    began = time.perf_counter()
    loss = bigram_loss(cache, [stream.sequence(index) for index in range(min(8, stream.num_sequences or 0))])
    assert time.perf_counter() - began < 20
    assert loss is not None
    assert 1.8 < loss < 3.2
