"""Softmax attention: the plain reference and the kernels that torch brings."""

from distattn.kernels.softmax.reference import ReferenceBackend
from distattn.kernels.softmax.torch_cpu import FlashCpuBackend
from distattn.kernels.softmax.torch_cuda import CudnnBackend, FlashBackend

__all__ = ["CudnnBackend", "FlashBackend", "FlashCpuBackend", "ReferenceBackend"]
