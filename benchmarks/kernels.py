"""How fast is each attention kernel here, and is it right? Ours, torch's two, FlexAttention and FlashAttention-4, in one run.

    python benchmarks/kernels.py --quick --json benchmarks/results/kernels-h100.json

TFLOP/s count the mask's exact area A: forward 4·A·heads·head_dim, backward 2.5 times that. Backends of ours are timed as
the engine calls them: forward into an existing fp32 carry, backward into existing fp32 gradients with delta given.
FlexAttention and FlashAttention-4 are timed as their users call them: a forward that returns (out, lse), and autograd's
backward. Cells that the JSON file already has, of the same device and commit, are not run again. ``--tune`` times launch
configurations of our kernels.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent))

from distattn.kernels import BACKENDS, Case
from distattn.kernels.merge import empty_carry, finish
from distattn.kernels.protocol import T_H1, T_HI, T_K0, T_Q0, TILE_COLUMNS, Backend
from distattn.kernels.softmax.triton_backend import LaunchConfig, LaunchConfigs, TritonBackend, launch_configs
from distattn.mask import Mask

ENGINES = ("triton", "cudnn", "flash", "flex", "fa4")
WINDOW = 1024
MAX_ERROR = 2e-2
"""Relative error (Frobenius) against fp32 at which a cell counts as wrong; bf16 attention has about 5e-3."""


class Cell(NamedTuple):
    """One shape: batch 1, bf16."""

    mask: str
    length: int
    heads: int
    kv_heads: int
    head_dim: int

    def build(self) -> Mask:
        if self.mask == "causal":
            return Mask.causal(self.length)
        if self.mask == "window":
            return Mask.sliding_window(self.length, WINDOW - 1)
        return Mask.documents(document_lengths(self.length))

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


class Data(NamedTuple):
    """q, do [1, N, H, D]; k, v [1, N, Hk, D]; the mask as tiles over all heads."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    tiles: np.ndarray


class Timed(NamedTuple):
    """What an engine offers to the clock, and its results (out, lse, dq, dk, dv), each [1, N, ...], for the check."""

    forward: Callable[[], object]
    backward: Callable[[], object]
    results: Callable[[], tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]


def document_lengths(total: int) -> list[int]:
    """Documents of 64 tokens to half the sequence, log-uniform, as packed pretraining data has them."""
    generator, lengths = np.random.default_rng(0), []
    while sum(lengths) < total:
        lengths.append(min(int(math.exp(generator.uniform(math.log(64), math.log(total / 2)))), total - sum(lengths)))
    return lengths


def inputs(cell: Cell, mask: Mask) -> Data:
    torch.manual_seed(0)

    def normal(heads: int) -> Tensor:
        return torch.randn(1, cell.length, heads, cell.head_dim, device="cuda", dtype=torch.bfloat16)

    tiles = np.zeros((len(mask.bands), len(TILE_COLUMNS)), np.int64)
    tiles[:, : T_HI + 1] = mask.bands
    tiles[:, T_H1] = cell.heads
    return Data(normal(cell.heads), normal(cell.kv_heads), normal(cell.kv_heads), normal(cell.heads), tiles)


