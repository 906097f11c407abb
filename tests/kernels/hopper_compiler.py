"""Compile a Triton kernel for Hopper on a machine without a GPU, in a process that has not chosen Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget


def compile_for_hopper(source: Any, options: dict[str, int]) -> tuple[int, str, str]:
    """(Bytes of shared memory, the kernel's PTX, what ptxas says)."""
    compiled: Any = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    command = [ptxas, "-v", "-arch=sm_90a", "-o", os.devnull, "/dev/stdin"]
    done = subprocess.run(command, input=compiled.asm["ptx"], capture_output=True, text=True, check=True)
    return compiled.metadata.shared, compiled.asm["ptx"], done.stderr
