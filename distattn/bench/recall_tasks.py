"""Sequences whose right continuation lies somewhere before: associative recall, a passkey, a grammar with gaps.

associative  k1 v1 k2 v2 … kN vN  ~ k7 v7 ~ ~ ~ k2 v2 ~     after a key for the second time comes its value again
update       k1 v1 k2 v2 … k1 v9 … ~ k1 v9 ~ ~ ~ k2 v2 ~    some keys are bound anew: the last value counts
passkey      ~ ~ ~ ! 4 1 7 ~ ~ ~ ~ ~ ~ ~ ~ ~ ~ ! 4 1 7      after the marker for the second time come the digits again
grammar      c a # b # d d # a b b c # a …                  each symbol follows from the two before it, not counting # x

Pure functions of a seed: no files, no global state. Each gives tokens, the target of every scored position, and how far behind
that position the tokens lie that decide it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

from distattn.errors import ConfigError

IGNORED = -100
"""Target of positions that are not scored: the decoder's label for nothing to predict."""


@dataclass(frozen=True)
class Examples:
    """Sequences of one task.

    tokens [B, T] int64. targets [B, T] int64: the token that must come next where a position is scored, ``IGNORED``
    elsewhere. distances [B, T] int64: tokens from a scored position back to the farthest token that its target follows from,
    0 elsewhere.
    """

    tokens: np.ndarray
    targets: np.ndarray
    distances: np.ndarray

    @property
    def scored(self) -> np.ndarray:
        """[B, T] bool: which positions have a target."""
        return self.targets != IGNORED


