"""Plan only: draws of document lengths."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from distattn.bench.lengths import DISTRIBUTIONS, Histogram, draw, find_lengths
from distattn.errors import ConfigError


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("total", [1, 100, 8192, 1 << 20])
def test_draws_fill_the_sequence_and_repeat(name: str, total: int) -> None:
    lengths = draw(name, total, seed=3)
    assert sum(lengths) == total
    assert min(lengths) >= 1
    assert lengths == draw(name, total, seed=3)
    if total > 100:
        assert lengths != draw(name, total, seed=4)


@pytest.mark.parametrize(
    ("name", "median", "ninetieth"),
    [("pile", 288, 1792), ("prolong64k", 384, 1504), ("prolong512k", 352, 1344), ("wlb", 3227, 5784), ("prolong", 1913, 6051)],
)
def test_quantiles_are_those_of_the_source(name: str, median: int, ninetieth: int) -> None:
    found = np.quantile(find_lengths(name).sample(np.random.default_rng(0), 200_000), [0.5, 0.9])
    assert found == pytest.approx([median, ninetieth], rel=0.35)


def test_tails_hold_most_tokens() -> None:
    found = find_lengths("prolong512k").sample(np.random.default_rng(0), 200_000)
    assert found[found > 10912].sum() / found.sum() == pytest.approx(0.75, abs=0.05)


def test_a_histogram_of_the_users(tmp_path: Path) -> None:
    path = tmp_path / "histogram.json"
    path.write_text(json.dumps({"[1,4)": 0.0, "[10,20)": 3.0, "[100,110)": 1.0}))
    drawn = np.array(draw(f"@{path}", 50_000, seed=0))[:-1]
    assert ((drawn >= 10) & (drawn <= 20) | (drawn >= 100) & (drawn <= 110)).all()
    assert (drawn <= 20).mean() == pytest.approx(0.75, abs=0.05)
    assert find_lengths(f"@{path}") == Histogram(((1, 4, 0.0), (10, 20, 3.0), (100, 110, 1.0)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "is no histogram"),
        ('{"[1,x)": 1}', "is no histogram"),
        ('{"[5,4)": 1}', "needs 0 ≤ first ≤ last"),
        ('{"[1,2)": 0}', "has no bin of positive weight"),
    ],
)
def test_bad_histograms_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        draw(f"@{path}", 10, seed=0)


def test_unknown_names_and_empty_sequences_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown document lengths 'web': choose one of pile"):
        draw("web", 10, seed=0)
    with pytest.raises(ConfigError, match="cannot be read"):
        draw(f"@{tmp_path / 'none.json'}", 10, seed=0)
    with pytest.raises(ConfigError, match="must be at least 1"):
        draw("pile", 0, seed=0)
