"""What the benchmarks' command lines share: ``--commit``, and options that are lists, such as ``--lengths 8192,32768``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from distattn.errors import ConfigError

Commit = Annotated[str, typer.Option(help="Commit to record where the checkout is no git repository.")]


def parts(text: str) -> list[str]:
    """What stands between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def names(option: str, text: str, known: Sequence[str]) -> list[str]:
    """Some of the known names, all where none is given; ConfigError lists them."""
    chosen = parts(text) or list(known)
    for name in chosen:
        if name not in known:
            raise ConfigError(f"--{option} has {name!r}; it may have {', '.join(known)}")
    return chosen


def positive_integers(option: str, text: str) -> list[int]:
    """Raises ConfigError for anything else."""
    for part in parts(text):
        if not part.isdecimal() or not int(part):
            raise ConfigError(f"--{option} has {part!r}; it takes positive integers, comma-separated")
    return [int(part) for part in parts(text)]


def head_pairs(option: str, text: str) -> list[tuple[int, int]]:
    """(query heads, KV heads), from text such as 64:8,16:16; raises ConfigError for anything else."""
    pairs = []
    for part in parts(text):
        heads, colon, kv_heads = part.partition(":")
        numbers = colon and heads.isdecimal() and kv_heads.isdecimal() and int(kv_heads)
        if not numbers or not int(heads) or int(heads) % int(kv_heads):
            raise ConfigError(f"--{option} has {part!r}; it takes pairs such as 64:8, the first a multiple of the second")
        pairs.append((int(heads), int(kv_heads)))
    return pairs
