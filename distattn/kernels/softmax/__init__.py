"""Softmax attention: the plain reference, the kernels that torch brings, and our Triton kernels."""

from distattn.kernels.softmax.reference import ReferenceBackend
from distattn.kernels.softmax.torch_cpu import FlashCpuBackend
from distattn.kernels.softmax.torch_cuda import CudnnBackend, FlashBackend
from distattn.kernels.softmax.triton_backend import TritonBackend

__all__ = ["CudnnBackend", "FlashBackend", "FlashCpuBackend", "ReferenceBackend", "TritonBackend"]
