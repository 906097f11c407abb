"""The linear Triton kernels that run as one launch compile for Hopper, on a machine without a GPU: the interpreter, in which
they are tested, takes what Triton's compiler refuses, and runs them as three."""

from __future__ import annotations

import importlib
import re
from concurrent.futures import Executor

import pytest
import torch

from distattn.kernels.linear.triton_configs import linear_configs

TRITON = pytest.importorskip("triton", reason="needs triton").__version__
pytestmark = pytest.mark.skipif(
    not TRITON.startswith(("3.6.", "3.7.")), reason=f"reads what ptxas says for Triton 3.6 and 3.7, not for {TRITON}"
)

MULTIPROCESSOR_BYTES = 233472 - 2 * 1024
"""Of shared memory for two programs, less what the system takes of each."""

GATES = {"none": 0, "constant": 1, "scalar": 2}
BF16 = ("q", "k", "v", "do", "o", "dq", "dk", "dv")
INT32 = ("arrived", "cu_spans", "piece_of", "first_span", "rows_given", "rows_final")


def compile_kernel(name: str, gate: str) -> tuple[int, str]:
    """In a process of its own, without the interpreter: (bytes of shared memory, what ptxas says)."""
    import triton.language as tl
    from triton.compiler import ASTSource

    from tests.kernels.hopper_compiler import compile_for_hopper

    kernel = getattr(importlib.import_module("distattn.kernels.linear.triton_fused"), name)
    configs = linear_configs(torch.bfloat16, gate, False, 128, 128)
    constants = {
        "H": 16, "HV": 16, "K": 128, "V": 128, "BLOCK_K": 128, "BLOCK_V": 128, "WIDTH_K": configs.walk.block_v,
        "WIDTH_V": configs.walk.block_v, "NUM_BLOCKS": 128 // configs.walk.block_v, "GATE": GATES[gate], "COMPUTE": tl.bfloat16,
        "PRECISION": "tf32", "ADD_STAGES": configs.added.num_stages, "ADD": True, "ENTER": True, "WALK": True,
    }  # fmt: skip

    def kind(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument in BF16:
            return "*bf16"
        if argument in INT32:
            return "*i32"
        return "fp32" if argument == "scale" else "i32" if argument.startswith("num_") else "*fp32"

    signature = {argument: kind(argument) for argument in kernel.arg_names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, argument in enumerate(signature) if signature[argument][0] == "*"}
    source = ASTSource(kernel, signature, constants, attributes)  # pyright: ignore[reportArgumentType]
    options = {"num_warps": configs.walk.num_warps, "num_stages": configs.walk.num_stages}
    shared, _, said = compile_for_hopper(source, options)
    return shared, said


@pytest.mark.parametrize(
    ("name", "gate"),
    [
        ("fused_forward_kernel", "none"),
        ("fused_forward_kernel", "constant"),
        ("fused_forward_kernel", "scalar"),
        ("fused_backward_kernel", "none"),
        ("fused_backward_kernel", "constant"),
    ],
)
def test_two_programs_share_a_multiprocessor(name: str, gate: str, compiler: Executor) -> None:
    shared, said = compiler.submit(compile_kernel, name, gate).result()
    assert 0 < 2 * shared <= MULTIPROCESSOR_BYTES
    assert "serialized" not in said
    spilled = re.search(r"(\d+) bytes spill stores", said)
    assert spilled is not None
    assert int(spilled[1]) <= 256  # of a thread's registers, outside the loops
