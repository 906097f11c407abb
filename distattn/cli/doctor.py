"""``distattn doctor``: what is installed, which kernels and transports work here, what is missing and how to get it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distattn.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from rich.console import Console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

REQUIRED = ("torch", "numpy", "omegaconf", "pyyaml", "rich", "safetensors", "tokenizers", "typer")
OPTIONAL = {
    "triton": ("Triton kernels", "comes with torch's CUDA builds"),
    "matplotlib": ("loss.png, distattn plan --plot", 'pip install "distattn[plot]"'),
    "pyarrow": ("parquet data", 'pip install "distattn[data]"'),
    "flash-attn-4": ("FlashAttention-4", 'pip install "distattn[fa4]"'),
    "transformers": ("Hugging Face models", 'pip install "distattn[hf]"'),
    "megatron-core": ("Megatron", 'pip install "distattn[megatron]"'),
    "deepspeed": ("DeepSpeed", 'pip install "distattn[deepspeed]"'),
    "ray": ("Ray", 'pip install "distattn[ray]"'),
}
TAKEN: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None]] = {
    "megatron-core": ((0, 16), (0, 20)),
    "deepspeed": ((0, 19), None),
    "transformers": ((5,), None),
}
"""Releases that the integrations were written for: from the first, and before the second."""


@dataclass(frozen=True)
class Check:
    """One line of the report. ``works``: False is a fault where ``needed``; ``detail`` says what was seen or how to get it."""

    area: str
    name: str
    works: bool
    detail: str
    needed: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """All checks; healthy if everything that is needed works."""

    checks: list[Check] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        return all(check.works for check in self.checks if check.needed)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package_checks() -> list[Check]:
    checks = []
    for package in REQUIRED:
        version = _version(package)
        checks.append(Check("packages", package, version is not None, version or "missing: pip install distattn", needed=True))
    for package, (purpose, remedy) in OPTIONAL.items():
        version = _version(package)
        strange = version is not None and not _is_taken(package, version)
        detail = f"{version} is no release that distattn takes: {remedy}" if strange else version
        checks.append(Check("packages", package, version is not None and not strange, detail or f"for {purpose}: {remedy}"))
    return checks


def _is_taken(package: str, version: str) -> bool:
    first, end = TAKEN.get(package, ((), None))
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    return found >= first and (end is None or found < end)


def _machine_checks() -> list[Check]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    checks = [
        Check("machine", "python", True, platform.python_version(), needed=True),
        Check("machine", "cpu", True, f"{cores} cores, {torch.get_num_threads()} torch threads"),
    ]
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = f"torch is built for CUDA {built} but sees no device" if built else "torch is a CPU build"
        checks.append(Check("machine", "gpu", False, f"{why}; training runs on the CPU over gloo"))
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(i)
        detail = f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}"
        checks.append(Check("machine", f"gpu {i}", True, detail))
    return checks


def _kernel_checks() -> list[Check]:
    """Every backend on the case that training has here: heads 12:4 of 64; fp32 on a CPU, bf16 on a GPU."""
    import torch

    from distattn.kernels import Case, backend_report, choose_backend

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    case = Case(device, dtype, head_dim=64, value_dim=64, heads=12, kv_heads=4)
    chosen, reason = choose_backend(case)
    checks = [Check("kernels", "auto", True, f"{chosen.name}: {reason}", needed=True)]
    for name, why_not in backend_report(case).items():
        checks.append(Check("kernels", name, why_not is None, why_not or f"computes {dtype} on {device}"))
    return [*checks, _linear_check(device, dtype), _calibration_check()]


def _linear_check(device: str, dtype: torch.dtype) -> Check:
    """The kernel that a layer of Gated DeltaNet takes, 12 heads of 64."""
    from distattn.kernels.linear import LinearCase, choose_linear_backend

    backend, reason = choose_linear_backend(LinearCase(device, dtype, "scalar", True, 64, 64, 12, 12))
    return Check("kernels", "linear", True, f"{backend.name}: {reason}")


def _calibration_check() -> Check:
    """What was measured of this machine, and whether that was with the torch that is installed."""
    import torch

    from distattn.calibration import calibration_path, device_name, load_calibration

    device = device_name()
    try:
        found = load_calibration()
    except ConfigError as error:
        return Check("kernels", "calibration", False, str(error))
    if found is None:
        return Check(
            "kernels", "calibration", False, f"none of {device}: `distattn bench calibrate` measures kernels and links"
        )
    measured = f"{len(found.kernels)} kernel rates and {len(found.links)} link rates of {device}, {calibration_path(device)}"
    version = found.versions.get("torch")
    stale = "" if version == torch.__version__ else f"; measured with torch {version}, run `distattn bench calibrate` again"
    return Check("kernels", "calibration", not stale, measured + stale)


def _exact_forward_and_backward() -> str:
    """Three ranks of a ring through the mailbox against one rank, in fp64: the executor, kernels and merge as installed."""
    import torch

    from distattn.kernels import BACKENDS
    from distattn.mask import Mask
    from distattn.parallel.in_process import run_in_process
    from distattn.parallel.layout import Layout
    from distattn.parallel.schedulers import SCHEDULERS

    mask, backend = Mask.causal(30), BACKENDS["reference"]
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 30, 4, 8), (1, 30, 2, 8), (1, 30, 2, 8), (1, 30, 4, 8))
    q, k, v, do = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    results = []
    for ranks in (1, 3):
        program = SCHEDULERS["ring"].plan(mask, Layout.zigzag(30, ranks), 4, 2)
        program.verify(mask)
        results.append(run_in_process(program, mask, q, k, v, do, backend=backend))
    pairs = [(getattr(results[0], name), getattr(results[1], name)) for name in ("out", "dq", "dk", "dv")]
    worst = max(float((a - b).abs().max()) for a, b in pairs)
    if worst > 1e-10:
        raise RuntimeError(f"three ranks differ from one by {worst:.1e}")
    return f"ring over 3 ranks equals 1 rank to {worst:.0e} (fp64)"


def _exchange(rank: int, world: int) -> float:
    """An all-to-all of one number to each rank; the sum of what came."""
    import torch
    import torch.distributed as dist

    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    send = torch.full((world,), float(rank), device=device)
    receive = torch.empty_like(send)
    dist.all_to_all_single(receive, send)
    return float(receive.sum())


def _process_exchange(backend: str, world: int) -> str:
    from distattn.testing import run_ranks

    got = run_ranks(_exchange, world, backend=backend, timeout_s=60)
    expected = world * (world - 1) / 2
    if got != [expected] * world:
        raise RuntimeError(f"ranks received {got} instead of {expected}")
    return f"{world} processes exchanged data"


def _transport_checks() -> list[Check]:
    import torch

    checks = []
    probes: dict[str, Any] = {
        "mailbox": _exact_forward_and_backward,
        "gloo": lambda: _process_exchange("gloo", 2),
    }
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if devices > 1:
        probes["nccl"] = lambda: _process_exchange("nccl", devices)
    for name, probe in probes.items():
        try:
            checks.append(Check("transports", name, True, probe(), needed=True))
        except Exception as error:  # a probe reports whatever is wrong with an installation
            checks.append(Check("transports", name, False, f"{type(error).__name__}: {error}".splitlines()[0], needed=True))
    if devices < 2:
        checks.append(Check("transports", "nccl", False, f"needs two GPUs, {devices} here"))
    return checks


def _launcher_checks() -> list[Check]:
    found = shutil.which("sbatch")
    return [
        Check("launchers", "local", True, "distattn train starts one process per device", needed=True),
        Check("launchers", "slurm", found is not None, found or "no sbatch on the PATH"),
    ]


def diagnose() -> Diagnosis:
    """Run every check; takes a few seconds, since the transports are tried with real processes."""
    return Diagnosis([*_machine_checks(), *_package_checks(), *_kernel_checks(), *_transport_checks(), *_launcher_checks()])


def _print(diagnosis: Diagnosis, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("", "", "", ""):
        table.add_column(column, overflow="fold")
    area = ""
    for check in diagnosis.checks:
        mark = "[green]yes[/]" if check.works else ("[red]NO[/]" if check.needed else "[dim]no[/]")
        table.add_row(f"[bold]{check.area}[/]" if check.area != area else "", check.name, mark, escape(check.detail))
        area = check.area
    console.print(table)
    console.print(
        "distattn works here." if diagnosis.healthy else "[red]distattn does not work here: see the lines with NO.[/]"
    )


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False) -> None:
    """What is installed, which kernels and transports work here, what is missing and how to get it.

    With --cluster it checks the devices and links of a job's nodes instead: distattn doctor --cluster --help.

    Exit code 0 if everything that training needs works, else 1.
    """
    from rich.console import Console

    diagnosis = diagnose()
    if as_json:
        print(json.dumps({"healthy": diagnosis.healthy, "checks": [asdict(check) for check in diagnosis.checks]}, indent=1))
    else:
        _print(diagnosis, Console(highlight=False))
    raise typer.Exit(0 if diagnosis.healthy else 1)
