"""Sequences against a brute-force stream built one token at a time."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn.data import IGNORED_LABEL, DataConfig, PackedSequence, PackedStream, TokenCache, open_cache
from distattn.data.shuffle import shuffled
from distattn.errors import DataError, InputError


def cache_of(lengths: list[int], fraction: float = 0.1, tokens: np.ndarray | None = None) -> TokenCache:
    """A cache in memory whose token at address t is t."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    total = int(offsets[-1])
    stored = np.arange(total, dtype=np.uint32) if tokens is None else tokens
    return TokenCache("d", "t", total, len(lengths), total, fraction, stored, offsets)


def whole(sequence: PackedSequence) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return sequence.read(np.arange(sequence.seq_len))


def brute_force(documents: list[list[int]], seq_len: int) -> list[tuple[list[int], list[int], list[int], list[int]]]:
    """Tokens, labels, positions and lengths of the full sequences of documents laid end to end, token by token."""
    stream = [(d, i) for d, document in enumerate(documents) for i in range(len(document))]
    sequences = []
    for first in range(0, len(stream) - seq_len + 1, seq_len):
        tokens, labels, positions, lengths = [], [], [], []
        for n, (d, i) in enumerate(stream[first : first + seq_len]):
            fresh = n == 0 or i == 0
            positions.append(0 if fresh else positions[-1] + 1)
            lengths = [*lengths, 1] if fresh else [*lengths[:-1], lengths[-1] + 1]
            tokens.append(documents[d][i])
            labels.append(documents[d][i + 1] if i + 1 < len(documents[d]) else IGNORED_LABEL)
        sequences.append((tokens, labels, positions, lengths))
    return sequences


lengths_of_documents = st.lists(st.integers(1, 12), min_size=2, max_size=12)


@settings(max_examples=150, deadline=None)
@given(lengths_of_documents, st.integers(1, 40), st.integers(-5, 2**64), st.sampled_from(["train", "held_out"]))
def test_sequences_equal_the_brute_force_stream(lengths: list[int], seq_len: int, seed: int, split: str) -> None:
    cache = cache_of(lengths)
    stream = PackedStream(cache, split, seq_len, seed)  # pyright: ignore[reportArgumentType]
    documents = [list(range(a, b)) for a, b in cache.documents(split)]  # pyright: ignore[reportArgumentType]
    round_length = max(1, stream.num_tokens // seq_len)
    if split == "train":
        epochs = -(-2 * round_length * seq_len // stream.num_tokens)
        documents = [documents[d] for epoch in range(epochs) for d in shuffled(len(documents), seed, epoch)]
    elif stream.num_tokens < seq_len:
        assert stream.num_sequences == 1
        seq_len = stream.num_tokens
    expected = brute_force(documents, seq_len)
    if split == "held_out":
        assert stream.num_sequences == len(expected)
    for index in range(2 * round_length if split == "train" else len(expected)):
        tokens, labels, positions, piece_lengths = expected[stream.place(index)]
        sequence = stream.sequence(index)
        assert sequence.seq_len == seq_len == sequence.lengths.sum()
        assert sequence.lengths.dtype == np.int64
        assert sequence.lengths.tolist() == piece_lengths
        got = whole(sequence)
        assert [array.dtype for array in got] == [np.int64] * 3
        assert [array.tolist() for array in got] == [tokens, labels, positions]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 9))
def test_each_round_takes_every_sequence_of_the_stream_once(documents: int, seq_len: int, seed: int) -> None:
    stream = PackedStream(cache_of([7] * (documents + 2)), "train", seq_len, seed)
    length = max(1, stream.num_tokens // seq_len)
    for first in (0, length, 5 * length):
        assert sorted(stream.place(first + i) for i in range(length)) == list(range(first, first + length))
    assert [PackedStream(cache_of([7] * 30), "held_out", 7, seed).place(i) for i in range(3)] == [0, 1, 2]


def test_a_giant_document_does_not_fill_many_sequences_in_a_row() -> None:
    """Neighbours in training come from all over the text, not from one long document."""
    stream = PackedStream(cache_of([10] * 100 + [1000] + [10] * 100), "train", 10, seed=0)
    giant = [int(stream.sequence(i).lengths.max()) == 10 and stream.sequence(i).pieces[0, 2] == 2000 for i in range(250)]
    longest = max(len(run) for run in "".join("g" if g else "." for g in giant).split("."))
    assert longest <= 15, "100 in a row where the order is the stream's"


@settings(max_examples=60, deadline=None)
@given(lengths_of_documents, st.integers(1, 30), st.integers(0, 9), st.lists(st.integers(0, 60), min_size=1, max_size=8))
def test_any_order_of_access_gives_the_same_sequences(lengths: list[int], seq_len: int, seed: int, jumps: list[int]) -> None:
    cache = cache_of(lengths)
    stream = PackedStream(cache, "train", seq_len, seed)
    sequential = [stream.sequence(index) for index in range(max(jumps) + 1)]
    jumping = PackedStream(cache, "train", seq_len, seed)
    for index in jumps:
        assert np.array_equal(jumping.sequence(index).pieces, sequential[index].pieces)
        resumed = PackedStream(cache, "train", seq_len, seed).sequence(index)
        assert np.array_equal(resumed.pieces, sequential[index].pieces)


def test_each_epoch_holds_every_training_token_once_in_another_order() -> None:
    cache = cache_of([5] * 40)
    stream = PackedStream(cache, "train", 20, seed=3)
    per_epoch = stream.num_tokens // 20
    epochs = [np.concatenate([whole(stream.sequence(e * per_epoch + i))[0] for i in range(per_epoch)]) for e in range(3)]
    expected = np.concatenate([np.arange(a, b) for a, b in cache.documents("train")])
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), expected)
    assert all(not np.array_equal(a, b) for a, b in pairwise(epochs))
    other = PackedStream(cache, "train", 20, seed=4)
    assert not np.array_equal(whole(other.sequence(0))[0], whole(stream.sequence(0))[0])


