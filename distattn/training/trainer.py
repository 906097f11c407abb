"""The training loop of one rank.

for each step:  plan and read this rank's rows of its sequences
                loss = Σ token losses / tokens of the whole step, over all ranks;  backward, one sequence at a time
                stop if loss or gradient is not finite;  clip;  AdamW;  one line in metrics.jsonl

What a step computes depends on the configuration, the parameters and the step's number alone, so that a run that resumes
from a checkpoint goes on as if it had never stopped.
"""

from __future__ import annotations

import functools
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from distattn.config import Config
from distattn.data import PackedStream, TokenCache, bigram_loss
from distattn.errors import DataError, TrainingError
from distattn.launchers.supervise import HANG, Failure, Journal
from distattn.launchers.watchdog import Watchdog
from distattn.parallel.agreement import current_waits
from distattn.training.batches import (
    MicroBatch,
    NanoMicroBatch,
    make_batch,
    make_nano_batch,
    make_nano_batches,
    make_plan,
    plan_ahead,
    step_indices,
)
from distattn.training.checkpoint import CheckpointManager
from distattn.training.engine import build_engine
from distattn.training.evaluate import EvaluationLog, evaluate, held_out_sequences
from distattn.training.look_ahead import MAX_AHEAD, STEPS_AHEAD, LookAhead
from distattn.training.mesh import Mesh
from distattn.training.metrics import peak_flops, peak_memory_bytes, utilisation
from distattn.training.optimizer import learning_rate
from distattn.training.plots import draw_losses
from distattn.training.progress import Reporter
from distattn.training.run_dir import RunDir
from distattn.training.sharding import compute_dtype


class StopRequest:
    """Whether somebody asked this process to stop; the ranks agree on the step by ``Trainer``'s first all-reduce of each."""

    def __init__(self) -> None:
        self.received = False


@contextmanager
def stop_on_signal(signals: tuple[int, ...] = (signal.SIGTERM,)) -> Iterator[StopRequest]:
    """Turn these signals into a request, for the main thread; the handlers that were there come back at the end."""
    request = StopRequest()

    def note(number: int, frame: Any) -> None:
        request.received = True

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, note) for number in signals}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Agreed:
    """What the ranks tell each other before a step: labels and model FLOPs of the whole step, and whether to stop."""

    num_labels: int
    flops: float
    stop: bool


