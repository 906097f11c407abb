"""Checkpoints: written behind the training, published all at once, read by any number of ranks.

    save     every rank copies its share to the CPU ─▶ a thread writes step-N.tmp/shard-R ─▶ tells rank 0 (store)
             rank 0, when all have: manifest, rename step-N.tmp → step-N, remove the oldest ─▶ tells every rank
    load     newest first: all ranks check it, all agree, each reads the blocks that it holds now

A name step-N exists only for a complete checkpoint: whatever is killed, the ones before are untouched.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from distattn.errors import CheckpointError
from distattn.training.atomic_file import sync_folder
from distattn.training.checkpoint_format import (
    MANIFEST,
    CheckpointReader,
    FileRecord,
    published_steps,
    step_folder,
    write_manifest,
    write_shard,
)
from distattn.training.checkpoint_parts import Part, part_of, short_digest
from distattn.training.checkpoint_ranks import CheckpointRanks
from distattn.training.patience import NO_SPACE, error_number, patiently

__all__ = ["CheckpointManager", "CheckpointReader", "Restored", "published_steps"]

logger = logging.getLogger(__name__)

_LEFTOVER = re.compile(r"step-\d+\.(tmp|removed|replaced)")
_VERDICT_S = 30.0


@dataclass(frozen=True)
class Restored:
    """What was loaded. skipped: a sentence for each newer checkpoint that could not be used."""

    step: int
    meta: dict[str, Any]
    path: Path
    skipped: tuple[str, ...] = ()


class CheckpointManager:
    """Saves and loads the checkpoints of one run; every rank makes one.

    A tensor is a DTensor (Shard and Replicate placements, on any mesh), a Part that says itself which block it is, or a plain
    tensor, which counts as the same on every rank. Each distinct block is written once, whoever else holds it.

    directory: where step-N folders go, on a file system that all ranks see. rank, world: of ``group`` (None: the
    default process group; one rank needs none). keep: newest checkpoints that survive. timeout_s: how long a background
    write waits for the other ranks. patience_s: how long it waits for a file system that has vanished. read_only: for those
    who look at a run that may be training: nothing is cleaned up, and save is refused. Making, saving and loading are
    collective.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        rank: int = 0,
        world: int = 1,
        keep: int = 3,
        group: dist.ProcessGroup | None = None,
        timeout_s: float = 600.0,
        patience_s: float = 0.0,
        read_only: bool = False,
    ) -> None:
        if keep < 1:
            raise CheckpointError(f"keep is {keep}, and at least 1 checkpoint must be kept")
        self.directory = Path(directory)
        self._keep, self._timeout_s, self._read_only = keep, timeout_s, read_only
        self._patience_s = patience_s
        self._distrusted: set[int] = set()
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None
        self._num_saves = 0
        if rank == 0 and not read_only:
            # Only here: a folder that vanishes later must not be made anew in the place of the one that comes back.
            self.directory.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(self.directory)
        # Its exchange between ranks also keeps them from writing before rank 0 has cleaned up.
        self._ranks = CheckpointRanks(rank, world, group, timeout_s=timeout_s)

    def save(self, step: int, tensors: Mapping[str, Tensor | Part], meta: Mapping[str, Any]) -> None:
        """Snapshot ``tensors`` and write them in the background as the checkpoint of ``step``.

        Returns when the snapshot is taken: the tensors may change. One host copy of this rank's share is kept for the
        next save (pinned where a tensor is on a GPU). meta: JSON values; rank 0's are kept. CheckpointError: the
        previous save failed, the ranks do not save the same thing, or meta is not JSON.
        """
        if self._read_only:
            raise CheckpointError(f"{self.directory} was opened to read, so step {step} cannot be saved there")
        self.wait()
        try:
            # Through text and back: what is digested must be what a reader will parse (keys become strings).
            meta = json.loads(json.dumps(dict(meta), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"the meta of step {step} cannot be written as JSON: {error}") from error
        snapshot = self._snapshot(self._share(step, [part_of(name, tensors[name]) for name in sorted(tensors)]))
        self._num_saves += 1
        arguments = (step, self._num_saves, snapshot, meta)
        # A daemon: when training dies of something else, the process must not linger for a write that lacks its peers.
        self._thread = threading.Thread(target=self._write, args=arguments, name=f"checkpoint-{step}", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the last save is published; its failure, on whichever rank, is raised here on every rank, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """``wait``, then give the host copy back."""
        try:
            self.wait()
        finally:
            self._buffers.clear()

    def latest(self) -> int | None:
        """Step of the newest published checkpoint, by name only (``load`` checks it); not collective."""
        steps = published_steps(self.directory)
        return steps[-1] if steps else None

    def load(self, tensors: Mapping[str, Tensor | Part], step: int | None = None) -> Restored | None:
        """Read the newest checkpoint that is whole, or that of ``step``, into ``tensors``, in place.

        Names may be some of those saved; shapes (global) and dtypes must be those saved; placements need not. All ranks
        load the same step. None: there is no checkpoint. CheckpointError: there are some, and none can be used.
        """
        self.wait()
        listed = json.loads(self._ranks.gather_texts(json.dumps(published_steps(self.directory)))[0])
        if step is not None and step not in listed:
            raise CheckpointError(f"{self.directory} has no checkpoint of step {step}; it has {listed or 'none'}")
        parts = [part_of(name, tensors[name]) for name in sorted(tensors)]
        skipped: list[str] = []
        for candidate in [step] if step is not None else listed[::-1]:
            reader, reasons = self._read(candidate, parts)
            if reader is not None:
                self._distrusted = {other for other in listed if other > candidate}
                return Restored(candidate, reader.meta, reader.path, tuple(skipped))
            skipped.extend(reasons)
            if self._ranks.rank == 0:
                for reason in reasons:
                    logger.warning("checkpoint of step %d is not used: %s", candidate, reason)
        if not skipped:
            return None
        raise CheckpointError(
            f"no checkpoint in {self.directory} can be used: {'; '.join(skipped)}. "
            "Restore one from a backup, or start in another run.dir"
        )

    def _read(self, step: int, parts: list[Part]) -> tuple[CheckpointReader | None, list[str]]:
        """Collective: the reader, or the ranks' distinct reasons. Tensors change only after every rank has agreed."""
        reader, reason = None, ""
        try:
            reader = CheckpointReader(step_folder(self.directory, step))
            large = [name for name in reader.files if name.endswith(".safetensors")]
            reader.verify(large[self._ranks.rank :: self._ranks.world])
            reader.check(parts)
        except CheckpointError as error:
            reason = str(error)
        reasons = self._distinct(reason)
        if reasons:
            return None, reasons
        assert reader is not None
        try:
            reader.read_into(parts)
        except CheckpointError as error:
            reason = str(error)
        reasons = self._distinct(reason)
        return (None, reasons) if reasons else (reader, [])

    def _distinct(self, reason: str) -> list[str]:
        return sorted(set(filter(None, self._ranks.gather_texts(reason))))

    def _share(self, step: int, parts: list[Part]) -> list[Part]:
        """Collective: the parts that this rank writes. Of several holders of a block, its key picks one."""
        listing = short_digest("".join(f"{part.name}{part.info}" for part in parts))
        rows = self._ranks.gather(np.array([step, self._num_saves, len(parts), listing]))
        if (rows != rows[0]).any():
            odd = np.flatnonzero((rows != rows[0]).any(axis=1)).tolist()
            raise CheckpointError(
                f"ranks {odd} save another step or other tensors than rank 0, which saves step {step}: names, global "
                "shapes and dtypes must be alike on every rank"
            )
        keys = [part.key() for part in parts]
        gathered = self._ranks.gather(np.array([*keys, *(part.num_held for part in parts)], np.int64))
        held, counts = gathered[:, : len(parts)], gathered[:, len(parts) :]
        share = []
        for i, part in enumerate(parts):
            _, first = np.unique(held[:, i], return_index=True)
            if counts[first, i].sum() != math.prod(part.info.shape):
                raise CheckpointError(
                    f"the ranks' blocks of {part.name} do not cover its shape {list(part.info.shape)} exactly once"
                )
            holders = np.flatnonzero(held[:, i] == keys[i])
            if keys[i] and holders[keys[i] % len(holders)] == self._ranks.rank:
                share.append(part)
        return share

    def _snapshot(self, share: list[Part]) -> list[Part]:
        buffers = {}
        for part in share:
            values, buffer = part.values, self._buffers.get(part.name)
            if buffer is None or buffer.shape != values.shape or buffer.dtype != values.dtype:
                buffer = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            buffers[part.name] = buffer.copy_(values, non_blocking=True)
        if any(part.values.is_cuda for part in share):
            torch.cuda.synchronize()
        self._buffers = buffers
        return [replace(part, values=buffers[part.name]) for part in share]

    def _write(self, step: int, turn: int, parts: list[Part], meta: dict[str, Any]) -> None:
        """In the thread. What goes wrong on a rank becomes every rank's failure of this save."""
        ranks, verdict_key = self._ranks, f"{turn}/verdict"
        try:
            ranks.post(f"{turn}/rank {ranks.rank}", self._write_share(step, parts))
            if ranks.rank == 0:
                ranks.post(verdict_key, self._publish(step, turn, meta))
            # Rank 0 waits for timeout_s, then says whom it waited for: the others give it time to.
            verdict = ranks.collect([verdict_key], self._timeout_s + _VERDICT_S)[0]
        except TimeoutError:
            verdict = {"error": f"rank 0 did not answer within {self._timeout_s + _VERDICT_S:.0f} seconds"}
        except Exception as error:  # a thread's exception reaches nobody by itself
            verdict = {"error": f"{type(error).__name__}: {error}"}
        if "error" in verdict:
            self._failure = CheckpointError(
                f"the checkpoint of step {step} was not written: {verdict['error']}. Earlier checkpoints in "
                f"{self.directory} are untouched"
            )

    def _write_share(self, step: int, parts: list[Part]) -> dict[str, Any]:
        num_bytes = sum(part.values.nbytes for part in parts)

        def write() -> dict[str, FileRecord]:
            folder = _temporary(self.directory, step)
            folder.mkdir(exist_ok=True)
            if shutil.disk_usage(folder).free < num_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write_shard(folder, self._ranks.rank, self._ranks.world, parts) if parts else {}

        try:
            files = patiently(write, f"rank {self._ranks.rank}'s share of step {step}", patience_s=self._patience_s)
            return {"files": {name: [record.num_bytes, record.digest] for name, record in files.items()}}
        except (OSError, SafetensorError) as error:
            return {"error": f"rank {self._ranks.rank}: {_reason(error, self.directory, num_bytes)}"}

    def _publish(self, step: int, turn: int, meta: dict[str, Any]) -> dict[str, Any]:
        """On rank 0: the verdict on this save."""
        temporary, final = _temporary(self.directory, step), step_folder(self.directory, step)
        try:
            reports = self._ranks.collect([f"{turn}/rank {rank}" for rank in range(self._ranks.world)], self._timeout_s)
            errors = [report["error"] for report in reports if "error" in report]
            if not errors:
                files = {name: FileRecord(*row) for report in reports for name, row in report["files"].items()}

                def publish() -> None:
                    if not temporary.exists() and _is_published(final):
                        return  # an earlier try got as far as the rename
                    write_manifest(temporary, step, meta, files)
                    _rename_into_place(temporary, final)

                patiently(publish, f"the checkpoint of step {step}", patience_s=self._patience_s)
        except TimeoutError as error:
            missing = str(error).replace(f"{turn}/", "")
            errors = [f"these ranks did not finish within {self._timeout_s:.0f} seconds: {missing}"]
        except OSError as error:
            errors = [f"rank 0: {_reason(error, self.directory, 0)}"]
        if errors:
            shutil.rmtree(temporary, ignore_errors=True)
            return {"error": "; ".join(errors)}
        try:
            self._remove_old(step)
        except OSError as error:
            logger.warning("an old checkpoint in %s could not be removed: %s", self.directory, error)
        return {}

    def _remove_old(self, step: int) -> None:
        # What load refused counts for nothing in keep, and goes when there is something to take its place.
        self._distrusted.discard(step)
        good = [other for other in published_steps(self.directory) if other not in self._distrusted]
        for other in sorted(self._distrusted) + good[: -self._keep]:
            folder = step_folder(self.directory, other)
            if folder.exists():
                # Renamed first: a kill half-way must not leave a folder that looks published.
                removed = folder.with_suffix(".removed")
                shutil.rmtree(removed, ignore_errors=True)
                folder.rename(removed)
                shutil.rmtree(removed, ignore_errors=True)
        self._distrusted.clear()


def _temporary(directory: Path, step: int) -> Path:
    return directory / f"step-{step}.tmp"


def _is_published(final: Path) -> bool:
    return (final / MANIFEST).exists()


def _rename_into_place(temporary: Path, final: Path) -> None:
    replaced = final.with_suffix(".replaced")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    temporary.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _remove_leftovers(directory: Path) -> None:
    """Remove what a killed run left half-done; a checkpoint that was moved away to be replaced goes back."""
    for entry in sorted(directory.iterdir()) if directory.is_dir() else ():
        if not (entry.is_dir() and _LEFTOVER.fullmatch(entry.name)):
            continue
        if entry.suffix == ".replaced" and not entry.with_suffix("").exists():
            entry.rename(entry.with_suffix(""))
        else:
            shutil.rmtree(entry, ignore_errors=True)


def _reason(error: Exception, directory: Path, needed: int) -> str:
    if error_number(error) not in NO_SPACE:
        return f"{type(error).__name__}: {error}"
    size = f" ({needed / 1e9:.3g} GB to write)" if needed else ""
    return f"no space is left on the disk of {directory}{size}: free some, or lower checkpoint.keep"
