"""How fast is linear attention here, beside fla, and what do its exchanges cost over ranks? ``distattn bench linear``.

    distattn bench linear --json benchmarks/results/linear-h100.json --plot docs/images/linear.png
    distattn bench linear --parts exchanges --ranks 2,4 --json benchmarks/results/linear-ranks-h100.json

Three parts. kernels: every operator on one device, ours and fla's, call by call in turn. lengths: seconds a token from 8K
tokens to a million. exchanges: two operators over ranks, every exchange on the same kernels, beside ranks that exchange nothing
and beside fla's own context parallelism. A time is what the device takes behind a pause in which the host runs ahead, as in
the middle of a training step; 20, 50 and 80 % quantiles are kept. Cells that the JSON file has, of the same device and commit,
are not run again.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import distattn
from distattn.bench.linear_problem import Attend, LinearProblem, LinearShape, errors, fla, our_kernel, ours, parse_shapes
from distattn.bench.linear_ranks import ALONE, FLA_CP
from distattn.bench.linear_report import MAX_ERRORS, draw, table
from distattn.bench.linear_timing import Clock, quantiles
from distattn.bench.options import Commit, names, positive_integers
from distattn.bench.record import Record, environment
from distattn.errors import DistattnError
from distattn.kernels.linear import KINDS
from distattn.launchers.local import launch_local
from distattn.parallel.exchanges import EXCHANGES

PARTS = ("kernels", "lengths", "exchanges")
PEERS = ("fla",)
RANK_ENGINES = (ALONE, *EXCHANGES, "auto", FLA_CP)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    json_path: Annotated[Path, typer.Option("--json", help="results; cells found there are not run again")],
    parts: Annotated[str, typer.Option(help="kernels, lengths, exchanges; comma-separated, default the first two")] = "",
    kinds: Annotated[str, typer.Option(help="operators, comma-separated; default all (exchanges: gla, gated_delta)")] = "",
    shapes: Annotated[str, typer.Option(help="BATCHxTOKENSxHEADSxDIM of the kernels, comma-separated")] = "",
    lengths: Annotated[str, typer.Option(help="tokens of the lengths, comma-separated")] = "",
    ranks: Annotated[str, typer.Option(help="of the exchanges, comma-separated; default all devices, or 2 on a CPU")] = "",
    tokens: Annotated[str, typer.Option(help="a rank, of the exchanges, comma-separated")] = "",
    heads: Annotated[int, typer.Option(help="of the lengths and exchanges")] = 0,
    engines: Annotated[str, typer.Option(help="of the exchanges; default all")] = "",
    seconds: Annotated[float, typer.Option(help="of repeats for each engine; at least three repeats")] = 0.5,
    time_limit: Annotated[float, typer.Option(help="seconds after which no further cell begins")] = 1e9,
    plot: Annotated[Path | None, typer.Option(help="draw the results as a picture")] = None,
    commit: Commit = "",
) -> None:
    """Time linear attention: kernels beside fla, seconds a token by length, exchanges over ranks."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    large = device == "cuda"
    deadline = time.monotonic() + time_limit
    chosen = names("parts", parts or "kernels,lengths", PARTS)
    some = names("kinds", kinds, tuple(KINDS))
    record = Record(
        json_path, environment(commit), {"unit": "milliseconds: 20, 50 and 80 % quantiles", "seconds_of_repeats": seconds}
    )
    cells: list[tuple[str, LinearShape, tuple[str, ...]]] = []
    if "kernels" in chosen:
        wanted = parse_shapes(shapes or ("1x65536x16x128,2x16384x16x128" if large else "1x256x2x16"), some)
        cells += [("kernel", shape, ("ours", *PEERS)) for shape in wanted]
    if "lengths" in chosen:
        sizes = positive_integers("lengths", lengths or ("8192,32768,131072,524288,1048576" if large else "128,512"))
        dims = (heads or (16 if large else 2), 128 if large else 16)
        cells += [("length", LinearShape(kind, 1, size, *dims), ("ours",)) for kind in some for size in sizes]
    for part, shape, cell_engines in cells:
        key = f"{part}|{shape.key}"
        if key not in record and time.monotonic() < deadline:
            record.add(key, measure(shape, cell_engines, seconds, device, with_errors=part == "kernel"))
            gc.collect()
            torch.cuda.empty_cache()
    if "exchanges" in chosen:
        counts = positive_integers("ranks", ranks or str(torch.cuda.device_count() if large else 2))
        local = positive_integers("tokens", tokens or ("8192,65536" if large else "128"))
        dims = (heads or (16 if large else 4), 128 if large else 16)
        wanted = [LinearShape(kind, 1, size, *dims) for kind in (some if kinds else ["gla", "gated_delta"]) for size in local]
        who = names("engines", engines, RANK_ENGINES)
        for count in counts:
            run_ranks(record, wanted, who, count, seconds, device, deadline)
    print(table(record.results))
    if plot is not None:
        draw(record.results, record.environment, plot)
    raise typer.Exit(1 if any(is_bad(entry) for cell in record.results.values() for entry in cell.items()) else 0)