def time_protocol(backend: Backend, cell: Cell, x: Data) -> Timed:
    settings: dict[str, Any] = {"group": cell.heads // cell.kv_heads, "scale": cell.scale, "softcap": None}

    def make() -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        carry = empty_carry(1, cell.length, cell.heads, cell.head_dim, dtype=x.q.dtype, device="cuda")
        backend.attend(x.q, x.k, x.v, x.tiles, carry, **settings)
        out, lse = finish(carry, x.q.dtype)
        # Head by head: the fp32 product of all heads at once is as large as the carry.
        delta = torch.stack([(x.do[:, :, h].float() * out[:, :, h]).sum(-1) for h in range(cell.heads)], -1)
        return out, lse, delta, [torch.zeros_like(y, dtype=torch.float32) for y in (x.q, x.k, x.v)]

    carry = empty_carry(1, cell.length, cell.heads, cell.head_dim, dtype=x.q.dtype, device="cuda")
    out, lse, delta, sums = make()

    def backward(into: list[Tensor]) -> None:
        backend.attend_backward(x.q, x.k, x.v, out, lse, x.do, delta, x.tiles, *into, **settings)

    def results() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        fresh = [torch.zeros_like(y) for y in sums]
        backward(fresh)
        return out, lse, fresh[0], fresh[1], fresh[2]

    def forward() -> None:
        backend.attend(x.q, x.k, x.v, x.tiles, carry, **settings)

    return Timed(forward, lambda: backward(sums), results)


def time_flex(cell: Cell, x: Data) -> Timed:
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    torch._dynamo.reset()
    owner = torch.repeat_interleave(
        torch.arange(len(document_lengths(cell.length))), torch.tensor(document_lengths(cell.length))
    ).cuda()
    mask_mod = {
        "causal": lambda b, h, i, j: i >= j,
        "window": lambda b, h, i, j: (i >= j) & (i - j < WINDOW),
        "documents": lambda b, h, i, j: (i >= j) & (owner[i] == owner[j]),
    }[cell.mask]
    block_mask = torch.compile(create_block_mask)(mask_mod, None, None, cell.length, cell.length, device="cuda")
    q, k, v = (y.transpose(1, 2).contiguous().requires_grad_() for y in (x.q, x.k, x.v))
    do = x.do.transpose(1, 2).contiguous()
    compiled = torch.compile(flex_attention, dynamic=False)

    def forward() -> tuple[Tensor, Tensor]:
        out, aux = compiled(
            q, k, v, block_mask=block_mask, scale=cell.scale, enable_gqa=cell.heads != cell.kv_heads,
            return_aux=AuxRequest(lse=True),
        )  # fmt: skip
        assert aux.lse is not None
        return out, aux.lse

    return _autograd(forward, q, k, v, do, transposed=True)


def time_fa4(cell: Cell, x: Data) -> Timed:
    from flash_attn.cute import flash_attn_func  # pyright: ignore[reportMissingImports]

    if cell.mask == "documents":
        raise NotImplementedError("documents need its varlen interface, whose shapes differ")
    q, k, v = (y.detach().requires_grad_() for y in (x.q, x.k, x.v))
    window = (WINDOW - 1, 0) if cell.mask == "window" else (None, None)

    def forward() -> tuple[Tensor, Tensor]:
        result = flash_attn_func(q, k, v, softmax_scale=cell.scale, causal=cell.mask == "causal", window_size=window)
        out, lse = result[:2] if isinstance(result, tuple) else (result, None)
        return out, torch.zeros(1, cell.heads, 1, device="cuda") if lse is None else lse

    return _autograd(forward, q, k, v, x.do, transposed=False)


def _autograd(
    forward: Callable[[], tuple[Tensor, Tensor]], q: Tensor, k: Tensor, v: Tensor, do: Tensor, *, transposed: bool
) -> Timed:
    out, lse = forward()

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, (q, k, v), do, retain_graph=True)

    def results() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        found = (out, *backward())
        a, b, c, d = (y.transpose(1, 2) if transposed else y for y in found)
        return a, lse.transpose(1, 2), b, c, d

    return Timed(forward, backward, results)


def prepare(engine: str, cell: Cell, x: Data) -> Timed:
    if engine == "flex":
        return time_flex(cell, x)
    if engine == "fa4":
        return time_fa4(cell, x)
    case = Case("cuda", torch.bfloat16, cell.head_dim, cell.head_dim, cell.heads, cell.kv_heads)
    reason = BACKENDS[engine].why_not(case)
    if reason is not None:
        raise NotImplementedError(reason)
    return time_protocol(BACKENDS[engine], cell, x)


