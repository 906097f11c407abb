"""How fast is each attention kernel here, and is it right? ``distattn bench kernels``.

    distattn bench kernels --quick --json benchmarks/results/kernels-h100.json --plot docs/images/kernels.png
    distattn bench kernels --block-plans --json benchmarks/results/kernels-block-plans-h100.json

The masks of LongCA-bench, 12 static ones and 2 that differ by head. TFLOP/s count the mask's exact area A over all query
heads: forward 4·A·head_dim, backward 2.5 times that. Cells that the JSON file already has, of the same device and commit, are
not run again. With --block-plans: the rate on the listed blocks of plans that keep a tenth of them, beside that of the mask
which hides nothing, by the same engine in the same run.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from distattn.bench.engines import MASKS, PEERS, SEED, Cell, Engine, Problem, delta_of, engine_names, first_call
from distattn.bench.masks import SPARSE_PLANS
from distattn.bench.options import Commit, head_pairs, names, positive_integers
from distattn.bench.record import Record, environment
from distattn.bench.timing import CellTimeoutError, limit, median_ms
from distattn.errors import ConfigError, DistattnError
from distattn.kernels import BACKENDS
from distattn.kernels.merge import empty_carry, finish
from distattn.kernels.protocol import T_K0, T_Q0

MAX_ERROR = {"cuda": 2e-2, "cpu": 1e-4}
"""Relative error (Frobenius) against fp32 at which a cell counts as wrong; bf16 attention has about 5e-3."""

CHECKED_ROWS, CHECKED_KEYS = 256, 128

WARM_UP_SECONDS = 0.1
"""Of warm-ups on a GPU: its clocks fall while a kernel compiles, and the engine that had to compile would seem slower."""

DENSE = "full"
"""The mask whose rate a plan's is set against."""

OURS = ("triton", "hopper")
FAMILY = "triton or hopper"
"""Both are written in Triton, the second in Gluon; one forward fits the other's backward."""

_DEFAULTS = {
    "grid": ("8192,32768,131072", "64:8,16:16", "128,64"),
    "quick": ("32768", "64:8", "128"),
    "block-plans": ("65536", "16:2", "128"),
}
"""Lengths, heads and head dimensions."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    json_path: Annotated[Path, typer.Option("--json", help="results; cells found there are not run again")],
    quick: Annotated[bool, typer.Option("--quick", help="32K tokens, 64:8 heads of 128 alone")] = False,
    block_plans: Annotated[bool, typer.Option("--block-plans", help="plans of a tenth, 64K tokens, 16:2 heads of 128")] = False,
    masks: Annotated[str, typer.Option(help="comma-separated; default all")] = "",
    lengths: Annotated[str, typer.Option(help="tokens, comma-separated; default 8192,32768,131072")] = "",
    heads: Annotated[str, typer.Option(help="query:KV heads, comma-separated; default 64:8,16:16")] = "",
    head_dims: Annotated[str, typer.Option(help="comma-separated; default 128,64")] = "",
    engines: Annotated[str, typer.Option(help="comma-separated; default all, with --block-plans auto,triton")] = "",
    seconds: Annotated[float, typer.Option(help="of repeats for each time, after two warm-ups; at least three repeats")] = 0.5,
    cell_seconds: Annotated[float, typer.Option(help="a cell that takes longer is given up; 0: none is")] = 120,
    plot: Annotated[Path | None, typer.Option(help="draw the results as a picture")] = None,
    commit: Commit = "",
) -> None:
    """Time attention kernels on the masks of LongCA-bench, forward and backward, beside FlexAttention and FlashAttention-4."""
    if quick and block_plans:
        raise ConfigError("--quick and --block-plans each choose what is measured: give one of them")
    known_masks = (DENSE, *SPARSE_PLANS) if block_plans else MASKS
    shape = _DEFAULTS["block-plans" if block_plans else "quick" if quick else "grid"]
    chosen_engines = names("engines", engines or ("auto,triton" if block_plans else ""), engine_names())
    cells = [
        Cell(mask, length, *pair, head_dim)
        for pair in head_pairs("heads", heads or shape[1])
        for head_dim in positive_integers("head-dims", head_dims or shape[2])
        for length in positive_integers("lengths", lengths or shape[0])
        for mask in names("masks", masks, known_masks)
    ]
    about = {
        "unit": "TFLOP/s by exact mask area: forward 4·A·head_dim, backward 2.5 times that; A over all query heads",
        "seed": SEED,
        "warm_ups": 2,
        "seconds_of_warm_ups": WARM_UP_SECONDS,
        "seconds_of_repeats": seconds,
    }
    record = Record(json_path, environment(commit), about)
    for cell, engine in itertools.product(cells, chosen_engines):
        key = f"{cell.key}|{engine}"
        if key not in record:
            record.add(key, measure(engine, cell, seconds, cell_seconds))
            gc.collect()
            torch.cuda.empty_cache()
    print(table(record.results, chosen_engines))
    if plot is not None:
        from distattn.bench.kernels_plot import draw

        draw(record.results, record.environment, plot)
    if any(entry.get("wrong") for entry in record.results.values()):
        raise typer.Exit(1)


def measure(engine: str, cell: Cell, seconds: float, cell_seconds: float) -> dict[str, Any]:
    """One entry of the record: TFLOP/s, milliseconds, errors, peak memory; or ``not_run``, why there is none."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with limit(cell_seconds):
            x = Problem.make(cell, device)
            return _measured(engine, x, seconds)
    except (DistattnError, ImportError, CellTimeoutError) as error:
        return {"not_run": str(error)}
    except torch.OutOfMemoryError:
        return {"not_run": "out of device memory"}
    except torch.AcceleratorError:  # nothing runs on the device after it: the next call of the command goes on here
        raise
    except Exception as error:  # the other cells are still worth having
        return {"not_run": f"{type(error).__name__}: {str(error)[:200]}", "wrong": engine not in PEERS}


