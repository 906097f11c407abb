"""The Triton kernels compile for Hopper, on a machine without a GPU, and ptxas keeps their matrix products asynchronous."""

from __future__ import annotations

import importlib
from concurrent.futures import Executor

import pytest
import torch

from distattn.kernels.softmax.triton_configs import launch_configs, plan_configs

TRITON = pytest.importorskip("triton", reason="needs triton").__version__
pytestmark = pytest.mark.skipif(
    not TRITON.startswith(("3.6.", "3.7.")), reason=f"reads what ptxas says for Triton 3.6 and 3.7, not for {TRITON}"
)

HOPPER = (9, 0)
MAX_SHARED_BYTES = 232448
FP32 = ("acc", "m", "l", "lse", "delta", "bias", "dq", "dk", "dv", "dbias")


def compile_kernel(name: str, head_dim: int, scores: int, *, plan: int, extras: bool) -> tuple[int, str]:
    """In a process of its own, without the interpreter: (bytes of shared memory, what ptxas says).

    plan: the size of the blocks of a plan that all heads follow, or 0. extras: with a bias and positions.
    """
    from triton.compiler import ASTSource

    from tests.kernels.hopper_compiler import compile_for_hopper

    direction, prefix = "forward" if name == "forward" else "backward", "plan_" if plan else ""
    module = importlib.import_module(f"distattn.kernels.softmax.triton_{prefix}{direction}")
    kernel = getattr(module, f"{prefix}{name}_kernel")
    configs = launch_configs(head_dim, head_dim, torch.bfloat16, HOPPER)
    config = vars(plan_configs(configs, plan, plan, 8) if plan else configs)[name]
    constants = {
        "D": head_dim, "DV": head_dim, "BLOCK_D": head_dim, "BLOCK_DV": head_dim, "SCORES": scores,
        "BLOCK_Q": config.block_q, "BLOCK_K": config.block_k, "BIAS": extras, "POSITIONS": extras, "WHOLE": False,
    }  # fmt: skip
    if plan:
        constants |= {"PLAN_Q": plan, "PLAN_K": plan}
        constants |= {"PACK": config.pack} if name == "dq" else {}

    def kind(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument in ("q", "k", "v", "do"):
            return "*bf16"
        if argument.endswith("_starts"):
            return "*i64"
        tables = ("blocks", "ranges", "positions", "full_blocks", "partial_blocks", "pos_q", "pos_k")
        if argument in tables:
            return "*i32"
        return "*fp32" if argument in FP32 else "fp32" if argument.endswith("_scale") else "i32"

    signature = {argument: kind(argument) for argument in kernel.arg_names}
    # As a launch finds arenas: aligned, with strides of q, k, v and their gradients that 16 divides.
    rounded = {argument for argument in signature if signature[argument].startswith("*") or argument.startswith("stride_")}
    rounded -= {
        argument
        for argument in rounded
        if argument.startswith(("stride_m", "stride_l", "stride_delta", "stride_bias", "stride_dbias"))
    }
    attributes = {(i,): [["tt.divisibility", 16]] for i, argument in enumerate(signature) if argument in rounded}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    source = ASTSource(kernel, signature, constants, attributes)  # pyright: ignore[reportArgumentType]
    shared, _, said = compile_for_hopper(source, options)
    return shared, said


@pytest.mark.parametrize(
    ("name", "head_dim", "scores", "plan", "extras"),
    [
        ("forward", 128, 0, 0, False),
        ("dq", 128, 0, 0, False),
        ("dkdv", 128, 0, 0, False),
        ("dkdv", 64, 2, 0, True),
        ("forward", 128, 0, 128, False),
        ("forward", 128, 0, 64, False),
        ("dq", 64, 0, 128, True),
        ("dq", 128, 0, 64, False),
        ("dkdv", 128, 0, 128, False),
    ],
)
def test_the_table_fits_hopper(name: str, head_dim: int, scores: int, plan: int, extras: bool, compiler: Executor) -> None:
    shared, said = compiler.submit(compile_kernel, name, head_dim, scores, plan=plan, extras=extras).result()
    assert 0 < shared <= MAX_SHARED_BYTES
    assert "registers" in said
    assert "serialized" not in said
