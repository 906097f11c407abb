"""``distattn bench NAME``: measurements, each in a module of its own that is imported only when it runs."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from distattn.errors import ConfigError

BENCHES = {
    "context": ("distattn.bench.context", "attention over several devices: every schedule of ours, and its peers"),
    "kernels": ("distattn.bench.kernels", "attention kernels against FlexAttention, cuDNN and FlashAttention-4"),
    "scaling": ("distattn.bench.scaling", "predicted efficiency of every schedule on clusters that are not here"),
    "cad-layers": ("distattn.bench.cad_measure", "linear layers around attention, which cad-simulation rests on"),
    "cad-simulation": ("distattn.bench.cad_simulation", "disaggregated attention on 64 to 512 GPUs beside its paper"),
    "cad-forecast": ("distattn.bench.cad_forecast", "steps of layers on ranks that are not here, before they are measured"),
    "cad-plans": ("distattn.bench.cad_plans", "plans of disaggregated attention over 8 to 256 ranks: balance, bytes, time"),
    "cad-links": ("distattn.bench.cad_links", "what of its step waits for transfers at a link rate, simulated"),
    "disaggregation": (
        "distattn.bench.disaggregation",
        "a step with attention disaggregated, beside other ways to share it",
    ),
    "linear": ("distattn.bench.linear", "linear attention against fla, by length, and its exchanges over ranks"),
    "recall": ("distattn.bench.recall", "which kinds of layers find again what they have read, and how far back"),
    "calibrate": ("distattn.bench.calibrate", "kernels and links of this machine, for automatic choices and predictions"),
}


def bench(args: Sequence[str]) -> None:
    """Run the benchmark that the first argument names, with the others; ConfigError lists those there are."""
    listing = "\n".join(f"  {name:14s} {what}" for name, (_, what) in BENCHES.items())
    if not args or args[0] in ("--help", "-h"):
        print(f"Usage: distattn bench NAME [OPTIONS]; `distattn bench NAME --help` shows the options of each.\n\n{listing}")
        return
    name, *rest = args
    if name not in BENCHES:
        raise ConfigError(f"there is no benchmark {name!r}: choose one of {', '.join(BENCHES)}")
    importlib.import_module(BENCHES[name][0]).app(rest, prog_name=f"distattn bench {name}")