class Trainer:
    """One rank's part of a run; all methods are collective. Resumes from the newest checkpoint that can be trusted."""

    def __init__(self, config: Config, run: RunDir, mesh: Mesh, cache: TokenCache, stop: StopRequest) -> None:
        self.config, self.run_dir, self.mesh, self.cache, self.stop = config, run, mesh, cache, stop
        self.engine = build_engine(config, mesh)
        self.model = self.engine.model
        self.stream = PackedStream(cache, "train", config.data.seq_len, config.train.seed)
        self.held_out = held_out_sequences(config, cache)
        self.peak_flops = peak_flops(mesh.device, compute_dtype(config, mesh.device))
        self.checkpoints = CheckpointManager(
            run.checkpoints,
            rank=mesh.rank,
            world=mesh.world,
            keep=config.checkpoint.keep,
            timeout_s=config.train.timeout_seconds,
            patience_s=config.run.storage_patience_seconds,
        )
        self.journal = Journal(run.path)
        self.watchdog = Watchdog(
            config.train.hang_seconds,
            rank=mesh.rank,
            world=mesh.world,
            store=dist.distributed_c10d._get_default_store() if mesh.world > 1 else None,
            waits=current_waits,
            report=self._note_hang,
        )
        self._require_same_data()
        self.remarks: list[str] = []
        self.step = self._resume()
        self.saved_step = self.step
        self.bigram: float | None = None

    def run(self) -> bool:
        """Train to the last step, evaluate and draw; False if it was stopped before, with a checkpoint of where it was."""
        leads, patience_s = self.mesh.rank == 0, self.config.run.storage_patience_seconds
        self.metrics = self.run_dir.metrics(self.step, patience_s=patience_s) if leads else None
        self.evaluations = EvaluationLog(self.run_dir.path, self.step, patience_s=patience_s) if leads else None
        self.reporter = Reporter(
            self.config.train.steps, self.step, interval_seconds=self.config.log.interval_seconds, quiet=not leads
        )
        self.look_ahead = LookAhead(functools.partial(plan_ahead, self.config, self.mesh))
        try:
            with self.watchdog:
                return self._run()
        finally:
            self.look_ahead.close()
            self.reporter.close()
            if self.metrics is not None:
                self.metrics.close()

    def _run(self) -> bool:
        config, beat = self.config, self.watchdog.beat
        self._introduce()
        while self.step < config.train.steps:
            step = self.step + 1
            record = self._train_step(step)
            if record is None:
                self._save()
                self.checkpoints.close()
                self.reporter.say(f"stopped after step {self.step}, which is saved: the same command goes on from there")
                return False
            # The write overlaps one step and no more, so that a kill never costs more steps than the interval has.
            beat(f"step {step}, end of an earlier checkpoint's write")
            self.checkpoints.wait()
            self.step = step
            if self.metrics is not None:
                self.metrics.append(record)
            self.reporter.step(record)
            last = step == config.train.steps
            if config.eval.interval and step % config.eval.interval == 0 and not last:
                self._evaluate()
            if last or step % config.checkpoint.interval == 0:
                self._save()
        # The final checkpoint is safe before anything else may fail.
        beat("end of the last checkpoint's write")
        self.checkpoints.close()
        self._evaluate()
        beat("end of the run")
        self._finish()
        return True

    # --- a step ------------------------------------------------------------------------------------------------------

    def _train_step(self, step: int) -> dict[str, Any] | None:
        """Update the parameters once; the step's line of metrics.jsonl, or None if the ranks agreed to stop before it."""
        config, mesh, beat = self.config, self.mesh, self.watchdog.beat
        began = time.perf_counter()
        beat(f"step {step}, reading its sequences")
        indices = step_indices(step, config.train.global_batch, mesh)
        make = make_batch if config.train.nano_batches == 1 else make_nano_batch
        self.look_ahead.settle(indices)
        batches = [make(config, mesh, self.stream.sequence(i)) for i in indices]
        self._plan_ahead(step)
        agreed = self._agree(batches)
        if agreed.stop:
            return None
        loss_sum = torch.zeros((), dtype=torch.float64, device=mesh.device)
        for number, batch in enumerate(batches, 1):
            beat(f"step {step}, forward of sequence {number} of {len(batches)}")
            loss = batch.loss(self.model, config.train.loss_chunk_tokens)
            beat(f"step {step}, backward of sequence {number} of {len(batches)}")
            self.engine.backward(loss / agreed.num_labels)
            loss_sum += loss.detach().double()
        beat(f"step {step}, sums over all ranks and the update")
        rate = learning_rate(config.optim, step, config.train.steps)
        total, norm = self.engine.update(loss_sum, rate, functools.partial(self._require_finite, step))
        loss = total / agreed.num_labels
        peak_memory = int(mesh.max(torch.tensor(peak_memory_bytes(mesh.device))).item())
        seconds = time.perf_counter() - began
        tokens = config.train.global_batch * config.data.seq_len
        return {
            "step": step,
            "loss": loss,
            "tokens": tokens,
            "seq_len": config.data.seq_len,
            "tokens_per_second": tokens / seconds,
            "mfu": utilisation(agreed.flops, seconds, mesh.world, self.peak_flops),
            "peak_memory_bytes": peak_memory,
            "step_seconds": seconds,
            "lr": rate,
            "grad_norm": norm,
            "num_labels": agreed.num_labels,
        }

    def _plan_ahead(self, step: int) -> None:
        """Begin with the plans of the steps after this one, as far as the cache of plans has room for them."""
        config = self.config
        for later in range(step + 1, min(step + STEPS_AHEAD, config.train.steps) + 1):
            indices = step_indices(later, config.train.global_batch, self.mesh)
            self.look_ahead.expect((i, self.stream.sequence(i)) for i in indices[:MAX_AHEAD])

    def _agree(self, batches: Sequence[MicroBatch | NanoMicroBatch]) -> Agreed:
        own = [sum(b.num_labels for b in batches), sum(b.flops for b in batches), float(self.stop.received)]
        num_labels, flops, stops = self.mesh.sum(torch.tensor(own, dtype=torch.float64)).tolist()
        return Agreed(max(int(num_labels), 1), flops, stops > 0)

    def _require_finite(self, step: int, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        self.checkpoints.close()
        good = self.checkpoints.latest()
        where = (
            f"the last good checkpoint is step {good} in {self.run_dir.checkpoints}" if good else "there is no checkpoint yet"
        )
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        raise TrainingError(
            f"{what} at step {step}, which was not applied; {where}: lower optim.lr, lengthen optim.warmup_steps or look at "
            "the data of that step."
        )

    def _note_hang(self, summary: str) -> None:
        self.journal.failed(Failure(self.step + 1, HANG, summary, self.mesh.rank))

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.saved_step == self.step:
            return
        meta = {
            "data_digest": self.cache.digest,
            "tokenizer_digest": self.cache.tokenizer_digest,
            "vocab_size": self.cache.vocab_size,
            "ranks": self.mesh.world,
        }
        self.watchdog.beat(f"step {self.step}, copy for its checkpoint")
        self.checkpoints.save(self.step, self.engine.state(), meta)
        self.saved_step = self.step

    def _resume(self) -> int:
        """Load the newest checkpoint, if there is one; the number of steps that are done."""
        restored = self.engine.restore(self.checkpoints.load)
        if restored is None:
            return 0
        self.remarks += restored.skipped
        self.remarks.append(f"resuming after step {restored.step}")
        return restored.step

    def _require_same_data(self) -> None:
        """Every rank has the same tokens: a source that changes while ranks start would otherwise train on a mixture."""
        digest = float(int(self.cache.digest[:12], 16))  # 48 bits, exact in fp64
        low, high = self.mesh.max(torch.tensor([-digest, digest], dtype=torch.float64)).tolist()
        if -low != high:
            raise DataError(
                f"data.source={self.config.data.source} is not the same text on every rank: give all ranks the same files, and "
                "start again when nothing writes to them."
            )

    # --- evaluation and the end --------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        result = evaluate(self.model, self.config, self.mesh, self.held_out, self.step, beat=self.watchdog.beat)
        if self.evaluations is not None:
            if self.bigram is None:
                self.bigram = bigram_loss(self.cache, self.held_out, log=self.reporter.say)
            result = replace(result, bigram_loss=self.bigram)
            self.evaluations.append(result)
            self.reporter.say(f"step {self.step}: {result.describe()}")

    def _finish(self) -> None:
        if self.evaluations is None:
            return
        if self.config.log.plot:
            reason = draw_losses(self.run_dir.picture, self.run_dir.read_metrics(), self.evaluations.records)
            self.reporter.say(reason or f"drew {self.run_dir.picture}")
        self.run_dir.mark_finished(self.step)
        if self.look_ahead.made:
            self.reporter.say(self.look_ahead.describe())
        self.reporter.say(f"finished: {self.step} steps are done, in {self.run_dir.path}")

    def _introduce(self) -> None:
        config, mesh = self.config, self.mesh
        for remark in self.remarks:
            self.reporter.say(remark)
        if self.step == config.train.steps:
            return
        self.reporter.say(
            f"{config.model.num_parameters():,} parameters, {config.data.seq_len:,} tokens a sequence, "
            f"{config.train.global_batch} a step; {mesh.world} ranks on {mesh.device.type} "
            f"(data {mesh.data} × context {mesh.context}); {self.cache.num_tokens:,} tokens of text"
        )
        first = step_indices(self.step + 1, config.train.global_batch, mesh)[0]
        make = make_plan if config.train.nano_batches == 1 else make_nano_batches
        schedule = make(config, mesh, self.stream.sequence(first))  # collective: on every rank
        if mesh.rank == 0:
            self.reporter.say("attention of the first sequence:\n  " + schedule.describe().replace("\n", "\n  "))
