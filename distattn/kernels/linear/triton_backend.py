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
from distattn.kernels.linear.triton_walks import FusedBackward, FusedForward, WalkBackward, WalkForward
from distattn.kernels.triton_here import why_no_triton

if TYPE_CHECKING:
    from distattn.kernels.linear.triton_launch import Call

MAX_KEY_DIM = 256
MAX_KEY_DIM_FP32 = 128


class TritonLinear:
    """``LinearBackend`` by our Triton kernels (bf16, fp16, fp32).

    configs: launch configurations to use in place of the table's; num_parts: of pieces that cross borders, in the delta family,
    in place of what fills the device; fused: walks in one launch where that can be. For measurements and tests.
    """

    name = "triton"

    def __init__(self, configs: LinearConfigs | None = None, num_parts: int = 0, *, fused: bool = True) -> None:
        self._configs, self._num_parts, self._fused = configs, num_parts, fused
        self._apart = TritonLinear(configs, num_parts, fused=False) if fused else self

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
        device = torch.device("cuda", torch.cuda.current_device())
        walks = not case.delta and case.gate != VECTOR
        return broken(self, case, device) or (broken(self._apart, case, device) if walks else None)

    def forward_begin(self, x: Operands, pieces: Pieces, entering: Tensor) -> ForwardPass:
        call, entering = self._call(x, pieces), entering.contiguous()
        if call.delta:
            return DeltaForward(call, entering)
        passes = DecayForward if call.spans is None else FusedForward if call.fused else WalkForward
        return passes(call, entering)

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
        walks = FusedBackward if call.fused and call.knows_spans else WalkBackward
        passes = DecayBackward if call.spans is None or call.with_dg else walks
        return passes(call, *given)

    def _call(self, x: Operands, pieces: Pieces, kept: Tensor | None = None) -> Call:
        launch = importlib.import_module("distattn.kernels.linear.triton_launch")
        return launch.Call(x, pieces, self._configs, self._num_parts, self._fused, kept)