def _measured(engine: str, x: Problem, seconds: float) -> dict[str, Any]:
    on_gpu = x.device == "cuda"
    timed, first_call_s = first_call(engine, x)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    flops = 4 * x.area * x.cell.head_dim
    calls = (timed.forward, timed.backward)
    forward, backward = (median_ms(call, seconds, x.device, warm_up_seconds=WARM_UP_SECONDS * on_gpu) for call in calls)
    found: dict[str, Any] = {
        "forward_ms": forward,
        "backward_ms": backward,
        "forward_tflops": flops / forward / 1e9,
        "backward_tflops": 2.5 * flops / backward / 1e9,
        "area": x.area,
        "tiles": len(x.tiles),
        "first_call_s": first_call_s,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        **timed.about,
    }
    found["errors"] = errors(timed, x)
    worst = max(found["errors"].values())
    return found | {"wrong": bool(math.isnan(worst) or worst > MAX_ERROR[x.device])}


def errors(timed: Engine, x: Problem) -> dict[str, float]:
    """Relative errors of out, lse and dq for the last rows, and of dk and dv for keys in the middle, against fp32."""
    out, lse, dq, dk, dv = timed.results()
    reference, n = BACKENDS["reference"], x.cell.length
    rows = slice(max(0, n - CHECKED_ROWS), n)
    keys = slice(n // 2, min(n, n // 2 + CHECKED_KEYS))
    carry = empty_carry(1, n, x.cell.heads, x.cell.head_dim, dtype=x.q.dtype, device=x.device)
    of_rows, of_keys = (cut(x.tiles, where.start, where.stop, c) for where, c in ((rows, T_Q0), (keys, T_K0)))
    reference.attend(x.q, x.k, x.v, of_rows, carry, **x.settings)
    want_out, want_lse = (y[:, rows] for y in finish(carry, torch.float32))
    del carry
    found = {"out": _relative(out[:, rows], want_out), "lse": _relative(lse[:, rows], want_lse)}
    sums = [torch.zeros_like(y, dtype=torch.float32) for y in (x.q, x.k, x.v)]
    given = (x.q, x.k, x.v, None, lse.float(), x.do, delta_of(x.do, out))
    reference.attend_backward(*given, of_rows, *sums, **x.settings)
    found["dq"] = _relative(dq[:, rows], sums[0][:, rows])
    for y in sums:
        y.zero_()
    reference.attend_backward(*given, of_keys, *sums, **x.settings)
    return found | {"dk": _relative(dk[:, keys], sums[1][:, keys]), "dv": _relative(dv[:, keys], sums[2][:, keys])}


def cut(tiles: np.ndarray, first: int, stop: int, column: int) -> np.ndarray:
    """Tiles cut to the rows (column T_Q0) or keys (T_K0) from ``first`` to ``stop``; what is empty then is no matter."""
    part = tiles.copy()
    part[:, column] = np.maximum(part[:, column], first)
    part[:, column + 1] = np.minimum(part[:, column + 1], stop)
    return part[part[:, column] < part[:, column + 1]]


def _relative(got: Tensor, want: Tensor) -> float:
    return ((got.float() - want.float()).norm() / want.float().norm().clamp(min=1e-12)).item()


def table(results: dict[str, dict[str, Any]], engines: list[str]) -> str:
    """Forward/backward TFLOP/s, a line for each cell; then ratios of speed to FlexAttention's, and of plans to no plan."""
    lines = [f"{'forward/backward TFLOP/s':42s}" + "".join(f"{name:>13s}" for name in engines)]
    cells = list(dict.fromkeys(key.split("|")[0] for key in results))
    for cell in cells:
        texts = [_cell_text(results.get(f"{cell}|{name}")) for name in engines]
        lines.append(f"{cell:42s}" + "".join(f"{text:>13s}" for text in texts))
    compared = results | _family(results, cells)
    names = [*(name for name in engines if name != "flex"), FAMILY]
    lines += [f"{name} / flex: {text}" for name in names if (text := _against_flex(compared, cells, name))]
    lines += [text for name in engines for cell in cells if (text := _against_dense(results, cell, name))]
    reasons = {f"{key.split('|')[1]}: {e['not_run']}" for key, e in results.items() if e.get("not_run")}
    return "\n".join([*lines, *(f"n/a {reason}" for reason in sorted(reasons)), "! = wrong result, or failed"])


def _family(results: dict[str, dict[str, Any]], cells: list[str]) -> dict[str, dict[str, Any]]:
    """Cells of what our Triton kernels do together: in each direction the faster of the portable ones and those for Hopper."""
    found = {}
    for cell in cells:
        entries = [e for name in OURS if "forward_ms" in (e := results.get(f"{cell}|{name}", {}))]
        if len(entries) == len(OURS):
            found[f"{cell}|{FAMILY}"] = {key: min(e[key] for e in entries) for key in ("forward_ms", "backward_ms")}
    return found


def _cell_text(entry: dict[str, Any] | None) -> str:
    if entry is None or "not_run" in entry:
        return "n/a" + "!" * bool(entry and entry.get("wrong"))
    return f"{entry['forward_tflops']:.0f}/{entry['backward_tflops']:.0f}" + "!" * entry["wrong"]


def _against_flex(results: dict[str, dict[str, Any]], cells: list[str], name: str) -> str:
    """Geometric mean and least of the ratios to FlexAttention, over the cells that both ran."""
    pairs = [(results.get(f"{cell}|{name}", {}), results.get(f"{cell}|flex", {})) for cell in cells]
    pairs = [(mine, flex) for mine, flex in pairs if "forward_ms" in mine and "forward_ms" in flex]
    if not pairs:
        return ""
    parts = []
    for direction in ("forward", "backward"):
        ratios = [flex[f"{direction}_ms"] / mine[f"{direction}_ms"] for mine, flex in pairs]
        parts.append(f"{direction} {statistics.geometric_mean(ratios):.2f} (least {min(ratios):.2f})")
    return f"{', '.join(parts)}, {len(pairs)} cells"


def _against_dense(results: dict[str, dict[str, Any]], cell: str, name: str) -> str:
    """A plan's rate on its listed pairs as a share of the dense rate; nothing for other masks, or where one did not run."""
    mask, _, shape = cell.partition(" ")
    plan, dense = results.get(f"{cell}|{name}", {}), results.get(f"{DENSE} {shape}|{name}", {})
    if mask not in SPARSE_PLANS or "not_run" in plan or "forward_tflops" not in dense:
        return ""
    shares = (f"{d} {plan[f'{d}_tflops'] / dense[f'{d}_tflops']:.2f}" for d in ("forward", "backward"))
    return f"{name}, {cell}: {', '.join(shares)} of its rate on {DENSE}"
