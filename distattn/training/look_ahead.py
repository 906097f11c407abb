"""Plans of the coming steps, made in the background while this step computes.

A plan depends on the documents' lengths alone, which are known for any step. Every rank plans the same, by itself: what is
made ahead lies in the cache of plans, and the ranks compare it when its step comes, as they do any plan. A plan that is late is
waited for, so that all ranks still use the same one; how often that was, and for how long, is counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from distattn.data import PackedSequence

STEPS_AHEAD = 2
"""Steps whose plans are made beforehand: one that computes for a while and one in case a plan takes longer than a step."""

MAX_AHEAD = 8
"""Sequences of a step that are planned beforehand: with two steps and two nano-batches each they fill half the plans' cache."""


class LookAhead:
    """plan_ahead: plans a sequence without waiting for, or telling, any other rank; its result must end up in a cache.

    made, late: plans that were asked for after they were expected, and those of them that were not ready. waited_seconds: for
    late ones, in all.
    """

    def __init__(self, plan_ahead: Callable[[PackedSequence], Any]) -> None:
        self._plan_ahead = plan_ahead
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="distattn-plan")
        self._coming: dict[int, Future[Any]] = {}
        self.made = self.late = 0
        self.waited_seconds = 0.0

    def expect(self, sequences: Iterable[tuple[int, PackedSequence]]) -> None:
        """Begin with the plans of these numbered sequences, in this order; those that were begun already are left alone."""
        for number, sequence in sequences:
            if number not in self._coming:
                self._coming[number] = self._worker.submit(self._plan_ahead, sequence)

    def settle(self, numbers: Iterable[int]) -> None:
        """Wait for the plans of these sequences, if they were expected. An error is left to whoever asks for the plan: it comes
        again, on every rank."""
        for number in numbers:
            plan = self._coming.pop(number, None)
            if plan is None:
                continue
            self.made += 1
            if not plan.done():
                began = time.perf_counter()
                plan.exception()
                self.late += 1
                self.waited_seconds += time.perf_counter() - began

    def close(self) -> None:
        """Drop what was not begun, and wait for the plan that was."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def describe(self) -> str:
        """``118 plans made ahead, 1 of them late (0.02 s)``."""
        return f"{self.made} plans made ahead, {self.late} of them late ({self.waited_seconds:.2g} s)"