def is_bad(entry: tuple[str, dict[str, Any]]) -> bool:
    """Whether an engine of ours failed, or any result of ours is wrong."""
    name, found = entry
    return name not in (*PEERS, FLA_CP) and bool("failed" in found or found.get("wrong"))


def measure(
    shape: LinearShape, engines: tuple[str, ...], seconds: float, device: str, *, with_errors: bool
) -> dict[str, dict[str, Any]]:
    """One cell: per engine its forward and training milliseconds, or ``not_run`` or ``failed`` and why."""
    found: dict[str, dict[str, Any]] = {}
    calls: dict[str, Attend] = {}
    forward_only: dict[str, Attend] = {}  # a peer may refuse its backward here
    try:
        x = LinearProblem.make(shape, device)
    except torch.OutOfMemoryError:
        return {name: {"not_run": "out of device memory"} for name in engines}
    clock = Clock(device)
    for name in engines:
        attend = None
        try:
            attend = ours(shape) if name == "ours" else fla(shape)
            found[name] = {"kernel": our_kernel(shape, device, x.q.dtype)} if name == "ours" else {}
            if with_errors:
                found[name]["errors"] = errors(shape, attend, device)
                found[name]["wrong"] = is_wrong(found[name]["errors"])
            found[name]["peak_memory_bytes"] = clock.peak_bytes(partial(x.train, attend))
            calls[name] = attend
        except torch.OutOfMemoryError:
            found[name] = {"not_run": "out of device memory"}
        except DistattnError as error:
            found[name] = {"not_run": str(error)}
        except torch.AcceleratorError:  # nothing runs on the device after it: the next call of the command goes on here
            raise
        except Exception as error:  # the other engine is still worth having
            found[name] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
            if name in PEERS and attend is not None and _runs(x, attend):
                forward_only[name] = attend
    for direction, engines_of in (("forward", {**calls, **forward_only}), ("train", calls)):
        run = getattr(x, direction)
        timed = {name: partial(run, attend) for name, attend in engines_of.items()}
        for name, times in clock.in_turn(timed, seconds).items():
            found[name][f"{direction}_ms"] = quantiles(times)
    return found


def _runs(x: LinearProblem, attend: Attend) -> bool:
    """Whether the forward does."""
    try:
        x.forward(attend)
    except Exception:  # the reason is kept by the caller
        return False
    return True


def is_wrong(found: dict[str, float]) -> bool:
    return any(math.isnan(error) or error > MAX_ERRORS[name] for name, error in found.items())


def run_ranks(
    record: Record, shapes: list[LinearShape], engines: list[str], ranks: int, seconds: float, device: str, deadline: float
) -> None:
    """The cells of one number of ranks that the record lacks, in one set of processes; they write, this process adds."""
    missing = [s for s in shapes if f"ranks {ranks}|{s.key}" not in record]
    if not missing or time.monotonic() > deadline:
        return
    with tempfile.TemporaryDirectory(prefix="distattn-bench-") as name:
        folder = Path(name)
        settings = {
            "results": str(folder / "results.jsonl"),
            "device": device,
            "shapes": [vars(s) for s in missing],
            "engines": engines,
            "seconds": seconds,
            "deadline": time.time() + min(deadline - time.monotonic(), 1e8),
        }
        (folder / "settings.json").write_text(json.dumps(settings))
        (folder / "path").mkdir()
        (folder / "path" / "distattn").symlink_to(Path(distattn.__file__).resolve().parent, target_is_directory=True)
        # Ranks start in safe-path mode, and the package need not be installed.
        path = os.pathsep.join([str(folder / "path"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        argv = [sys.executable, "-m", "distattn.bench.linear_ranks", str(folder / "settings.json")]
        code = launch_local(argv, ranks, log_dir=folder / "logs", env={"PYTHONPATH": path})
        written = folder / "results.jsonl"
        for line in written.read_text().splitlines() if written.exists() else []:
            cell = json.loads(line)
            record.add(f"ranks {ranks}|{cell['key']}", cell["engines"])
        if code:
            begun = [f"ranks {ranks}|{s.key}" for s in missing if f"ranks {ranks}|{s.key}" in record]
            last = begun[-1] if begun else f"ranks {ranks}|{missing[0].key}"
            failure = {"ranks": {"failed": f"the rank processes ended with status {code}; what is here was measured before"}}
            record.add(last, record.results.get(last, {}) | failure)
