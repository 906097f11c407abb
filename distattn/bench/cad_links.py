"""``distattn bench cad-links``: what of a step waits for transfers at a given link rate, simulated, one nano-batch and two.

For each mix of ``distattn bench disaggregation`` and number of ranks, every rank a node of its own: the share of a step of the
8B shape that waits where all attention is disaggregated, where what distattn chooses by itself is taken, and how far ping-pong
brings it down. Kernel rates are those that came with distattn, linear layers run at the attention kernel's rate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from distattn.bench.disaggregation_cases import MIXES, SHAPES, linear_work, make_lengths
from distattn.bench.options import Commit, names, positive_integers
from distattn.bench.record import Record, environment
from distattn.errors import ConfigError
from distattn.kernels.selection import shipped_rates
from distattn.mask import Mask
from distattn.parallel import kernel_time
from distattn.parallel.backward import derive_backward
from distattn.parallel.disaggregation.halves import arrange, first_mask, own_mask, second_half
from distattn.parallel.disaggregation.ticks import Half, alone_seconds, turns_seconds
from distattn.parallel.hardware import HARDWARE, Hardware
from distattn.parallel.layout import Layout
from distattn.parallel.program import Program
from distattn.parallel.schedulers import find_scheduler
from distattn.parallel.schedulers.auto import choose_layout, choose_strategy
from distattn.parallel.schedulers.disaggregated import DisaggregatedOptions
from distattn.parallel.simulate import predict

LAYERS = 32
_FREE = 1e9
"""GB/s at which transfers take no time: what a step takes beyond that is exposed."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    json_path: Annotated[Path, typer.Option("--json", help="Results; cells found there are not simulated again.")],
    ranks: Annotated[str, typer.Option(help="Ranks, comma-separated.")] = "2,8,32",
    tokens: Annotated[str, typer.Option(help="Tokens a rank, comma-separated.")] = "65536,131072",
    mixes: Annotated[str, typer.Option(help="Mixes of document lengths (default: all).")] = "",
    gb_per_second: Annotated[float, typer.Option(help="Between any two ranks, each direction.")] = 50.0,
    commit: Commit = "",
) -> None:
    """Simulate the transfers that nothing hides."""
    if not gb_per_second > 0:
        raise ConfigError(f"--gb-per-second must be positive, got {gb_per_second}")
    about = {"simulated": True, "gb_per_second": gb_per_second, "layers": LAYERS}
    record = Record(json_path, environment(commit), about)
    for mix in names("mixes", mixes, MIXES):
        for size in positive_integers("tokens", tokens):
            for count in positive_integers("ranks", ranks):
                key = f"{mix}|{size}|{count}|{gb_per_second:g}"
                if key not in record:
                    record.add(key, simulate(make_lengths(mix, count, size), count, gb_per_second))
    print(table(record.results))


@dataclass(frozen=True)
class Way:
    """A step: its seconds with links of the given rate and with free ones."""

    seconds: float
    free_seconds: float

    @property
    def exposed(self) -> float:
        """Seconds of it that wait for transfers."""
        return self.seconds - self.free_seconds


def simulate(lengths: list[int], ranks: int, gb_per_second: float) -> dict[str, float]:
    """Seconds of a step and their exposed part: disaggregated in one nano-batch and in two, and the choice among them and
    other schedules."""
    slow, free = (_hardware(rate) for rate in (gb_per_second, _FREE))
    mask = Mask.documents(lengths)
    contiguous = Layout.contiguous(mask.num_queries, ranks)
    found = {
        "contiguous": Way(*(_alone(_disaggregated(mask, contiguous), mask, x) for x in (slow, free))),
        "one": Way(*(_alone(_disaggregated(mask, _home(mask, ranks)), mask, x) for x in (slow, free))),
        "two": Way(*_in_turns(mask, ranks, (slow, free))),
    }
    chosen = choose_strategy(mask, ranks, _SHAPE.num_heads, _SHAPE.num_kv_heads, head_dim=_SHAPE.head_dim, hardware=slow)
    found["other"] = Way(*(_alone(chosen.program, mask, x) for x in (slow, free)))
    best = min(("other", "one", "two"), key=lambda name: found[name].seconds)
    cell = {f"{name}_seconds": way.seconds for name, way in found.items()}
    cell |= {f"{name}_exposed_seconds": way.exposed for name, way in found.items()}
    return cell | {"best_seconds": found[best].seconds, "best_exposed_seconds": found[best].exposed}


