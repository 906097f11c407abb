"""NCCL on 2 GPUs: ping-pong, servers and both backward modes, exactly as on gloo."""

from __future__ import annotations

import pytest

from distattn.testing import run_ranks
from tests.test_pingpong import TOLERANCE, run_cases

pytestmark = pytest.mark.gpu(2)


def test_results_and_gradients_are_exact() -> None:
    for rank, errors in enumerate(run_ranks(run_cases, 2, "cuda", backend="nccl", timeout_s=200)):
        assert {name: error for name, error in errors.items() if not error < TOLERANCE} == {}, f"rank {rank}"
