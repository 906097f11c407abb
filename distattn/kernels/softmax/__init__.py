"""Softmax attention: the plain reference, the kernels that torch brings, FlashAttention-4, and our Triton kernels."""

from distattn.kernels.softmax.fa4 import Fa4Backend
from distattn.kernels.softmax.hopper_backend import HopperBackend
from distattn.kernels.softmax.reference import ReferenceBackend
from distattn.kernels.softmax.torch_cpu import FlashCpuBackend
from distattn.kernels.softmax.torch_cuda import CudnnBackend, FlashBackend
from distattn.kernels.softmax.triton_backend import TritonBackend

__all__ = [
    "CudnnBackend",
    "Fa4Backend",
    "FlashBackend",
    "FlashCpuBackend",
    "HopperBackend",
    "ReferenceBackend",
    "TritonBackend",
]
