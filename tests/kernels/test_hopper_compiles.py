"""The Gluon kernels compile for Hopper, on a machine without a GPU, and ptxas keeps their matrix products asynchronous."""

from __future__ import annotations

import importlib
from concurrent.futures import Executor

import pytest

from distattn.kernels.softmax import hopper_backend

TRITON = pytest.importorskip("triton", reason="needs triton").__version__
pytestmark = pytest.mark.skipif(
    not TRITON.startswith(("3.6.", "3.7.")), reason=f"reads what ptxas says for Triton 3.6 and 3.7, not for {TRITON}"
)

MAX_SHARED_BYTES = 232448


def compile_kernel(name: str, head_dim: int, whole: bool, pack: int) -> tuple[int, str, str]:
    """In a process of its own, without the interpreter: (bytes of shared memory, the kernel's PTX, what ptxas says).

    pack: query heads a program of the forward and dq.
    """
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16

    from tests.kernels.hopper_compiler import compile_for_hopper

    kernel = getattr(importlib.import_module(f"distattn.kernels.softmax.hopper_{name}"), f"{name}_kernel")
    half, constants = hopper_backend.HALF, {"D": head_dim, "WHOLE": whole}
    if name == "forward":
        block_q, block_k, stages = half, hopper_backend.BLOCK_K // pack, hopper_backend.FORWARD_STAGES * pack
    elif name == "dq":
        block_q, block_k, stages = half, hopper_backend.DQ_BLOCK_K, hopper_backend.DQ_STAGES
    else:
        block_q, block_k, stages = half, half, hopper_backend.DKDV_STAGES
    constants["STAGES"] = stages
    if "BLOCK_K" in kernel.arg_names:
        constants |= {"BLOCK_K": block_k, "PACK": pack}
    rows = {"q_desc": block_q, "k_desc": block_k, "v_desc": block_k, "do_desc": block_q}

    def kind(argument: str) -> str:
        if argument in rows:
            block = [1, 1, rows[argument], head_dim]
            return f"tensordesc<bf16{block},{NVMMASharedLayout.get_default_for(block, bfloat16)!r}>"
        if argument in constants:
            return "constexpr"
        if argument in ("blocks", "ranges"):
            return "*i32"
        if argument in ("acc", "m", "l", "lse", "delta", "dq", "dk", "dv"):
            return "*bf16" if argument in ("acc", "dq", "dk", "dv") and whole else "*fp32"
        return "fp32" if argument.endswith("_scale") else "i32"

    names = kernel.arg_names
    signature = {name: kind(name) for name in names}
    rounded = ("stride_a", "stride_d")
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name.startswith(rounded)]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(kernel, signature, values, attributes)
    return compile_for_hopper(source, {"num_warps": 4})


@pytest.mark.parametrize(
    ("name", "head_dim", "whole", "pack"),
    [
        ("forward", 128, True, 1),
        ("forward", 64, False, 1),
        ("forward", 128, True, 2),
        ("dq", 128, True, 1),
        ("dq", 64, False, 2),
        ("dkdv", 128, True, 1),
        ("dkdv", 64, False, 1),
    ],
)
def test_the_kernels_fit_and_overlap(name: str, head_dim: int, whole: bool, pack: int, compiler: Executor) -> None:
    shared, ptx, said = compiler.submit(compile_kernel, name, head_dim, whole, pack).result()
    assert 0 < shared <= MAX_SHARED_BYTES
    assert "registers" in said
    assert "serialized" not in said
    # Roles with registers of their own, products that are in flight at once, and rows that come by TMA.
    assert "setmaxnreg" in ptx
    assert "wgmma.wait_group.sync.aligned 1" in ptx
    assert "cp.async.bulk.tensor.4d" in ptx
    assert "mma.sync.aligned.m16n8k16" not in ptx