def test_training_never_reads_what_is_held_out() -> None:
    cache = cache_of([100], fraction=0.2)
    train = whole(PackedStream(cache, "train", 80).sequence(0))
    assert train[0].tolist() == list(range(80))
    assert train[1].tolist() == [*range(1, 80), IGNORED_LABEL], "the next token is held out and no label"
    assert whole(PackedStream(cache, "held_out", 20).sequence(0))[0].tolist() == list(range(80, 100))


def test_held_out_pass_does_not_depend_on_the_seed_and_drops_the_part_that_fills_no_sequence() -> None:
    cache = cache_of([7] * 30, fraction=0.3)
    streams = [PackedStream(cache, "held_out", 20, seed) for seed in (0, 1)]
    assert streams[0].num_tokens == 63
    assert streams[0].num_sequences == 3
    for index in range(3):
        assert np.array_equal(streams[0].sequence(index).pieces, streams[1].sequence(index).pieces)
    with pytest.raises(IndexError, match="sequence 3 does not exist: held_out has 3"):
        streams[0].sequence(3)
    assert PackedStream(cache, "train", 20).num_sequences is None


def test_held_out_text_shorter_than_a_sequence_is_one_short_sequence() -> None:
    stream = PackedStream(cache_of([7] * 30, fraction=0.1), "held_out", 1000)
    assert stream.num_sequences == 1
    assert stream.sequence(0).seq_len == stream.num_tokens == 21


class Recorder:
    """An array that remembers the addresses that were read."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.addresses: set[int] = set()

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        assert isinstance(index, np.ndarray), "no slice of the cache is ever taken"
        self.addresses |= set(index.tolist())
        return self.array[index]


def test_only_the_needed_rows_are_read() -> None:
    recorder = Recorder(np.arange(600, dtype=np.uint16))
    cache = cache_of([50] * 12, tokens=recorder)  # pyright: ignore[reportArgumentType]
    sequence = PackedStream(cache, "train", 200).sequence(1)
    assert recorder.addresses == set(), "lengths come from the offsets alone"
    rows = np.array([150, 3, 199, 60])
    tokens, labels, positions = sequence.read(rows)
    assert recorder.addresses == set(tokens.tolist()) | set(labels[labels >= 0].tolist())
    everything = whole(sequence)
    assert [a.tolist() for a in (tokens, labels, positions)] == [a[rows].tolist() for a in everything]


def test_no_rows_and_rows_that_do_not_exist() -> None:
    sequence = PackedStream(cache_of([10] * 4), "train", 16).sequence(0)
    assert [array.shape for array in sequence.read(np.zeros(0, np.int64))] == [(0,)] * 3
    for row in (-1, 16):
        with pytest.raises(InputError, match=r"rows must lie in \[0, 16\), the sequence's length: got"):
            sequence.read(np.array([0, row]))


def test_bad_arguments() -> None:
    cache = cache_of([10] * 4)
    with pytest.raises(DataError, match="split='test' is unknown: give 'train' or 'held_out'"):
        PackedStream(cache, "test", 8)  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match=r"data\.seq_len=0 is not a length"):
        PackedStream(cache, "train", 0)
    with pytest.raises(IndexError):
        PackedStream(cache, "train", 8).sequence(-1)


def test_shuffle_is_a_permutation_that_no_version_of_numpy_changes() -> None:
    assert shuffled(0, 1).tolist() == []
    assert sorted(shuffled(1000, 5, 7).tolist()) == list(range(1000))
    assert len({tuple(shuffled(20, *key).tolist()) for key in [(), (0,), (0, 0), (0, 1), (1, 0), (-1,), (1, 1)]}) == 7
    assert shuffled(10, 1, 2).tolist() == PINNED


PINNED = [5, 2, 8, 6, 9, 0, 3, 1, 7, 4]


def test_on_a_real_cache_bytes_come_back(tmp_path: Path) -> None:
    for name in "abcdef":
        (tmp_path / f"{name}.txt").write_text(name * 30)
    cache = open_cache(DataConfig(source=str(tmp_path / "*.txt"), cache_dir=str(tmp_path / "cache")))
    sequence = PackedStream(cache, "train", 64, seed=1).sequence(0)
    tokens, labels, _ = whole(sequence)
    text = bytes(tokens.tolist()).decode()
    ends = np.cumsum(sequence.lengths)
    assert [len(set(text[end - n : end])) for n, end in zip(sequence.lengths, ends, strict=True)] == [1] * len(ends)
    ended = [end - 1 for n, end in zip(sequence.lengths, ends, strict=True) if end < 64 or n == 30]
    assert np.flatnonzero(labels == IGNORED_LABEL).tolist() == ended