def median_ms(call: Callable[[], object], seconds: float) -> float:
    """Two warm-ups, then at least three repeats and ``seconds`` long; the median."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < seconds:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def cut(tiles: np.ndarray, first: int, stop: int, column: int) -> np.ndarray:
    """Tiles cut to the rows (column T_Q0) or keys (T_K0) from ``first`` to ``stop``; what is empty then is no matter."""
    part = tiles.copy()
    part[:, column] = np.maximum(part[:, column], first)
    part[:, column + 1] = np.minimum(part[:, column + 1], stop)
    return part[part[:, column] < part[:, column + 1]]


def errors(timed: Timed, cell: Cell, x: Data) -> dict[str, float]:
    """Relative errors of out and dq for the last 256 queries, and of dk and dv for 128 keys in the middle, against fp32."""
    out, lse, dq, dk, dv = timed.results()
    settings: dict[str, Any] = {"group": cell.heads // cell.kv_heads, "scale": cell.scale, "softcap": None}
    reference = BACKENDS["reference"]
    n, rows = cell.length, slice(cell.length - 256, cell.length)
    keys = slice(n // 2, n // 2 + 128)
    carry = empty_carry(1, n, cell.heads, cell.head_dim, dtype=x.q.dtype, device="cuda")
    reference.attend(x.q, x.k, x.v, cut(x.tiles, rows.start, rows.stop, T_Q0), carry, **settings)
    want_out, want_lse = (y[:, rows] for y in finish(carry, torch.float32))
    del carry
    found = {"out": relative(out[:, rows], want_out)}
    if lse.shape[1] != n:  # The engine keeps its LSE to itself.
        return found
    found["lse"] = relative(lse[:, rows], want_lse)
    delta = torch.stack([(x.do[:, :, h].float() * out[:, :, h]).sum(-1) for h in range(cell.heads)], -1)
    sums = [torch.zeros_like(y, dtype=torch.float32) for y in (x.q, x.k, x.v)]
    call = (x.q, x.k, x.v, None, lse.float(), x.do, delta)
    reference.attend_backward(*call, cut(x.tiles, rows.start, rows.stop, T_Q0), *sums, **settings)
    found["dq"] = relative(dq[:, rows], sums[0][:, rows])
    for y in sums:
        y.zero_()
    reference.attend_backward(*call, cut(x.tiles, keys.start, keys.stop, T_K0), *sums, **settings)
    return found | {"dk": relative(dk[:, keys], sums[1][:, keys]), "dv": relative(dv[:, keys], sums[2][:, keys])}


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def measure(engine: str, cell: Cell, seconds: float) -> dict[str, Any]:
    """One cell of the table: TFLOP/s, milliseconds, errors, peak memory; or why there is none."""
    mask = cell.build()
    x = inputs(cell, mask)
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    try:
        timed = prepare(engine, cell, x)
        timed.backward()
        torch.cuda.synchronize()
    except (NotImplementedError, ImportError) as error:
        return {"not_run": str(error)}
    first_call_s = time.perf_counter() - begin
    flops = 4 * mask.area * cell.heads * cell.head_dim
    forward, backward = median_ms(timed.forward, seconds), median_ms(timed.backward, seconds)
    found = {
        "forward_ms": forward,
        "backward_ms": backward,
        "forward_tflops": flops / forward / 1e9,
        "backward_tflops": 2.5 * flops / backward / 1e9,
        "first_call_s": first_call_s,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
        "errors": errors(timed, cell, x),
    }
    return found | {"wrong": max(found["errors"].values()) > MAX_ERROR or any(map(math.isnan, found["errors"].values()))}


def cells(quick: bool) -> list[Cell]:
    if quick:
        return [
            Cell("causal", 32768, 64, 8, 128), Cell("window", 32768, 64, 8, 128), Cell("documents", 32768, 64, 8, 128),
            Cell("causal", 8192, 64, 8, 128), Cell("causal", 32768, 16, 16, 64),
        ]  # fmt: skip
    shapes = itertools.product(("causal", "window", "documents"), (8192, 32768), ((64, 8), (16, 16)), (128, 64))
    return [Cell(mask, length, *heads, head_dim) for mask, length, heads, head_dim in shapes]


TUNED = {
    "forward": [(128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 4, 3), (128, 128, 4, 3), (64, 128, 4, 2)],
    "dq": [(128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (128, 64, 4, 3), (64, 64, 4, 3), (128, 32, 8, 3)],
    "dkdv": [(64, 128, 8, 3), (64, 128, 8, 2), (64, 64, 4, 2), (32, 128, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3)],
}


def tune(cell: Cell, seconds: float) -> list[dict[str, Any]]:
    """Every configuration of each kernel of ours, the other two as in the table: milliseconds of its direction."""
    x = inputs(cell, cell.build())
    now = launch_configs(cell.head_dim, cell.head_dim, torch.bfloat16, torch.cuda.get_device_capability())
    found: list[dict[str, Any]] = []
    for kernel, choices in TUNED.items():
        in_table = tuple(vars(vars(now)[kernel]).values())
        for choice in dict.fromkeys([in_table, *choices]):
            timed = time_protocol(TritonBackend(LaunchConfigs(**{**vars(now), kernel: LaunchConfig(*choice)})), cell, x)
            ms = median_ms(timed.forward if kernel == "forward" else timed.backward, seconds)
            found.append({"head_dim": cell.head_dim, "kernel": kernel, "config": choice, "ms": ms})
            star = "  in the table" if choice == in_table else ""
            print(f"D{cell.head_dim} {kernel:8s} {choice!s:18s} {ms:8.3f} ms{star}", flush=True)
    return found


def environment(given_commit: str) -> dict[str, str | None]:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name(0),
        "commit": given_commit or done.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version()),
        **{name: _version(name) for name in ("triton", "flash-attn-4")},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def table(results: dict[str, dict[str, Any]]) -> str:
    """Forward/backward TFLOP/s, a line for each cell."""
    lines = [f"{'forward/backward TFLOP/s':34s}" + "".join(f"{engine:>13s}" for engine in ENGINES)]
    for name in dict.fromkeys(key.split("|")[0] for key in results):
        entries = [results.get(f"{name}|{engine}", {"not_run": ""}) for engine in ENGINES]
        texts = [
            "n/a" if "not_run" in e else f"{e['forward_tflops']:.0f}/{e['backward_tflops']:.0f}" + "!" * e["wrong"]
            for e in entries
        ]
        lines.append(f"{name:34s}" + "".join(f"{text:>13s}" for text in texts))
    reasons = {f"{key.split('|')[1]}: {e['not_run']}" for key, e in results.items() if e.get("not_run")}
    return "\n".join([*lines, *(f"n/a {reason}" for reason in sorted(reasons)), "! = wrong result"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="results; cells found there are not run again")
    parser.add_argument("--quick", action="store_true", help="five cells in place of 24")
    parser.add_argument("--tune", action="store_true", help="time launch configurations of our kernels instead")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--seconds", type=float, default=0.5, help="of repeats for each time")
    parser.add_argument("--commit", default="", help="where the checkout is no git repository")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/kernels.py needs a CUDA device.", file=sys.stderr)
        return 2
    here = environment(options.commit)
    report: dict[str, Any] = {"environment": here, "results": {}}
    if options.json.exists():
        before = json.loads(options.json.read_text())
        if all(before["environment"].get(key) == here[key] for key in ("device", "commit")):
            report = before
    options.json.parent.mkdir(parents=True, exist_ok=True)
    if options.tune:
        report["tune"] = tune(Cell("causal", 16384, 32, 4, 128), 0.2) + tune(Cell("causal", 16384, 32, 4, 64), 0.2)
        options.json.write_text(json.dumps(report, indent=1))
        return 0
    for cell, engine in [(cell, engine) for cell in cells(options.quick) for engine in options.engines]:
        key = f"{cell.mask} {cell.length // 1024}K {cell.heads}:{cell.kv_heads} D{cell.head_dim}|{engine}"
        if key in report["results"]:
            continue
        report["results"][key] = measure(engine, cell, options.seconds)
        gc.collect()
        torch.cuda.empty_cache()
        options.json.write_text(json.dumps(report, indent=1))
    print(table(report["results"]))
    return 1 if any(entry.get("wrong") for entry in report["results"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
