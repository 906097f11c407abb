"""``cp_comm_type`` as the schedule of a layer: ``distattn:<strategy>[,key=value…]``, or one of Megatron's own words.

distattn:auto                                  the strategy with the least predicted time
distattn:usp,head_ranks=4,kernel=triton        a strategy with its options, and what belongs to the layer
p2p, all_gather, a2a, a2a+p2p                  Megatron's: ring, all_gather, ulysses, usp
distattn:linear,exchange=all_scan              for layers of linear attention
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distattn.errors import ConfigError, UnsupportedError
from distattn.integrations.megatron_layout import PER_DOCUMENT, PER_SEQUENCE
from distattn.parallel.exchanges import EXCHANGES
from distattn.parallel.schedulers import SCHEDULERS
from distattn.parallel.schedulers.options import parse_options
from distattn.parallel.schedulers.usp import UspOptions

PREFIX = "distattn:"
ALIASES = {"p2p": "ring", "all_gather": "all_gather", "allgather": "all_gather", "a2a": "ulysses"}
HIERARCHICAL = "a2a+p2p"
LINEAR = "linear"

KEEP, RECOMPUTE, AUTO = "keep_out_lse", "recompute", "auto"

# Settings of a layer, beside those of its strategy: the words that each may be, or None for any.
_SETTINGS: dict[str, tuple[str, ...] | None] = {
    "kernel": None,
    "remat": (AUTO, KEEP, RECOMPUTE),
    "packed": (PER_DOCUMENT, PER_SEQUENCE),
    "loss": ("per_token", "reduced"),
    "exchange": (AUTO, *EXCHANGES),
}


@dataclass(frozen=True)
class Schedule:
    """How one layer runs.

    strategy: a scheduler, ``auto`` or ``linear``; options: that scheduler's, or None for its default. kernel: a backend or
    ``auto``. remat: what an activation checkpoint around the layer does with the attention in it. packed: what was cut in
    zigzag where documents are packed: each ``document``, or the whole ``sequence``; None where it follows from Megatron.
    loss: ``reduced`` where the loss function sums over context ranks by itself. exchange: of a linear layer. text: as given.
    """

    text: str
    strategy: str
    options: Any = None
    kernel: str = AUTO
    remat: str = AUTO
    packed: str | None = None
    loss: str = "per_token"
    exchange: str = AUTO


def parse_schedule(text: str, hierarchy: Sequence[int] | None = None) -> Schedule:
    """The schedule that a string names. hierarchy: ``--hierarchical-context-parallel-sizes``, for ``a2a+p2p``.

    Raises ConfigError listing what is allowed, or UnsupportedError for ``a2a+p2p`` without sizes.
    """
    if text == HIERARCHICAL:
        return _hierarchical(hierarchy)
    if text in ALIASES:
        return Schedule(text, ALIASES[text])
    strategies = ", ".join(["auto", *SCHEDULERS, LINEAR])
    if not text.startswith(PREFIX):
        words = ", ".join([*ALIASES, HIERARCHICAL])
        raise ConfigError(
            f"cp_comm_type {text!r} is unknown; it may be distattn:<strategy>[,key=value…] with one of {strategies}, or one of "
            f"Megatron's {words}"
        )
    strategy, *settings = text.removeprefix(PREFIX).split(",")
    if strategy not in ("auto", LINEAR, *SCHEDULERS):
        raise ConfigError(f"cp_comm_type {text!r} names the strategy {strategy!r}; it may be {strategies}")
    values: dict[str, str] = {}
    others: list[str] = []
    for setting in settings:
        key, _, value = setting.partition("=")
        if key in _SETTINGS:
            values[key] = _checked(text, key, value)
        else:
            others.append(setting)
    if others and strategy == LINEAR:
        raise ConfigError(f"cp_comm_type {text!r} sets {others[0]!r}; a linear layer takes exchange=… and kernel=… only")
    return Schedule(text, strategy, parse_options(strategy, others) if others else None, **values)


def _checked(text: str, key: str, value: str) -> str:
    allowed = _SETTINGS[key]
    if not value or (allowed is not None and value not in allowed):
        words = "the name of a kernel, or auto" if allowed is None else ", ".join(allowed)
        raise ConfigError(f"cp_comm_type {text!r} sets {key} to {value!r}; it may be {words}")
    return value


def _hierarchical(hierarchy: Sequence[int] | None) -> Schedule:
    if not hierarchy or len(hierarchy) != 2:
        raise UnsupportedError(
            HIERARCHICAL,
            "distattn",
            f"it needs the sizes of both levels, and hierarchical_context_parallel_sizes is {hierarchy}",
            "pass --hierarchical-context-parallel-sizes HEADS SEQUENCE, or use distattn:usp,head_ranks=HEADS",
        )
    return Schedule(HIERARCHICAL, "usp", UspOptions(head_ranks=hierarchy[0]))


def schedule_of_layer(
    layer_number: int, forwarded: str | None, configured: Any, of_spec: str | None, hierarchy: Sequence[int] | None
) -> Schedule:
    """The schedule of a layer (numbered from 1) from everything that may say so.

    forwarded, configured: ``cp_comm_type`` as the layer received it and as the config has it; a list is read here, by the
    layer's own number, since releases differ in how they index it. of_spec: the schedule in the layer's spec, which yields
    only to a ``distattn:`` string: Megatron's own default is ``p2p`` in every run.
    """
    named = forwarded
    if isinstance(configured, list):
        # Layers behind the last, of multi-token prediction, run as the last one does.
        named = configured[min(layer_number, len(configured)) - 1]
    if named is not None and (of_spec is None or named.startswith(PREFIX)):
        return parse_schedule(named, hierarchy)
    return parse_schedule(of_spec or f"{PREFIX}{AUTO}", hierarchy)
