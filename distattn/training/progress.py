"""How a run tells a person where it is: a bar on a terminal, else a line every few seconds. Only rank 0 has one."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Reporter:
    """Reports steps and remarks of a run; ``quiet`` ones (all ranks but 0) say nothing."""

    def __init__(
        self, steps: int, first_step: int, *, interval_seconds: float, quiet: bool = False, stream: TextIO | None = None
    ) -> None:
        self._steps = steps
        self._first_step = first_step
        self._interval = interval_seconds
        self._quiet = quiet
        self._stream = stream or sys.stdout
        self._began = self._spoke = time.monotonic()
        self._bar: Progress | None = None
        if not quiet and self._stream.isatty():
            bar = _make_bar(Console(file=self._stream))
            self._task = bar.add_task("train", total=steps, completed=first_step, loss="", rate="")
            bar.start()
            self._bar = bar

    def step(self, record: dict[str, Any]) -> None:
        """Show one line of metrics.jsonl."""
        step, now = record["step"], time.monotonic()
        if self._quiet:
            return
        loss, rate = f"loss {record['loss']:.4f}", f"{record['tokens_per_second']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=loss, rate=rate)
        elif now - self._spoke >= self._interval or step in (self._first_step + 1, self._steps):
            left = (now - self._began) / (step - self._first_step) * (self._steps - step)
            self._write(f"step {step}/{self._steps}  {loss}  {rate}  ETA {_clock(left)}")
            self._spoke = now

    def say(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self._write(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _write(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


def _make_bar(console: Console) -> Progress:
    columns = ("{task.fields[loss]}", "{task.fields[rate]}", "ETA")
    texts = [TextColumn(column) for column in columns]
    return Progress(TextColumn("step"), MofNCompleteColumn(), BarColumn(), *texts, TimeRemainingColumn(), console=console)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
