"""Our Triton kernels for linear attention as a backend: every operator, forward and backward, any pieces.

Compiled on CUDA; on CPU only under Triton's interpreter (``TRITON_INTERPRET=1``), which is slow and there for tests. The passes
are in ``triton_decay.py`` and ``triton_delta.py``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distattn.kernels.linear.protocol import VECTOR, BackwardPass, ForwardPass, LinearCase, Operands, Pieces
from distattn.kernels.linear.triton_configs import LinearConfigs, linear_configs
from distattn.kernels.linear.triton_decay import DecayBackward, DecayForward
from distattn.kernels.linear.triton_delta import DeltaBackward, DeltaForward
from distattn.kernels.linear.triton_self_test import broken
from distattn.kernels.linear.triton_spans import count_kept, spans_for
from distattn.kernels.linear.triton_walks import WalkBackward, WalkForward
from distattn.kernels.triton_here import why_no_triton

if TYPE_CHECKING:
    from distattn.kernels.linear.triton_launch import Call

MAX_KEY_DIM = 256
MAX_KEY_DIM_FP32 = 128


class TritonLinear:
    """``LinearBackend`` by our Triton kernels (bf16, fp16, fp32).

    configs: launch configurations to use in place of the table's; num_parts: of pieces that cross borders, in the delta family,
    in place of what fills the device. For measurements and tests.
    """

    name = "triton"

    def __init__(self, configs: LinearConfigs | None = None, num_parts: int = 0) -> None:
        self._configs, self._num_parts = configs, num_parts

    def why_not(self, case: LinearCase) -> str | None:
        if case.key_dim > MAX_KEY_DIM:
            return f"takes key dimensions up to {MAX_KEY_DIM}, not {case.key_dim}"
        if reason := why_no_triton(case.device_type, case.dtype):
            return reason
        if case.device_type == "cpu":
            return None
        if case.dtype == torch.float32 and (case.gate == VECTOR or case.key_dim > MAX_KEY_DIM_FP32):
            # With eight warps they read shared memory that no program has; with four it is not known (triton_configs.py).
            return f"computes fp32 on cuda only for keys of up to {MAX_KEY_DIM_FP32} and without a vector of gates"
        return broken(self, case, torch.device("cuda", torch.cuda.current_device()))

    def forward_begin(self, x: Operands, pieces: Pieces, entering: Tensor) -> ForwardPass:
        call, entering = self._call(x, pieces), entering.contiguous()
        if call.delta:
            return DeltaForward(call, entering)
        return DecayForward(call, entering) if call.spans is None else WalkForward(call, entering)

    def num_kept(self, x: Operands, pieces: Pieces) -> int:
        dims = (x.q.shape[3], x.v.shape[3])
        configs = self._configs or linear_configs(x.q.dtype, x.gate, x.beta is not None, *dims)
        return sum(count_kept(x, spans_for(x, pieces, configs)))

    def backward_begin(
        self,
        x: Operands,
        pieces: Pieces,
        entering: Tensor,
        late: Tensor,
        do: Tensor,
        dfinal: Tensor,
        kept: Tensor | None = None,
    ) -> BackwardPass:
        call = self._call(x, pieces, kept)
        given = (entering.contiguous(), late.contiguous(), dfinal.contiguous(), do.contiguous())
        if call.delta:
            return DeltaBackward(call, *given)
        return DecayBackward(call, *given) if call.spans is None or call.with_dg else WalkBackward(call, *given)

    def _call(self, x: Operands, pieces: Pieces, kept: Tensor | None = None) -> Call:
        launch = importlib.import_module("distattn.kernels.linear.triton_launch")
        return launch.Call(x, pieces, self._configs, self._num_parts, kept)
