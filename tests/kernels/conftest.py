"""A process with Triton's interpreter, and one without it for the tests of what compiles."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor

import pytest


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Executor]:
    pytest.importorskip(
        "triton", minversion="3.7", reason="triton >= 3.7 is not installed (its interpreter runs with numpy 2.4)"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        # numpy's BLAS takes these kernels on any x86 processor: those with FMA round a row by how many others are beside it.
        patch.setenv("OPENBLAS_CORETYPE", "Sandybridge")
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
            executor.submit(os.getpid).result()
            yield executor


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Executor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
            executor.submit(os.getpid).result()
            yield executor
