"""``distattn bench cad-layers``: seconds a token of the linear layers around attention, which ``cad-simulation`` rests on."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer

from distattn.bench.cad_layers import MODELS, measure
from distattn.bench.options import Commit, names, positive_integers
from distattn.bench.record import Record, environment
from distattn.errors import ConfigError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    json_path: Annotated[Path, typer.Option("--json", help="Results; cells found there are not measured again.")],
    models: Annotated[str, typer.Option(help="Shapes, comma-separated: 8b, 34b.")] = "8b,34b",
    tensor_parallel: Annotated[int, typer.Option(help="Devices that share a layer's matrices; one slice is timed.")] = 8,
    tokens: Annotated[str, typer.Option(help="Tokens, comma-separated.")] = "8192,32768",
    seconds: Annotated[float, typer.Option(help="Of repeats for each time; at least three repeats.")] = 0.5,
    commit: Commit = "",
) -> None:
    """Time one layer's slice of the matrices, forward and backward, in bf16."""
    chosen = names("models", models, list(MODELS))
    if tensor_parallel < 1 or any(MODELS[name].kv_heads % tensor_parallel for name in chosen):
        raise ConfigError(f"--tensor-parallel is {tensor_parallel} and must divide the KV heads of every model (8)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    record = Record(json_path, environment(commit), {"tensor_parallel": tensor_parallel})
    for name in chosen:
        for size in positive_integers("tokens", tokens):
            key = f"{name}|{size}"
            if key not in record:
                record.add(key, asdict(measure(MODELS[name], tensor_parallel, size, device, seconds)))
            found, shape = record.results[key], MODELS[name]
            rate = 3 * shape.linear_flops / tensor_parallel / (found["forward_s"] + found["backward_s"]) / 1e12
            print(f"{name:4s} {size:7,d} tokens  forward {found['forward_s'] * 1e9:8.1f} ns a token  "
                  f"backward {found['backward_s'] * 1e9:8.1f} ns a token  {rate:6.0f} TFLOP/s")  # fmt: skip
