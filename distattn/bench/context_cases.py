"""Which shapes ``distattn bench context`` measures: LongCA-bench's protocol, and the shapes of our own targets."""

from __future__ import annotations

import re
from dataclasses import dataclass

from distattn.bench.lengths import draw
from distattn.bench.masks import LONGCA_MASKS
from distattn.errors import ConfigError
from distattn.mask import Mask

SEED = 42
LONGCA_HEADS, LONGCA_KV_HEADS = 64, 8
TARGET_HEADS = 16
HEAD_DIM = 128
_WINDOW = re.compile(r"window(\d+)")


@dataclass(frozen=True)
class Case:
    """One shape, batch 1.

    mask: one of LONGCA_MASKS, "windowN" (causal, N keys to the left), or "documents:NAME" (causal documents of these
    lengths); tokens: of all ranks together.
    """

    mask: str
    tokens: int
    heads: int = LONGCA_HEADS
    kv_heads: int = LONGCA_KV_HEADS
    head_dim: int = HEAD_DIM
    seed: int = SEED

    @property
    def name(self) -> str:
        size = f"{self.tokens // 1024}K" if self.tokens % 1024 == 0 else str(self.tokens)
        return f"{self.mask} {size} {self.heads}:{self.kv_heads} D{self.head_dim}"

    @property
    def lengths(self) -> str | None:
        """Whose documents these are, where the mask says so itself."""
        return self.mask.removeprefix("documents:") if self.mask.startswith("documents:") else None

    @property
    def window(self) -> int | None:
        """Keys that a query sees to its left, where the mask is a causal window of our own."""
        found = _WINDOW.fullmatch(self.mask)
        return int(found[1]) if found else None

    def build(self) -> Mask:
        if self.lengths is not None:
            return Mask.documents(draw(self.lengths, self.tokens, self.seed))
        if self.window is not None:
            return Mask.sliding_window(self.tokens, self.window)
        return LONGCA_MASKS[self.mask](self.tokens, self.seed)

    def flops(self, area: int, *, backward: bool) -> float:
        """LongCA-bench's count: 4 · area · heads · head_dim, and 2.5 times that backward."""
        return (10.0 if backward else 4.0) * area * self.heads * self.head_dim


def check_mask(name: str) -> None:
    """ConfigError unless ``Case`` knows the mask."""
    if name not in LONGCA_MASKS and not name.startswith("documents:") and not _WINDOW.fullmatch(name):
        known = ", ".join([*LONGCA_MASKS, "windowN", "documents:NAME"])
        raise ConfigError(f"unknown mask {name!r}: choose from {known}")


def longca_cases(ranks: int, tokens_per_rank: int, masks: list[str] | None = None) -> list[Case]:
    """Every mask, or some, at ``tokens_per_rank`` · ranks tokens."""
    return [Case(mask, ranks * tokens_per_rank) for mask in (masks or list(LONGCA_MASKS))]


def target_cases() -> list[Case]:
    """16 heads of 128: causal at 32K and 128K in all, documents and a window at 128K."""
    shape = (TARGET_HEADS, TARGET_HEADS)
    return [
        Case("causal", 32768, *shape),
        Case("causal", 131072, *shape),
        Case("documents:prolong512k", 131072, *shape),
        Case("window4096", 131072, *shape),
    ]