_SHAPE = SHAPES["8b"]


def _hardware(gb_per_second: float) -> Hardware:
    """An H200 that is a node of its own."""
    rates = {"between_gb_per_second": gb_per_second, "between_latency_us": 20.0 if gb_per_second < _FREE else 0.0}
    return replace(HARDWARE["h200"], ranks_per_node=1, copy_gb_per_second=4300.0, **rates)


def _prices(mask: Mask) -> tuple[kernel_time.Price | None, ...]:
    """Of attention under this mask by the shipped rates, forward and backward: alike for every way to share it."""
    rated = replace(HARDWARE["h200"], kernels=shipped_rates().kernels)
    group = _SHAPE.num_heads // _SHAPE.num_kv_heads
    return tuple(
        kernel_time.price(mask, rated, _SHAPE.num_heads, _SHAPE.head_dim, backward=back, group=group) for back in (False, True)
    )


def _home(mask: Mask, ranks: int) -> Layout:
    sizes = {"heads": _SHAPE.num_heads, "kv_heads": _SHAPE.num_kv_heads}
    return choose_layout(mask, ranks, "disaggregated", **sizes).layout


def _disaggregated(mask: Mask, layout: Layout) -> Program:
    sizes = _SHAPE.num_heads, _SHAPE.num_kv_heads
    return find_scheduler("disaggregated").plan(mask, layout, *sizes, DisaggregatedOptions())


def _half(program: Program, mask: Mask, hardware: Hardware, rows: np.ndarray, joined: np.ndarray) -> Half:
    programs = program, derive_backward(program, ranks_per_node=1)
    forward, backward = (
        predict(direction, mask, hardware, _SHAPE.head_dim, price=price)
        for direction, price in zip(programs, _prices(mask), strict=True)
    )
    return Half(programs, (forward, backward), rows, joined)


def _alone(program: Program, mask: Mask, hardware: Hardware) -> float:
    rows = program.layout.counts
    return alone_seconds(_half(program, mask, hardware, rows, 0 * rows), linear_work(_SHAPE), LAYERS)


def _in_turns(mask: Mask, ranks: int, machines: tuple[Hardware, ...]) -> list[float]:
    """Seconds on each machine."""
    found = arrange(mask)
    assert found is not None, "documents can be cut"
    mask, layout = first_mask(found), _home(first_mask(found), ranks)
    later = second_half(found, layout, _home(own_mask(found), ranks))
    first, second = _disaggregated(mask, layout), _disaggregated(later.mask, later.layout)
    seconds = []
    for hardware in machines:
        halves = (
            _half(first, mask, hardware, layout.counts, 0 * layout.counts),
            _half(second, later.mask, hardware, later.own_rows, later.joined),
        )
        seconds.append(turns_seconds(halves, linear_work(_SHAPE), LAYERS))
    return seconds


def table(results: dict[str, Any]) -> str:
    """Markdown: exposed shares of a step."""
    lines = [
        "Simulated. Share of a step that waits for transfers: disaggregated on contiguous rows, where rows lie best, the same "
        "in two nano-batches; what is taken, the least predicted time of all.",
        "",
        "| mix | tokens a rank | ranks | GB/s | contiguous | one | two | taken |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, cell in results.items():
        mix, size, ranks, rate = key.split("|")
        shares = [cell[f"{x}_exposed_seconds"] / cell[f"{x}_seconds"] for x in ("contiguous", "one", "two", "best")]
        lines.append(f"| {mix} | {int(size):,} | {ranks} | {rate} | " + " | ".join(f"{x:.1%}" for x in shares) + " |")
    return "\n".join(lines)
