"""Plan only, without Megatron: the schedule of a layer from strings, and which rows Megatron gives each rank."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn.errors import ConfigError, InputError, UnsupportedError
from distattn.integrations.megatron_layout import (
    PER_DOCUMENT,
    PER_SEQUENCE,
    host_lengths,
    packed_placement,
    sequence_placement,
    thd_indices,
)
from distattn.integrations.megatron_remat import KeptResults
from distattn.integrations.megatron_schedule import parse_schedule, schedule_of_layer
from distattn.mask import Mask
from distattn.parallel.layout import Layout
from distattn.parallel.schedulers.usp import UspOptions


def as_bytes(lengths: list[int]) -> bytes:
    return np.cumsum([0, *lengths]).astype(np.int64).tobytes()


@pytest.mark.parametrize(
    ("text", "strategy", "options"),
    [
        ("distattn:auto", "auto", None),
        ("distattn:ring", "ring", None),
        ("distattn:usp,head_ranks=4,pieces=2", "usp", UspOptions(head_ranks=4, pieces=2)),
        ("p2p", "ring", None),
        ("a2a", "ulysses", None),
        ("all_gather", "all_gather", None),
        ("a2a+p2p", "usp", UspOptions(head_ranks=2)),
    ],
)
def test_schedules(text: str, strategy: str, options: object) -> None:
    schedule = parse_schedule(text, (2, 4))
    assert (schedule.strategy, schedule.options, schedule.text) == (strategy, options, text)


def test_settings_of_a_layer() -> None:
    schedule = parse_schedule("distattn:double_ring,kernel=triton,remat=keep_out_lse,packed=sequence,loss=reduced")
    assert (schedule.kernel, schedule.remat, schedule.packed, schedule.loss) == (
        "triton",
        "keep_out_lse",
        "sequence",
        "reduced",
    )
    assert parse_schedule("distattn:linear,exchange=all_scan").exchange == "all_scan"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ulysses", "'ulysses' is unknown; it may be distattn:<strategy>"),
        ("distattn:", "names the strategy ''"),
        ("distattn:ring,kernel=", "sets kernel to ''"),
        ("distattn:auto,pieces=2", "belongs to one strategy"),
        ("distattn:linear,exchange=post", "sets exchange to 'post'; it may be auto, serial"),
        ("distattn:linear,pieces=2", "a linear layer takes"),
    ],
)
def test_wrong_schedules(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_schedule(text)


def test_who_names_the_schedule() -> None:
    """The layer's own element of a list; a distattn string before the spec's schedule, that before Megatron's words."""

    def strategy(forwarded: str | None, configured: object, of_spec: str | None) -> str:
        return schedule_of_layer(2, forwarded, configured, of_spec, None).strategy

    assert strategy("p2p", ["a2a", "distattn:ring"], None) == "ring"
    assert strategy("p2p", "p2p", "distattn:ulysses") == "ulysses"
    assert strategy("distattn:ring", "distattn:ring", "distattn:ulysses") == "ring"
    assert strategy("a2a", "a2a", None) == "ulysses"
    assert strategy(None, None, None) == "auto"


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(1, 5))
def test_packed_rows_are_those_of_the_layout(chunks: list[int], num_ranks: int) -> None:
    """What the slicing gives a rank is what layers take it to hold, in that order; every row belongs to one rank."""
    room = [2 * num_ranks * n for n in chunks]
    if not sum(room):
        return
    cu = torch.tensor([0, *np.cumsum(room)], dtype=torch.int32)
    placement = packed_placement(sum(room) // num_ranks, num_ranks, as_bytes(room), None, PER_DOCUMENT)
    rows = [thd_indices(cu, num_ranks, rank) for rank in range(num_ranks)]
    for rank, mine in enumerate(rows):
        assert np.array_equal(placement.layout.rows(rank), mine.numpy())
    assert torch.equal(torch.cat(rows).sort().values, torch.arange(sum(room)))
    assert not placement.padded


def test_only_real_tokens_see_and_are_seen() -> None:
    lengths, room = [3, 0, 5], [8, 4, 8]
    placement = packed_placement(10, 2, as_bytes(lengths), as_bytes(room), PER_DOCUMENT)
    allowed = np.zeros((20, 20), bool)
    for start, n in ((0, 3), (12, 5)):
        allowed[start : start + n, start : start + n] = np.tril(np.ones((n, n), bool))
    assert placement.padded
    assert np.array_equal(placement.mask(causal=True, window=None).dense(), allowed)
    assert np.array_equal(placement.documents, [0, 8, 12, 20])


@pytest.mark.parametrize(("window", "left"), [((4, 0), 4), ((4, -1), 4), ((-1, 0), 31)])
def test_windows(window: tuple[int, int], left: int) -> None:
    """Megatron's do not count the query itself."""
    placement = sequence_placement(16, 2)
    assert placement.mask(causal=True, window=window) == Mask.sliding_window(32, left)
    assert placement.layout.digest == Layout.zigzag(32, 2).digest


def test_placements_are_kept() -> None:
    lengths = as_bytes([4, 12])
    assert packed_placement(8, 2, lengths, None, PER_DOCUMENT) is packed_placement(8, 2, lengths, None, PER_DOCUMENT)
    assert packed_placement(8, 2, lengths, None, PER_DOCUMENT) is not packed_placement(8, 2, lengths, None, PER_SEQUENCE)


def test_lengths_are_read_once_and_again_after_a_change() -> None:
    cu = torch.tensor([[0, 4, 16]], dtype=torch.int32)
    assert host_lengths(cu) == as_bytes([4, 12])
    cu[0, 1] = 8
    assert host_lengths(cu) == as_bytes([8, 8])


def test_rows_that_cannot_be_placed() -> None:
    with pytest.raises(UnsupportedError, match=r"a packed document of 6 rows .*multiple of 4"):
        packed_placement(8, 2, as_bytes([6, 10]), None, PER_DOCUMENT)
    packed_placement(8, 2, as_bytes([6, 10]), None, PER_SEQUENCE)
    with pytest.raises(InputError, match="more than its padded length"):
        packed_placement(8, 2, as_bytes([9, 3]), as_bytes([8, 8]), PER_DOCUMENT)
    with pytest.raises(InputError, match="name the same documents"):
        packed_placement(8, 2, as_bytes([16]), as_bytes([8, 8]), PER_DOCUMENT)
    with pytest.raises(UnsupportedError, match="a packed document of 6 rows"):
        thd_indices(torch.tensor([0, 6]), 2, 0)


def test_kept_results_are_told_apart() -> None:
    """A second pass with other tokens than the first is an error, not a wrong gradient."""
    plan = object()
    kept = KeptResults()
    q = torch.randn(1, 8, 2, 4, generator=torch.Generator().manual_seed(0))
    kept.push(q, plan, q, q[..., 0])  # type: ignore[arg-type]
    out, _ = kept.pop(q + 1e-4 * q, plan)  # type: ignore[arg-type]
    assert out is q
    kept.push(q, plan, q, q[..., 0])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="other tokens than it was kept for"):
        kept.pop(q.flip(1), plan)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="each pass has one backward"):
        kept.pop(q, plan)  # type: ignore[arg-type]
