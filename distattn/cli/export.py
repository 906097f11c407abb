"""``distattn export RUN_DIR --to hf DIR``: a run's weights as a folder that transformers loads.

RUN_DIR/checkpoints/step-N ──▶ DIR.tmp: config.json, model*.safetensors, tokenizer.json ──▶ renamed to DIR when complete
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer

from distattn.cli.evaluate import run_config
from distattn.config import Config
from distattn.errors import CheckpointError, ConfigError
from distattn.models.hf_weights import MAX_SHARD_BYTES, exported_type, write_config, write_weights
from distattn.training.checkpoint import published_steps
from distattn.training.checkpoint_format import CheckpointReader, step_folder
from distattn.training.run_dir import RunDir

FORMATS = ("hf",)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def export_run(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="the run.dir of a training")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="where to write: a new or an empty folder")],
    to: Annotated[str, typer.Option(help="format: hf (config.json and safetensors of Llama, Mistral or Qwen3)")] = "hf",
    step: Annotated[int | None, typer.Option(help="which checkpoint; default: the newest that is whole")] = None,
    dtype: Annotated[str, typer.Option(help="float32 (as trained), bfloat16 or float16")] = "float32",
    max_shard_gb: Annotated[float, typer.Option(help="largest file, in 10^9 bytes")] = MAX_SHARD_BYTES / 1e9,
) -> None:
    """Write a checkpoint's weights for transformers, and for `model.init_from`."""
    if to not in FORMATS:
        raise ConfigError(f"--to {to} is unknown: choose one of {', '.join(FORMATS)}.")
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype} is unknown: choose one of {', '.join(DTYPES)}.")
    if not max_shard_gb > 0:
        raise ConfigError(f"--max-shard-gb {max_shard_gb} is not allowed: it must be greater than 0.")
    config = run_config(run_dir, ())
    kind = exported_type(config.model)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not an empty folder: give a new one.")
    reader = _open_checkpoint(RunDir(run_dir), step)
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        files = _write(config, reader, temporary, dtype, int(max_shard_gb * 1e9))
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"wrote step {reader.step} of {run_dir} to {folder}: a {kind} model, {', '.join(files)}", flush=True)


def _write(config: Config, reader: CheckpointReader, folder: Path, dtype: str, max_shard_bytes: int) -> list[str]:
    write_config(config.model, folder, seq_len=config.data.seq_len, dtype=dtype)
    files = write_weights(
        config.model,
        lambda name: reader.read(f"model.{name}"),
        folder,
        dtype=DTYPES[dtype],
        max_shard_bytes=max_shard_bytes,
    )
    tokenizer = Path(config.data.tokenizer).expanduser()
    tokenizer = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    if config.data.tokenizer != "bytes" and tokenizer.is_file():
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
        settings = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2)
        (folder / "tokenizer_config.json").write_text(settings + "\n", encoding="utf-8")
        files.append("tokenizer.json")
    return ["config.json", *files]


def _open_checkpoint(run: RunDir, step: int | None) -> CheckpointReader:
    """The newest checkpoint whose files are those that were written, or that of ``step``."""
    steps = published_steps(run.checkpoints)
    if step is not None and step not in steps:
        raise ConfigError(f"{run.path} has no checkpoint of step {step}: it has {', '.join(map(str, steps)) or 'none'}.")
    reasons = []
    for candidate in [step] if step is not None else steps[::-1]:
        try:
            reader = CheckpointReader(step_folder(run.checkpoints, candidate))
            reader.verify()
        except CheckpointError as error:
            reasons.append(str(error))
            continue
        return reader
    if not reasons:
        raise ConfigError(f"{run.path} has no checkpoint yet: there is nothing to export.")
    raise CheckpointError(f"no checkpoint of {run.path} can be used: {'; '.join(reasons)}")