@dataclass(frozen=True)
class Associative:
    """Multi-query associative recall (MQAR; Arora et al., Zoology, arXiv 2312.04927), with keys that change their value.

    The sequence (seq_len: T) begins with num_pairs different keys, each with a value. num_updates further pairs bind keys
    among these, drawn with replacement, to other values (Schlag et al., arXiv 2102.11174, section 6.1, setting 2); with 0 it
    is plain MQAR. Then every key is asked for once, and its last value is right. num_keys, num_values: how many there are to
    draw from; neither shares a token with the other or with the noise of num_noise tokens that fills what is left. Queries lie
    in uniformly drawn places, where Zoology draws small distances more often: here every distance is to be measured. Raises
    ConfigError where the pairs and their queries do not fit.
    """

    seq_len: int = 64
    num_pairs: int = 16
    num_updates: int = 0
    num_keys: int = 32
    num_values: int = 32
    num_noise: int = 16

    def __post_init__(self) -> None:
        _positive(self, "seq_len", "num_pairs", "num_keys", "num_values", "num_noise")
        if self.num_updates < 0 or (self.num_updates and self.num_values < 2):
            raise ConfigError(
                f"num_updates is {self.num_updates} with num_values = {self.num_values}, but it must be at least 0, and an "
                "update needs another value to change to."
            )
        if self._written + 2 * self.num_pairs > self.seq_len:
            raise ConfigError(
                f"seq_len is {self.seq_len}, but {self.num_pairs} pairs, their queries and {self.num_updates} updates take "
                f"{self._written + 2 * self.num_pairs} tokens: two each."
            )
        if self.num_pairs > self.num_keys:
            raise ConfigError(f"num_pairs is {self.num_pairs}, but it must be at most num_keys = {self.num_keys}.")

    @property
    def vocab_size(self) -> int:
        return self.num_keys + self.num_values + self.num_noise

    @property
    def _written(self) -> int:
        """Tokens of pairs before the first query."""
        return 2 * (self.num_pairs + self.num_updates)

    def sample(self, num_sequences: int, seed: int) -> Examples:
        """B sequences; the same for the same arguments."""
        rng = np.random.default_rng(seed)
        shape, pairs, written = (num_sequences, self.seq_len), self.num_pairs, self._written
        rows = np.arange(num_sequences)[:, None]
        tokens = rng.integers(self.num_keys + self.num_values, self.vocab_size, shape)
        targets, distances = np.full(shape, IGNORED), np.zeros(shape, dtype=np.int64)
        keys = _choose(rng, num_sequences, self.num_keys, pairs)
        values = rng.integers(0, self.num_values, (num_sequences, pairs))
        stands = np.tile(2 * np.arange(pairs), (num_sequences, 1))  # where each key was bound last
        tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, self.num_keys + values
        for place in range(2 * pairs, written, 2):
            which = rng.integers(0, pairs, num_sequences)[:, None]
            values[rows, which] += rng.integers(1, self.num_values, (num_sequences, 1))
            values[rows, which] %= self.num_values
            stands[rows, which] = place
            tokens[:, [place]], tokens[:, [place + 1]] = keys[rows, which], self.num_keys + values[rows, which]
        # Places of two tokens each; the order of the draw says which key is asked for in which.
        places = written + 2 * _choose(rng, num_sequences, (self.seq_len - written) // 2, pairs)
        tokens[rows, places], tokens[rows, places + 1] = keys, self.num_keys + values
        targets[rows, places] = self.num_keys + values
        distances[rows, places] = places - stands
        return Examples(tokens, targets, distances)


@dataclass(frozen=True)
class Passkey:
    """Passkey retrieval (Mohtashami and Jaggi, arXiv 2305.16300): digits hidden in noise, asked for at the end.

    A marker and num_digits digits (of num_symbols) stand at a uniformly drawn depth; the sequence ends with the marker and
    the digits again, each of which is scored. Noise is drawn from num_noise other tokens. Raises ConfigError where they do not
    fit.
    """

    seq_len: int = 128
    num_digits: int = 4
    num_symbols: int = 10
    num_noise: int = 16

    def __post_init__(self) -> None:
        _positive(self)
        if 2 * (self.num_digits + 1) > self.seq_len:
            raise ConfigError(
                f"num_digits is {self.num_digits}, but seq_len {self.seq_len} holds at most {self.seq_len // 2 - 1}: the "
                "marker and the digits stand there twice."
            )

    @property
    def vocab_size(self) -> int:
        return 1 + self.num_symbols + self.num_noise

    def sample(self, num_sequences: int, seed: int) -> Examples:
        """B sequences; the same for the same arguments."""
        rng = np.random.default_rng(seed)
        shape, length = (num_sequences, self.seq_len), self.num_digits + 1
        tokens = rng.integers(1 + self.num_symbols, self.vocab_size, shape)
        targets, distances = np.full(shape, IGNORED), np.zeros(shape, dtype=np.int64)
        key = np.zeros((num_sequences, length), dtype=np.int64)
        key[:, 1:] = 1 + rng.integers(0, self.num_symbols, (num_sequences, self.num_digits))
        start = rng.integers(0, self.seq_len - 2 * length + 1, (num_sequences, 1))
        tokens[np.arange(num_sequences)[:, None], start + np.arange(length)] = key
        tokens[:, -length:] = key
        targets[:, -length:-1] = key[:, 1:]
        distances[:, -length:-1] = self.seq_len - length - start - 1  # to the digit itself, one behind the same place
        return Examples(tokens, targets, distances)


@dataclass(frozen=True)
class Grammar:
    """A grammar with irregular gaps, after SelectivBench (Bouhadjar et al., arXiv 2601.12598).

    The next symbol is a function of the last two: f(a, b), for each b a permutation over a, drawn once from language_seed.
    Before a symbol a gap may open (gap_share of the places): 1 to max_gap distractors, few more often than many (log-uniform).
    A distractor is the mark # and a symbol of the same alphabet that breaks the rule: only context tells it from a symbol that
    counts. Scored is every position after which a symbol comes that counts. Two symbols are needed before the first.
    SelectivBench has grammars of chosen complexity and measures generalisation too; this is the part that asks for
    selectivity.
    """

    seq_len: int = 128
    num_symbols: int = 8
    max_gap: int = 24
    gap_share: float = 0.3
    language_seed: int = 0

    def __post_init__(self) -> None:
        _positive(self, "seq_len", "num_symbols", "max_gap")
        if self.num_symbols < 2:
            raise ConfigError("num_symbols is 1, but it must be at least 2: a distractor is another symbol than the right one.")
        if not 0 <= self.gap_share <= 1:
            raise ConfigError(f"gap_share is {self.gap_share}, but it must be between 0 and 1.")

    @property
    def vocab_size(self) -> int:
        return self.num_symbols + 1

    def rules(self) -> np.ndarray:
        """[num_symbols, num_symbols] int64: the symbol after (a, b)."""
        rng = np.random.default_rng(self.language_seed)
        return np.stack([rng.permutation(self.num_symbols) for _ in range(self.num_symbols)], axis=1)

    def sample(self, num_sequences: int, seed: int) -> Examples:
        """B sequences; the same for the same arguments."""
        rng = np.random.default_rng(seed)
        rules = self.rules()
        found = [self._sequence(rng, rules) for _ in range(num_sequences)]
        return Examples(*(np.stack(parts) for parts in zip(*found, strict=True)))

    def _sequence(self, rng: np.random.Generator, rules: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens = [int(token) for token in rng.integers(0, self.num_symbols, 2)]
        targets, distances = [IGNORED], [0]
        (a, b), place_of_a, place_of_b = tokens, 0, 1
        while len(tokens) < self.seq_len + 1:
            following = int(rules[a, b])
            if rng.random() < self.gap_share:
                for _ in range(int(np.exp(rng.uniform(0, np.log(self.max_gap + 1))))):
                    wrong = (following + int(rng.integers(1, self.num_symbols))) % self.num_symbols
                    tokens += [self.num_symbols, wrong]
                    targets += [IGNORED, IGNORED]
                    distances += [0, 0]
            targets.append(following)
            distances.append(len(tokens) - 1 - place_of_a)
            a, b, place_of_a, place_of_b = b, following, place_of_b, len(tokens)
            tokens.append(following)
        cut = slice(self.seq_len)
        return np.array(tokens[cut]), np.array(targets[cut]), np.array(distances[cut])


Task = Associative | Passkey | Grammar


def scaled(task: Task, fraction: float) -> Task:
    """The task at a share of its length, and of its pairs where it has some; the rest, and so the vocabulary, is the same.

    Raises ConfigError where the shorter sequence cannot hold the task.
    """
    length = int(task.seq_len * fraction)
    if isinstance(task, Associative):
        return replace(
            task, seq_len=length, num_pairs=max(int(task.num_pairs * fraction), 1), num_updates=int(task.num_updates * fraction)
        )
    return replace(task, seq_len=length)


def _choose(rng: np.random.Generator, num_rows: int, num_choices: int, count: int) -> np.ndarray:
    """[num_rows, count]: in each row different numbers below num_choices, in random order."""
    return rng.random((num_rows, num_choices)).argsort(axis=1)[:, :count]


def _positive(task: Task, *names: str) -> None:
    for name in names or [field.name for field in fields(task)]:
        if getattr(task, name) < 1:
            raise ConfigError(f"{name} is {getattr(task, name)}, but it must be at least 1.")


TASKS: dict[str, Task] = {
    "associative": Associative(),
    "update": Associative(num_pairs=8, num_updates=12),
    "passkey": Passkey(),
    "grammar": Grammar(),
}
