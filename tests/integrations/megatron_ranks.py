"""What one rank of the tests with real Megatron-core does, start to end."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

from tests.integrations import megatron_direct
from tests.integrations.megatron_cases import Case, compare_all, cpu_shim, initialise


def found_by_rank(rank: int, world: int, cases: list[Case]) -> dict[str, Any]:
    """Everything that this file's tests look at."""
    # Megatron warns of Apex and Transformer Engine, which it does without here.
    warnings.simplefilter("ignore")
    cpu_shim()
    compared = compare_all(cases)
    initialise(1, 1, world)
    return {
        "cases": compared,
        "exact": megatron_direct.exact(rank, world),
        "transfers": megatron_direct.transfers_of_recomputation(rank, world),
        "refused": megatron_direct.refused(rank, world),
        "specs": megatron_direct.specs(),
        "slicing": megatron_direct.installed_slicing(rank, world),
        "example": example(rank, world),
    }


def example(rank: int, world: int) -> list[float]:
    """Losses of three steps of the example, on these ranks."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    path = Path(__file__).parents[2] / "examples" / "megatron_gpt.py"
    spec = importlib.util.spec_from_file_location("megatron_gpt", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.train(rank, world, 3)
